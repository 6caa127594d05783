"""A strategy by `module:factory`: a function of the user's own that makes one.

    def gentle(*, rank: Annotated[int, "Directions."] = 64) -> lowmem.Strategy:
        return lowmem.create("galore", rank=rank, scale=0.1)

Its typed keyword options, explained there or in the docstring's Args, are what may be set. What it makes
bears the name `module:factory` and those options: checkpoint, plan and report know how to make it again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lowmem import outside
from lowmem.errors import UserError, nearest
from lowmem.optim.strategy import Plain, Strategy
from lowmem.strategies.options import Option, options_of


def is_factory(name: str) -> bool:
    """Whether the name of a strategy is of the form module:factory.

    Raises:
        UserError: what is no name.
    """
    if not isinstance(name, str):
        raise UserError(f"a strategy is a name, such as 'adamw', or what lowmem.create makes; got {name!r}")
    return ":" in name


def options(name: str) -> dict[str, Option]:
    """The options of a factory.

    Raises:
        UserError: nothing of that name, or an option without type, default or help.
    """
    function = _function(name)
    try:
        return options_of(function)
    except (ValueError, NameError) as error:
        raise UserError(f"{name}: {error}") from None


def doc(name: str) -> str:
    """What a factory says of itself."""
    return inspect.getdoc(_function(name)) or "A strategy of your own."


def typed(name: str, given: Mapping[str, Any]) -> dict[str, Plain]:
    """Options in their types; texts are those of a command line.

    Raises:
        UserError: all that is wrong with them, in one line.
    """
    known, values, problems = options(name), dict[str, Plain](), list[str]()
    for key, value in given.items():
        option = known.get(key)
        if option is None:
            problems.append(
                f"no option {key!r}; {nearest(str(key), known)}"
                if known
                else f"no option {key!r}: it has none"
            )
            continue
        try:
            values[key] = option.checked(option.typed(value) if isinstance(value, str) else value)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    return values


def make(name: str, given: Mapping[str, Any]) -> Strategy:
    """The strategy that a factory makes, under its name.

    Raises:
        UserError: as `typed`; the factory fails, or returns something else.
    """
    values = {key: option.default for key, option in options(name).items()} | typed(name, given)
    made = _function(name)(**values)
    if not isinstance(made, Strategy):
        raise UserError(
            f"{name} returns {type(made).__name__}; let it return a Strategy, as lowmem.create does"
        )
    return made.called(name, values)


def _function(name: str) -> Callable[..., Any]:
    function = outside.found(name, "optim")
    if not callable(function):
        raise UserError(f"{name} is no function that returns a Strategy")
    return function  # type: ignore[no-any-return]
