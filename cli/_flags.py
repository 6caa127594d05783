"""Flags of a command derived from the fields of a dataclass, so that the two cannot drift."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from typing import Annotated, Any

import typer

from lowmem.config import RunConfig


def run_flags(
    *, only: Iterable[str] | None = None, of: type[Any] = RunConfig
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `**flags` one flag per field; None arrives for a flag not given.

    Args:
        only: names of the fields; all when None.
        of: the dataclass. Numbers of `RunConfig` stay text: it parses them, so all problems come at once.
    """
    wanted = None if only is None else set(only)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints = typing.get_type_hints(of)
        derived = [
            _parameter(f, hints[f.name], as_text=of is RunConfig)
            for f in fields(of)
            if wanted is None or f.name in wanted
        ]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*derived, *own]]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _parameter(f: Field[Any], hint: Any, *, as_text: bool) -> inspect.Parameter:
    """Flag of one field."""
    name = f"--{f.name.replace('_', '-')}"
    kind: Any = str | None
    metavar: str | None = "|".join(f.metadata["choices"]) or _metavar(hint)
    if hint is bool:
        name, kind, metavar = f"{name}/--no-{name[2:]}", bool | None, None
    elif hint == tuple[str, ...]:
        kind = list[str] | None
    elif not as_text and metavar in ("INTEGER", "NUMBER"):
        kind = int | None if metavar == "INTEGER" else float | None
    option = typer.Option(name, help=_help(f), metavar=metavar, rich_help_panel=f.metadata["group"])
    return inspect.Parameter(
        f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option]
    )


def _metavar(hint: Any) -> str:
    if hint == tuple[float, float]:
        return "NUMBER,NUMBER"
    kinds = {hint, *typing.get_args(hint)}
    return "INTEGER" if int in kinds else "NUMBER" if float in kinds else "TEXT"


def _help(f: Field[Any]) -> str:
    if f.default is MISSING or f.default is None or f.default in ("", ()):
        return str(f.metadata["help"])
    default = f.default
    if isinstance(default, bool):
        default = "yes" if default else "no"
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    return f"{f.metadata['help']} (default: {default})"
