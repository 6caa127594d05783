"""A deep model from two shallow ones.

Every event's bytes are linear in depth (layers are alike, or repeat with a short period), so two traces of
a few layers give any depth: exactly, if each event is extrapolated by itself. The maximum over events is
taken afterwards; extrapolating the maximum would be wrong where another event binds.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lowmem.memory.run import Run
from lowmem.memory.trace import replica
from lowmem.memory.trace.given import Given
from lowmem.memory.trace.replica import Trace, let_go, on_rank, trace
from lowmem.memory.trace.tracker import Moment, Tracker
from lowmem.memory.trace.windows import Parameter, resting
from lowmem.models.entries import parameter_count, skeleton
from lowmem.optim.strategy import Strategy
from lowmem.sources import Free
from lowmem.strategies import create

_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")
LOSS = 4  # bytes of a loss
PER_LAYER = ("layer_types", "layers_block_type", "sliding_window_pattern_list")


def period(config: Any) -> int:
    """After how many layers the kinds of layers repeat; the depth itself if they do not."""
    kinds = list(getattr(config, "layer_types", None) or ["full"])
    depth = int(config.num_hidden_layers)
    for length in range(1, len(kinds) + 1):
        if all(kinds[i] == kinds[i % length] for i in range(len(kinds))):
            return length if depth % length == 0 else depth
    return depth


def shallow(config: Any, depth: int) -> Any:
    """The same model with fewer layers."""
    short = copy.deepcopy(config)
    short.num_hidden_layers = depth
    for name in PER_LAYER:
        if getattr(short, name, None) is not None:
            setattr(short, name, list(getattr(short, name))[:depth])
    return short


def extrapolated(config: Any, run: Run, strategy: Strategy | None = None) -> Trace:
    """`trace`, without its stream, at the cost of a few layers.

    Args:
        config: a transformers configuration.
        run: the options.
        strategy: as in `trace`.
    """
    return _extrapolated(_Key(config, run, strategy))


@functools.lru_cache(maxsize=256)
def _extrapolated(key: _Key) -> Trace:
    config, run, strategy = key.config, key.run, key.strategy
    if isinstance(config, Given):
        return remembered(config, run, strategy)
    depth, repeat = int(config.num_hidden_layers), period(config)
    low, high = _samples(config)
    if depth <= high or not uniform(config, low, high):
        return remembered(config, run, strategy)
    if strategy is not None and _never_rests(config, run, strategy):
        return extrapolated(config, run, None)
    few = _fewest(strategy, run)
    a, b = (remembered(shallow(config, layers), run, few) for layers in (low, high))
    line = functools.partial(_line, depth=depth, low=low, high=high)
    moments = {name: line(a.moments[name], b.moments[name]) for name in b.moments if name in a.moments}
    if few is not None and strategy is not None and few is not strategy:
        moments = _lasting(moments, run, _passes(strategy) - _passes(few))
    first, second = _by_kind(a.releases), _by_kind(b.releases)
    releases = {kind: line(first[kind], second[kind]) for kind in second if kind in first}
    parameters = _deepen(b.parameters, depth, repeat)
    total = a.total_parameters + (b.total_parameters - a.total_parameters) * (depth - low) // (high - low)
    return Trace(moments, releases, parameters, total, depth)


def trained(config: Any, run: Run) -> tuple[Parameter, ...]:
    """The trainable parameters of a run, whatever its batch and its levers are.

    Args:
        config: a transformers configuration; run: the options.
    """
    any_batch = replace(
        run, batch_size=1, seq_len=2, gradient_checkpointing=False, gradient_release=False,
        activation_offload=False, loss="plain", max_grad_norm=0.0, workspace=None,
    )  # fmt: skip
    return _trained(_Key(config, any_batch, None))


@functools.lru_cache(maxsize=64)
def _trained(key: _Key) -> tuple[Parameter, ...]:
    _, high = _samples(key.config)
    found = replica.trained(shallow(key.config, high), key.run)
    return _deepen(found, int(key.config.num_hidden_layers), period(key.config))


def _never_rests(config: Any, run: Run, strategy: Strategy) -> bool:
    """Whether every tensor of a strategy with gradients has one in the step that is traced."""
    if not strategy.source.needs_autograd:
        return False
    return not resting(strategy, trained(config, run))


def evaluated(config: Any, run: Run) -> Moment:
    """The largest instant of `evaluation` at the cost of a few layers; once for all that evaluate alike.

    Args:
        config: a transformers configuration; run: the options, with those of the evaluation's batch.
    """
    depth = int(config.num_hidden_layers)
    low, high = _samples(config)
    if isinstance(config, Given) or depth <= high or not uniform(config, low, high):
        return _evaluated(_evaluating(config, run))
    a, b = (_evaluated(_evaluating(shallow(config, layers), run)) for layers in (low, high))
    return _line(a, b, depth=depth, low=low, high=high)


def evaluation(config: Any, run: Run) -> Tracker:
    """`replica.evaluation` of the whole model, with its stream; arguments as `evaluated`."""
    return _evaluation(_evaluating(config, run))


def _evaluating(config: Any, run: Run) -> _Key:
    """One key for all runs that evaluate alike."""
    alike = replace(
        run, gradient_checkpointing=False, gradient_release=False, accumulation=1, max_grad_norm=0.0,
        activation_offload=False, few_bit=None,
        keep_output=False, compile="auto", steps=None, eval_batch_size=None, typical=None,
    )  # fmt: skip
    return _Key(config, alike, None)


@functools.lru_cache(maxsize=64)
def _evaluated(key: _Key) -> Moment:
    return _evaluation(key).moments()[replica.EVALUATION]


@functools.lru_cache(maxsize=4)
def _evaluation(key: _Key) -> Tracker:
    return replica.evaluation(key.config, key.run)


def _samples(config: Any) -> tuple[int, int]:
    """Two depths that tell any other: a first, a last and a middle layer, and one period more."""
    repeat = period(config)
    low = repeat * -(-3 // repeat)
    return low, low + repeat


def uniform(config: Any, low: int, high: int) -> bool:
    """Whether models of `low` and `high` layers tell the size of the whole: no layer is of another kind."""
    return _uniform(_Key(config, Run(), None), low, high)


@functools.lru_cache(maxsize=64)
def _uniform(key: _Key, low: int, high: int) -> bool:
    depth = int(key.config.num_hidden_layers)
    try:
        a, b = (parameter_count(skeleton(shallow(key.config, d))) for d in (low, high))
    except Exception:  # a configuration whose lists of layers go by other names
        return False
    return a + (b - a) * (depth - low) // (high - low) == parameter_count(skeleton(key.config))


class _Key:
    """A configuration and run as a dictionary key: configurations do not hash."""

    def __init__(self, config: Any, run: Run, strategy: Strategy | None) -> None:
        self.config, self.strategy = config, strategy
        self.run = replace(run, offload_state=False)  # where state is makes no difference to a trace
        self._id = (json.dumps(config.to_dict(), sort_keys=True, default=str), self.run, strategy)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._id == other._id

    def __hash__(self) -> int:
        return hash(self._id)


@functools.lru_cache(maxsize=64)
def _remembered(key: _Key) -> Trace:
    if key.run.ranks > 1:
        alone = replace(key.run, ranks=1, shard="full", per_node=None)
        return on_rank(remembered(key.config, alone, key.strategy), key.run)
    if key.run.gradient_release and (key.strategy is None or key.strategy.source.needs_autograd):
        kept = replace(key.run, gradient_release=False, max_grad_norm=Run.max_grad_norm)
        return let_go(remembered(key.config, kept, key.strategy))
    return trace(key.config, key.run, key.strategy)


def remembered(config: Any, run: Run, strategy: Strategy | None = None) -> Trace:
    """`trace`, once for each configuration and run."""
    norm = Run.max_grad_norm if run.max_grad_norm > 0 else 0.0  # how large it is makes no difference
    one = None if strategy is None else _alike(strategy, run)
    return _remembered(_Key(config, replace(run, max_grad_norm=norm), one))


def _alike(strategy: Strategy, run: Run) -> Strategy:
    """One strategy for all that probe alike."""
    if not _probes(strategy, run):
        return strategy
    source: Any = strategy.source
    return replace(create("mezo"), source=replace(source, structure=Free()))


def _fewest(strategy: Strategy | None, run: Run) -> Strategy | None:
    """The strategy of two passes, for all that look at one point after the other: a pass is like the next."""
    if strategy is None or run.task != "sft" or not _probes(strategy, run):
        return strategy
    return create("mezo") if getattr(strategy.source, "at_once", 0) == 1 else strategy


def _probes(strategy: Strategy, run: Run) -> bool:
    """Whether points are probed whose copies a card writes at once, whatever is drawn."""
    source: Any = strategy.source
    if strategy.turns or source.quantized or run.device != "cuda" or run.compile == "off":
        return False
    return not source.needs_autograd and hasattr(source, "structure")


def _passes(strategy: Strategy) -> int:
    source: Any = strategy.source
    return int(source.estimator.base) + int(source.queries) * len(source.estimator.sides)


def _lasting(moments: Mapping[str, Moment], run: Run, more: int) -> dict[str, Moment]:
    """The same with the losses of more passes, which wait for the last one."""
    size = more * -(-LOSS // run.granularity) * run.granularity
    last = moments["optimizer step"]
    kept = {
        name: replace(m, bytes={**m.bytes, "logits": m.bytes["logits"] + size}) for name, m in moments.items()
    }
    return kept | {last.event: last}


def _line(a: Moment, b: Moment, *, depth: int, low: int, high: int) -> Moment:
    steps = (depth - low) / (high - low)
    return Moment(b.event, {k: round(a.bytes[k] + (b.bytes[k] - a.bytes[k]) * steps) for k in b.bytes}, -1)


def kind(name: str) -> str:
    """A parameter's name with the layer's number as a star."""
    return _LAYER.sub("*", name)


def _by_kind(releases: Mapping[str, Moment]) -> dict[str, Moment]:
    """The largest release of each kind of parameter: later layers have more live below them."""
    best: dict[str, Moment] = {}
    for name, moment in releases.items():
        if kind(name) not in best or moment.total > best[kind(name)].total:
            best[kind(name)] = moment
    return best


def _deepen(parameters: tuple[Parameter, ...], depth: int, repeat: int) -> tuple[Parameter, ...]:
    """Parameters of all layers, from those of the first ones."""
    found: list[Parameter] = []
    for p in parameters:
        match = _LAYER.search(p.name)
        if match is None:
            found.append(p)
        elif int(match[0]) < repeat:
            numbers = range(int(match[0]), depth, repeat)
            found += [replace(p, name=_LAYER.sub(str(i), p.name, count=1)) for i in numbers]
    return tuple(found)
