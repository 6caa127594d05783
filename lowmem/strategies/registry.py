"""Named strategies: which there are, with which options, and how to make one."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lowmem.errors import ConfigError, UserError, nearest
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.strategy import Plain, Strategy
from lowmem.optim.tensors.checks import idle
from lowmem.optim.tensors.groups import param_groups
from lowmem.optim.tensors.offload import home_of
from lowmem.strategies import factories
from lowmem.strategies.compose import compose, fixed, place
from lowmem.strategies.method import AXES, Advice, Method, methods
from lowmem.strategies.options import Option
from lowmem.strategies.parts import load
from lowmem.strategies.words import choices, chosen, holds_moments, known, shown

_HELP = {
    "projector": "Where the gradient is seen.",
    "rule": "How a step is made of it.",
    "residual": "What becomes of what is not seen.",
    "modifiers": "What is done to gradient and step, in this order, as in a+b.",
    "schedule": "Which tensors are active.",
    "source": "Where gradients come from.",
    "writer": "How a new weight of 16 bits is stored.",
}


@dataclass(frozen=True)
class Entry:
    """A named strategy, as it comes.

    Args:
        name: as `create` takes it; summary: one line; paper: arXiv id; family: what it is listed under.
        options: axes and options of the parts that it comes with, with its defaults, by name.
        doc: equation, bytes and limits; recommended: what its authors take.
    """

    name: str
    summary: str
    paper: str
    options: Mapping[str, Option]
    doc: str
    family: str
    recommended: tuple[Advice, ...] = ()

    @property
    def axes(self) -> dict[str, Option]:
        """Those options that choose a part."""
        return {name: option for name, option in self.options.items() if name in AXES}


def available() -> dict[str, Entry]:
    """Every named strategy, sorted.

    Example:
        >>> "galore" in available()
        True
    """
    load()
    return {
        name: Entry(
            name, method.summary, method.paper, beside(name), method.doc, method.family, method.recommended
        )
        for name, method in methods().items()
    }


def entry(name: str) -> Entry:
    """One strategy, also one of the user's own by `module:factory`.

    Raises:
        UserError: an unknown name.

    Example:
        >>> entry("galore").paper
        '2403.03507'
    """
    if factories.is_factory(name):
        doc = factories.doc(name)
        return Entry(name, doc.split("\n", 1)[0], "", factories.options(name), doc, "Your own")
    _method(name)
    return available()[name]


def beside(name: str, **words: str) -> dict[str, Option]:
    """The axes, and the options that may be written beside some choices, with their defaults.

    Args:
        name: of the strategy.
        words: choices on its axes; as it comes without.

    Raises:
        UserError: a word that cannot be chosen.

    Example:
        >>> beside("galore", projector="randk")["rank"].help
        'Elements that are seen of each 256, or their share.'
    """
    if factories.is_factory(name):
        return factories.options(name)
    method, problems = _method(name), list[str]()
    table, own = known(chosen(method, words, problems)), fixed(method)
    if problems:
        raise UserError(f"{name}: {'; '.join(problems)}")
    options = {
        axis: Option(axis, str, method.word(axis, words), text, tuple(choices(axis)))
        for axis, text in _HELP.items()
    }
    idle = () if any(holds_moments(slot.part) for slot in table.slots) else ("states",)
    for key in (key for key in shown(table) if key not in idle):
        slot, option = table.table[key]
        options[key] = replace(option, default=own.get(place(slot, option), option.default))
    return options


def _method(name: str) -> Method:
    load()
    found = methods()
    if name not in found:
        raise UserError(f"unknown strategy {name!r}; {nearest(name, found)}")
    return found[name]


def create(name: str, **options: Plain) -> Strategy:
    """Make a named strategy.

    Args:
        name: one of `available()`, or `module:factory` of a function that makes one.
        options: choices on its axes, options of the chosen parts; numbers may be given as int or float.

    Raises:
        UserError: unknown name; or all that is wrong with the options, each with the remedy.

    Example:
        >>> create("galore", rank=64).options["rank"]
        64
        >>> create("galore", projector="columns", residual="sign").options["residual_scale"]
        1.0
    """
    return factories.make(name, options) if factories.is_factory(name) else compose(_method(name), options)[1]


def parse_options(name: str, text: str | Mapping[str, Any] | None) -> dict[str, Plain]:
    """Options of a strategy from "rank=128,states=int8" or a mapping, typed and checked.

    Args:
        name: of the strategy.
        text: comma-separated pairs, or a mapping with values of any plain type.

    Raises:
        UserError: all that is wrong with them, each with the remedy.

    Example:
        >>> parse_options("galore", "rank=64, scale=1")
        {'rank': 64, 'scale': 1.0}
    """
    own = factories.is_factory(name)
    if text is not None and not isinstance(text, str):
        return factories.typed(name, text) if own else compose(_method(name), text)[0].given
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    bad = [part for part in parts if "=" not in part]
    if bad:
        raise UserError(f"{name}: options are written key=value,key=value; got {bad[0]!r}")
    pairs = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parts)}
    if len(pairs) < len(parts):
        raise UserError(f"{name}: an option is given twice in {text!r}; give each once")
    return factories.typed(name, pairs) if own else compose(_method(name), pairs, text=True)[0].given


def optimizer(
    params: nn.Module | Iterable[Any],
    strategy: str | Strategy,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_names: Collection[str] | None = None,
    seed: int = 0,
    compile: str = "auto",
    model: nn.Module | None = None,
    offload_state: bool = False,
    **options: Plain,
) -> LowMemOptimizer:
    """An optimizer for the trainable parameters of a model, or for those that are given.

    Args:
        params: a model; or parameters, (name, parameter) pairs, or groups of either, as torch takes them.
        strategy: its name, or one that was made; options: of a named one.
        lr: learning rate.
        betas: decays of the averages.
        eps: added to a root before it divides.
        weight_decay: decoupled, as in AdamW.
        decay_names: names of a model's parameters that decay; all, if None.
        seed: of the run; compile: auto, on or off.
        model: owner of the parameters, where those are given: names and roles are found in it.
        offload_state: keep state in the host's memory between steps, see `lowmem.optim.tensors.offload`.

    Raises:
        UserError: unknown strategy or option, a number outside its range, or one without effect; state that
            cannot leave, as there is no CUDA device or no gradients.

    Example:
        >>> optimizer(nn.Linear(8, 8), "galore", lr=1e-4, rank=4).strategy.name
        'galore'
    """
    if isinstance(strategy, Strategy) and options:
        raise UserError(
            f"{', '.join(options)}: a strategy that was made has its options; give them to lowmem.create"
        )
    made = strategy if isinstance(strategy, Strategy) else create(strategy, **options)
    if problems := idle(made.name or "the strategy", made.rules.values(), betas=betas, eps=eps):
        raise ConfigError(problems)
    if isinstance(params, nn.Module):
        model, trained = params, made.source.trained(params)
        params = param_groups(model, weight_decay=weight_decay, decay_names=decay_names, trained=trained)
    elif decay_names is not None:
        raise UserError(
            "decay_names goes with a model; give parameters in groups with weight_decay of their own"
        )
    return LowMemOptimizer(
        params, made, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, seed=seed, compile=compile,
        model=model, home=home_of(made) if offload_state else None,
    )  # fmt: skip
