"""The registry of named methods: what exists, with which options, and how to make it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lowmem.errors import ConfigError, UserError, nearest
from lowmem.optim.checks import idle
from lowmem.optim.groups import param_groups
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.strategy import Plain, Strategy

Factory = Callable[..., Strategy]


@dataclass(frozen=True)
class Option:
    """One option of a method.

    Args:
        name: as it is written; type: int, float, str or bool.
        default: its value when it is not given.
        help: one sentence.
        choices: the words it may be, or None.
    """

    name: str
    type: type
    default: Plain
    help: str
    choices: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Args:
        name: as `create` takes it; summary: one line; paper: arXiv id.
        options: by name.
        factory: makes the strategy.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    factory: Factory


_ENTRIES: dict[str, Entry] = {}

WRITER = Option(
    "writer",
    str,
    "auto",
    "How the new weight is stored; auto rounds 16-bit weights at random.",
    ("auto", "nearest", "stochastic", "kahan", "split"),
)
"""Every method takes it."""


def register(*, paper: str) -> Callable[[Factory], Factory]:
    """Register a factory under its own name.

    Args:
        paper: arXiv id of the method.

    Raises:
        ValueError: a name that exists, or an option without type, default or help.
    """

    def add(factory: Factory) -> Factory:
        name = factory.__name__
        if name in _ENTRIES:
            raise ValueError(f"strategy {name!r} is registered twice; rename one of the factories")
        summary = (inspect.getdoc(factory) or "").split("\n", 1)[0]
        _ENTRIES[name] = Entry(name, summary, paper, {**_options(factory), WRITER.name: WRITER}, factory)
        return factory

    return add


def _options(factory: Factory) -> dict[str, Option]:
    hints = typing.get_type_hints(factory)
    helps = _helps(inspect.getdoc(factory) or "")
    options = {}
    for name, parameter in inspect.signature(factory).parameters.items():
        choices = typing.get_args(hints[name]) if typing.get_origin(hints[name]) is Literal else None
        kind = str if choices else hints[name]
        if parameter.default is parameter.empty or kind not in (int, float, str, bool) or name not in helps:
            raise ValueError(
                f"option {name!r} of {factory.__name__!r} needs a plain type, a default and a help line"
            )
        options[name] = Option(name, kind, parameter.default, helps[name], choices)
    return options


def _helps(doc: str) -> dict[str, str]:
    """The lines of a docstring's Args section, by name."""
    found: dict[str, str] = {}
    section = doc.partition("\nArgs:\n")[2].partition("\n\n")[0]
    for match in re.finditer(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", section, re.MULTILINE):
        found[match[1]] = " ".join(match[2].split())
    return found


def available() -> dict[str, Entry]:
    """Every registered method by name, sorted.

    Example:
        >>> "galore" in available()
        True
    """
    package = importlib.import_module("lowmem.strategies.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"lowmem.strategies.methods.{module.name}")
    return dict(sorted(_ENTRIES.items()))


def _entry(name: str) -> Entry:
    entries = available()
    if name not in entries:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, entries)}")
    return entries[name]


def create(name: str, **options: Plain) -> Strategy:
    """Make a named strategy.

    Args:
        name: one of `available()`.
        options: of that method; numbers may be given as int or float.

    Raises:
        UserError: unknown name or option (with the nearest match), or a value that is not allowed.

    Example:
        >>> create("galore", rank=64).options["rank"]
        64
    """
    entry = _entry(name)
    values = {option.name: option.default for option in entry.options.values()}
    values |= _each(entry, options, lambda key, value: _checked(entry, key, value))
    given = {key: value for key, value in values.items() if key != WRITER.name}
    try:
        strategy = entry.factory(**given)
    except UserError:
        raise UserError("; ".join(_refusals(entry, given))) from None
    return dataclasses.replace(strategy, name=name, options=given, writer=str(values[WRITER.name]))


def _each(entry: Entry, options: Mapping[str, Any], check: Callable[[str, Any], Plain]) -> dict[str, Plain]:
    """The checked options, or one error for all that is wrong with them."""
    good: dict[str, Plain] = {}
    problems: list[str] = []
    for key, value in options.items():
        try:
            good[key] = check(key, value)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("; ".join([*problems, *_refusals(entry, good)]))
    return good


def _refusals(entry: Entry, options: Mapping[str, Any]) -> list[str]:
    """What the factory says of options: it stops at the first problem, so what caused that is taken out."""
    given = {key: value for key, value in options.items() if key != WRITER.name}
    said = _refusal(entry, given)
    for key in given if said else ():
        rest = {k: v for k, v in given.items() if k != key}
        if said not in _refusal(entry, rest):
            return [said, *_refusals(entry, rest)]
    return [said] if said else []


def _refusal(entry: Entry, options: Mapping[str, Any]) -> str:
    try:
        entry.factory(**options)
    except UserError as error:
        return str(error)
    return ""


def _checked(entry: Entry, key: str, value: Plain) -> Plain:
    if key not in entry.options:
        raise UserError(f"{entry.name} has no option {key!r}; {nearest(key, entry.options)}")
    option = entry.options[key]
    if option.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not option.type:
        raise UserError(f"{entry.name}: {key} is {option.type.__name__}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{entry.name}: {key} is a finite number, got {value}")
    if option.choices and value not in option.choices:
        raise UserError(f"{entry.name}: unknown {key} {value!r}; {nearest(str(value), option.choices)}")
    return value


def parse_options(name: str, text: str | Mapping[str, Any] | None) -> dict[str, Plain]:
    """Options of a method from "rank=128,states=int8" or a mapping, typed and checked.

    Args:
        name: of the method.
        text: comma-separated pairs, or a mapping with values of any plain type.

    Raises:
        UserError: unknown key (with the nearest match), or a value of the wrong type.

    Example:
        >>> parse_options("galore", "rank=64, scale=1")
        {'rank': 64, 'scale': 1.0}
    """
    entry = _entry(name)
    if text is None or isinstance(text, str):
        parts = [part.strip() for part in (text or "").split(",") if part.strip()]
        bad = [part for part in parts if "=" not in part]
        if bad:
            raise UserError(f"{name}: options are written key=value,key=value; got {bad[0]!r}")
        pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}
        if len(pairs) < len(parts):
            raise UserError(f"{name}: an option is given twice in {text!r}; give each once")
        return _each(entry, pairs, lambda key, value: _checked(entry, key, _typed(entry, key, value)))
    return _each(entry, text, lambda key, value: _checked(entry, key, value))


def _typed(entry: Entry, key: str, text: str) -> Plain:
    option = entry.options.get(key)
    if option is None or option.type is str:
        return text
    if option.type is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise UserError(f"{entry.name}: {key} is true or false, got {text!r}")
        return words[text.lower()]
    try:
        return typing.cast(Plain, option.type(text))
    except ValueError:
        raise UserError(f"{entry.name}: {key} is {option.type.__name__}, got {text!r}") from None


def optimizer(
    params: nn.Module | Iterable[Any],
    name: str,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
    seed: int = 0,
    compile: str = "auto",
    model: nn.Module | None = None,
    **options: Plain,
) -> LowMemOptimizer:
    """An optimizer for the trainable parameters of a model, or for those that are given.

    Args:
        params: a model; or parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        name: of the strategy; options: of the strategy.
        lr, betas, eps, weight_decay: as in AdamW.
        decay_names: names of a model's parameters that decay; all, if None.
        seed: of the run; compile: auto, on or off.
        model: owner of the parameters, where those are given: names and roles are found in it.

    Raises:
        UserError: unknown strategy or option, a number outside its range, or one without effect.

    Example:
        >>> optimizer(nn.Linear(8, 8), "galore", lr=1e-4, rank=4).strategy.name
        'galore'
    """
    strategy = create(name, **options)
    if problems := idle(name, strategy.rules.values(), betas=betas, eps=eps):
        raise ConfigError(problems)
    if isinstance(params, nn.Module):
        model, trained = params, strategy.source.trained(params)
        params = param_groups(model, weight_decay=weight_decay, decay_names=decay_names, trained=trained)
    elif decay_names is not None:
        raise UserError(
            "decay_names goes with a model; give parameters in groups with weight_decay of their own"
        )
    return LowMemOptimizer(
        params, strategy, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed, compile=compile,
        model=model,
    )  # fmt: skip
