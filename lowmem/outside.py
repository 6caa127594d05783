"""Python code of the user's own: a module by its name, or a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

from lowmem.errors import UserError, first_line


def bring(modules: str | Iterable[str], asked: str = "plugin") -> None:
    """Import modules for what they register.

    Args:
        modules: names or files, several as a list or with commas.
        asked: the setting that names them, for the error.

    Raises:
        UserError: one that cannot be imported.

    Example:
        >>> bring("json")
    """
    for name in modules.split(",") if isinstance(modules, str) else modules:
        if name.strip():
            imported(name.strip(), asked)


def found(name: str, asked: str) -> Any:
    """What "module:name" or "file.py:name" names.

    Args:
        name: of the module and of what stands in it; asked: the setting that names it, for the error.

    Raises:
        UserError: no such module or name in it, or an error while importing it.

    Example:
        >>> found("operator:length_hint", "reward").__name__
        'length_hint'
    """
    module, _, inside = name.rpartition(":")
    if not module or not inside:
        raise UserError(f"{asked}: {name!r} is not of the form module:function, as in my_module:mine")
    held = imported(module, asked)
    if not hasattr(held, inside):
        raise UserError(f"{asked}: {module} has no function {inside!r}")
    return getattr(held, inside)


def function(name: str, asked: str) -> Callable[..., Any]:
    """What `found` finds, if it can be called.

    Raises:
        UserError: also something that cannot.
    """
    held = found(name, asked)
    if not callable(held):
        raise UserError(f"{asked}: {name} is no function")
    return held  # type: ignore[no-any-return]


def imported(module: str, asked: str) -> ModuleType:
    """A module by name, looked for in the present folder as well, or a file; each is imported once.

    Raises:
        UserError: no such module, or an error while importing it.
    """
    try:
        if not module.endswith(".py"):
            with patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
                return importlib.import_module(module)
        return _of_file(Path(module).expanduser().resolve())
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"{asked}: cannot import {module!r}: {type(error).__name__}: {first_line(error)}"
        ) from error


def _of_file(file: Path) -> ModuleType:
    """The module of a file under its stem; dataclasses and pickles look it up there."""
    there = sys.modules.get(file.stem)
    if there is not None and Path(str(getattr(there, "__file__", ""))).resolve() == file:
        return there
    if there is not None:
        raise ImportError(f"a module {file.stem!r} is imported already; rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    made = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return made
