"""Parts: what a strategy is composed of, by kind and by name.

    projector   where a gradient is seen           residual   what becomes of what is not seen
    rule        how a step is made of it           schedule   which tensors are active now
    modifier    what is done to step or gradient   source     where gradients come from
    writer      how the new weight is stored

A part is a factory under its kind, marked with `@part`; its name is the word that
the user writes, its typed keyword options are what may be set beside it. Parts of
lowmem lie in `axes` and `methods`; those of another package are found by an entry
point in the group "lowmem.strategies" that names their module.

Some parameters the composition fills in itself, where a factory has them:
`states` (of a rule that is not `Elementwise`: precision of its moments) and `inside`
(of a rule: whether it steps in a subspace).
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, TypeVar

from lowmem.errors import UserError, first_line
from lowmem.optim.strategy import Plain
from lowmem.strategies.options import Option, helps_of, options_of

KINDS = ("projector", "rule", "residual", "modifier", "schedule", "source", "writer")
TOLD = ("states", "inside")
"""Parameters that are no options: the composition knows their values."""
GROUP = "lowmem.strategies"
"""Of the entry points by which other packages bring parts and methods."""

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class Part:
    """A factory under its kind.

    Args:
        kind: one of KINDS; name: the word that the user writes.
        summary: one line.
        options: by name; told: which parameters the composition fills in.
        factory: makes the part.
    """

    kind: str
    name: str
    summary: str
    options: Mapping[str, Option]
    told: frozenset[str]
    factory: Callable[..., Any]

    def __hash__(self) -> int:
        return hash((self.kind, self.name))

    def make(self, values: Mapping[str, Any], **told: Any) -> Any:
        """The part with these options, and with those of `told` that it asks for."""
        return self.factory(**values, **{key: told[key] for key in self.told if key in told})


_PARTS: dict[str, dict[str, Part]] = {kind: {} for kind in KINDS}


def part(
    kind: str, name: str = "", *, first: Callable[..., tuple[Any, ...]] | None = None, **usual: Plain
) -> Callable[[Factory], Factory]:
    """Register a factory as a part.

    Args:
        kind: one of KINDS.
        name: the word for it; the factory's own name, if empty.
        first: a function whose options it shares with others: they come before its own, and what the
            function makes of them is what the factory takes by position.
        usual: other defaults of those.

    Raises:
        ValueError: an unknown kind, a name that exists, a factory without summary, or an option without
            type, default or help.
    """
    if kind not in KINDS:
        raise ValueError(f"a part is one of {', '.join(KINDS)}, not {kind!r}")

    def add(factory: Factory) -> Factory:
        word = name or factory.__name__
        summary = (inspect.getdoc(factory) or "").split("\n", 1)[0]
        if not summary:
            raise ValueError(f"{kind} {word!r} needs a docstring: its first line is shown to the user")
        if word in _PARTS[kind]:
            raise ValueError(f"{kind} {word!r} is registered twice; rename one of the factories")
        told = frozenset(TOLD) & set(inspect.signature(factory).parameters)
        made, options = _after(first, usual, factory) if first else (factory, options_of(factory, told))
        _PARTS[kind][word] = Part(kind, word, summary, options, told, made)
        return factory

    return add


def _after(
    first: Callable[..., tuple[Any, ...]], usual: Mapping[str, Plain], factory: Callable[..., Any]
) -> tuple[Callable[..., Any], dict[str, Option]]:
    """A factory of what `first` makes, and the options of both; what the factory says of one counts."""
    helps, shared = helps_of(factory), options_of(first)
    for name, option in shared.items():
        shared[name] = replace(
            option, default=usual.get(name, option.default), help=helps.get(name, option.help)
        )

    def made(**values: Any) -> Any:
        begun = first(**{name: values.pop(name, option.default) for name, option in shared.items()})
        return factory(*begun, **values)

    given = list(inspect.signature(factory).parameters.values())
    taken = [parameter.name for parameter in given if parameter.kind is not parameter.KEYWORD_ONLY]
    return made, {**shared, **options_of(factory, {*TOLD, *taken})}


def parts(kind: str) -> dict[str, Part]:
    """Every part of a kind by name, sorted.

    Example:
        >>> "power" in parts("projector")
        True
    """
    load()
    return dict(sorted(_PARTS[kind].items()))


def owners(option: str, kind: str = "") -> list[str]:
    """The choices that an option comes with, as the user writes them: ["projector=power|svd", ...]."""
    found = {k: [n for n, p in parts(k).items() if option in p.options] for k in KINDS if k == (kind or k)}
    return [f"{k}={'|'.join(names)}" for k, names in found.items() if names]


@functools.cache
def load() -> None:
    """Import every module that brings parts or methods, once in a process.

    Raises:
        UserError: another package's module cannot be imported.
    """
    for room in ("axes", "methods"):
        package = importlib.import_module(f"lowmem.strategies.{room}")
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in metadata.entry_points(group=GROUP):
        try:
            importlib.import_module(entry.value)
        except Exception as error:
            raise UserError(
                f"{entry.value!r} is to bring strategies and cannot be imported ({first_line(error)}); "
                f"mend it or uninstall its package"
            ) from error
