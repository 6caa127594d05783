"""A function of the user by its name, as in my_rewards:exact or ./rewards.py:exact."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lowmem.errors import UserError, first_line


def named_function(setting: str, name: str) -> Callable[..., Any]:
    """The function that `module:function` or `file.py:function` names; modules of the present folder too.

    Args:
        setting: what is set to it, for errors; name: of the function.

    Raises:
        UserError: no such module or function, or an error while importing it.

    Example:
        >>> named_function("reward", "operator:length_hint").__name__
        'length_hint'
    """
    module, _, function = name.rpartition(":")
    if not module or not function:
        raise UserError(f"{setting}: {name!r} is not of the form module:function, as in my_{setting}s:exact")
    try:
        found = getattr(_imported(module), function, None)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{setting}: cannot import {module!r}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not callable(found):
        raise UserError(f"{setting}: {module} has no function {function!r}")
    return found  # type: ignore[no-any-return]


def _imported(module: str) -> Any:
    """A module by name, or a file."""
    if not module.endswith(".py"):
        with patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
            return importlib.import_module(module)
    spec = importlib.util.spec_from_file_location(Path(module).stem, Path(module).expanduser())
    if spec is None or spec.loader is None:
        raise ImportError(f"{module} is no Python file")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made
