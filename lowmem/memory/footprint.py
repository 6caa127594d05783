"""What one strategy adds to a traced model: state, and scratch of a step; and the event that then binds.

Both come from the strategy's own code on the meta device (`count`), so a strategy that can run can be
planned. Where kernels are compiled, the arithmetic of a chunk stays in registers: then only what the frame
itself allocates (padded tails, projected gradients, reductions) is counted, otherwise every temporary of
the eager code. The sizes of pieces are those of the device that is planned for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.memory import count
from lowmem.memory.count import Workspace
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import kind
from lowmem.memory.trace.ranks import ROWS
from lowmem.memory.trace.replica import EVALUATION, Trace
from lowmem.memory.trace.tracker import CATEGORIES, Moment
from lowmem.memory.trace.windows import Parameter, windows
from lowmem.optim.contract import is_pointwise
from lowmem.optim.engine.chunks import GRIDS, Chunks
from lowmem.optim.engine.cutting import POLICIES, compiled_spans, policy
from lowmem.optim.engine.layout import ROW
from lowmem.optim.engine.together import ELEMENTS, TENSORS
from lowmem.optim.shards import Shard
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.checks import pays
from lowmem.optim.tensors.offload import ALIGNED, LEAST, SEEN, SLOTS
from lowmem.optim.tensors.outside import forms
from lowmem.sources import directions

Steps = Literal["all", "large", "none"]
STEP, RELEASE, SAVE, LOAD = "optimizer step", "release step", "save", "load"


@dataclass(frozen=True)
class Footprint:
    """Bytes of one strategy.

    Args:
        state_bytes: exactly what the optimizer will hold.
        tensors: size of each state tensor as the device rounds it.
        scratch: greatest transient bytes while a parameter is stepped, by its name.
        compiled: whether the step is compiled.
        grids: size of each tensor that the frame keeps: index grids of rounding, a card's tally of rows.
        together: greatest transient bytes while small ones are stepped together.
        copied: what a state dict copies, to stand in a file as it does on any number of ranks.
        away: of the state, what is in the host's memory between steps; the slots it travels to are tensors.
        displaced: size of each weight's copy while the method evaluates other weights than it trains.
    """

    strategy: Strategy
    state_bytes: int
    tensors: tuple[int, ...]
    scratch: Mapping[str, int]
    compiled: bool
    grids: tuple[int, ...] = ()
    together: int = 0
    copied: int = 0
    away: int = 0
    displaced: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """State as the device rounds it."""
        return sum(self.tensors)

    @property
    def kept(self) -> int:
        """Workspace that stays between steps."""
        return sum(self.grids)

    @property
    def worst(self) -> int:
        """Greatest scratch of a step."""
        return max([self.together, *self.scratch.values()])


def footprint(
    strategy: Strategy, parameters: Sequence[Parameter], run: Run, *, steps: Steps = "all"
) -> Footprint:
    """Count a strategy on the trainable parameters of a traced model.

    Where a schedule decides which tensors hold state, the step with the most is taken.

    Args:
        steps: whose scratch is counted, which takes time: of all tensors, of the large ones, or of none.
    """
    elements = sum(_product(p.shape) for p in parameters)
    compiled = run.compile == "on" or (run.compile == "auto" and pays(elements, run.steps))
    best, copied, grain = Placed((), 0), 0, run.granularity
    for rules in windows(strategy, parameters):
        states = [_state(strategy, rules[p.name], p) for p in parameters]
        shared = count.shared_sizes(strategy, [(rules[p.name], p.role, p.shape) for p in parameters])
        best = max(best, placed(parameters, states, shared, run.offload_state), key=lambda one: one.total)
        copies = (n for p in parameters for n in _copies(strategy, rules[p.name], p.role, p.shape, p.dtype))
        copied = max(copied, sum(-(-size // grain) * grain for size in copies))
    rounded = tuple(-(-size // grain) * grain for size in (*best.here, *best.slots))
    stepped = [p for p in parameters if steps == "all" or (steps == "large" and len(p.shape) > 1)]
    found = {p.name: _workspace(strategy, p, compiled, run.device) for p in stepped}
    scratch = {name: one.transient for name, one in found.items()}
    ladder = compiled and run.device == "cpu"
    shapes = _grids({shape for one in found.values() for shape in one.grids}, ladder)
    tally = max((one.rows for one in found.values()), default=0)
    sides = [side for shape in (*shapes, (tally,)) for side in shape if side]
    grids = tuple(-(-4 * side // grain) * grain for side in sides)
    smallest = _smallest(parameters, compiled, run.device) if steps == "all" else ()
    small = _together(strategy, smallest, compiled, run.device)
    beside = tuple(-(-size // grain) * grain for p in parameters if (size := _displaced(strategy, p)))
    return Footprint(
        strategy, best.total, rounded, scratch, compiled, grids, small, copied, best.away, beside
    )


@dataclass(frozen=True)
class Placed:
    """Optimizer state by where it is between steps.

    Args:
        here: size of each tensor on the device; away: bytes on the host; slots: what those travel to.
    """

    here: tuple[int, ...]
    away: int
    slots: tuple[int, ...] = ()

    @property
    def total(self) -> int:
        """Of the state, wherever it is."""
        return sum(self.here) + self.away


def placed(
    parameters: Sequence[Parameter], states: Sequence[Mapping[str, int]], shared: Sequence[int], away: bool
) -> Placed:
    """Where state is: all of it with its parameters, or that of large ones away."""
    here, there = list(shared), [0]
    for p, state in zip(parameters, states, strict=True):
        travels = {key for key in state if away and _product(p.shape) >= LEAST and not key.startswith(SEEN)}
        here += [size for key, size in state.items() if key not in travels]
        there.append(sum(-(-state[key] // ALIGNED) * ALIGNED for key in travels))
    moved = sum(sum(state.values()) for state in states) + sum(shared) - sum(here)
    return Placed(tuple(here), moved, (max(there),) * SLOTS if moved else ())


def _grids(shapes: set[tuple[int, int]], ladder: bool) -> list[tuple[int, int]]:
    """(rows, width) of the grids that an optimizer keeps, from those of steps that were counted."""
    if ladder:  # counted as eager; rows have one length where compiled, and chunks come in few sizes
        shapes = {
            (size // width, width)
            for rows, long in shapes
            for width in (long if rows > 1 else ROW,)
            for _, _, size in compiled_spans(rows * long)
        }
    return sorted(shapes, key=sum)[-GRIDS:]


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _state(strategy: Strategy, rule_name: str, p: Parameter) -> Mapping[str, int]:
    return _sizes(strategy, rule_name, p.role, p.shape, p.dtype, p.shard, p.coded)


@functools.lru_cache(maxsize=4096)
def _sizes(
    strategy: Strategy, rule_name: str, role: str, shape: tuple[int, ...], dtype: torch.dtype,
    shard: Shard | None, coded: bool,
) -> Mapping[str, int]:  # fmt: skip
    held = count.fresh_state(strategy, rule_name, role, shape, dtype, shard, coded)
    return {key: t.untyped_storage().nbytes() for key, t in held.items()}


@functools.lru_cache(maxsize=4096)
def _displaced(strategy: Strategy, p: Parameter) -> int:
    shape = p.shape if p.shard is None else tuple(p.shard.shape)
    return count.displaced_bytes(strategy, tuple(shape), p.dtype, p.role, p.coded)


def _copies(
    strategy: Strategy, rule_name: str, role: str, shape: tuple[int, ...], dtype: torch.dtype
) -> list[int]:
    """Of the state tensors that are not saved as they lie, but filled up or put in order, the sizes."""
    known = forms(strategy, rule_name, role, shape, dtype)
    state = strategy.init(rule_name, torch.empty(shape, dtype=dtype, device="meta"), role)
    pairs = [
        (t.untyped_storage(), known[key].out(t, shape[0]).untyped_storage())
        for key, t in state.items()
        if key in known
    ]
    return [out.nbytes() for held, out in pairs if out._cdata != held._cdata]


def _workspace(strategy: Strategy, p: Parameter, compiled: bool, device: str) -> Workspace:
    if p.shard is not None:
        return _of_rows(strategy, p, p.shard, compiled, device)
    ends = {strategy.rule_name(role, p.shape) for role in ("embedding", "head") if p.role == "head"}
    role = "embedding" if len(ends) == 1 else p.role  # one rule takes one step
    if compiled:
        return _compiled(strategy, p.shape, p.dtype, role, device, p.coded)
    if not strategy.source.needs_autograd and device == "cpu":  # noise is drawn in smaller pieces there
        return _drawn(strategy, p.shape, p.dtype, role)
    return count.workspace(strategy, p.shape, p.dtype, role, True, device, p.coded)


def _of_rows(strategy: Strategy, p: Parameter, shard: Shard, compiled: bool, device: str) -> Workspace:
    """Of a tensor whose rows are spread: of the rows here where a rule goes by elements, else at most.

    A rule that judges matrices is counted on the whole one, whose side and rank it goes by; where it steps
    whole matrices, weight and gradient are gathered, each beside its padded rows.
    """
    name = strategy.rule_name(p.role, p.shape, shard)
    way = strategy.way(name, p.role, shard)
    local = is_pointwise(strategy.rules[name]) and way == "rows"
    shape = tuple(shard.shape) if local else p.shape
    found = _workspace(strategy, replace(p, shape=shape, shard=None), compiled, device)
    if way != "whole":
        return found
    row = shard.width * p.dtype.itemsize
    return replace(found, peak=found.peak + 2 * (shard.ranks + 1) * shard.chunk * row)


@functools.lru_cache(maxsize=4096)
def _drawn(strategy: Strategy, shape: tuple[int, ...], dtype: torch.dtype, role: str) -> Workspace:
    with FakeTensorMode():
        return count.measure_workspace(strategy, shape, dtype, role, True, "cpu")


@functools.lru_cache(maxsize=4096)
def _compiled(
    strategy: Strategy, shape: tuple[int, ...], dtype: torch.dtype, role: str, device: str, coded: bool
) -> Workspace:
    cut = "off" if device == "cpu" else "on"  # pieces are padded in cache there, and stay small either way
    drawn = patch.object(directions, "_kernel", lambda *args: lambda *tensors: None)
    with patch.object(Chunks, "kernel", _fused(Chunks.kernel)), drawn, policy(device):
        return count.measure_workspace(strategy, shape, dtype, role, True, compile=cut, coded=coded)


def _fused(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Kernels that a compiler fuses allocate what they leave each other; the others are what they are."""

    def choose(self: Chunks, rule: Any, *rest: Any) -> Any:
        if rule is not None and not rule.compilable:
            return kernel(self, rule, *rest)

        spills = rule.spills if rule else 0
        return lambda w, g, *others: g.new_empty((spills, *g.shape), dtype=torch.uint8)

    return choose


Sizes = tuple[tuple[tuple[int, ...], torch.dtype, str], ...]


def _smallest(parameters: Sequence[Parameter], compiled: bool, device: str) -> Sizes:
    """Shape, dtype and role of those that step together on a device, the largest as many as fit at once."""
    limit = POLICIES.get(device, POLICIES["cuda"]).together
    alone = [p for p in parameters if not p.coded]  # a block of codes is found by its own scale
    here = [replace(p, shape=tuple(p.shard.shape)) if p.shard else p for p in alone]
    found = sorted((_product(p.shape), p.name, p) for p in here if _product(p.shape) < limit)[::-1]
    total = itertools.accumulate((size for size, _, _ in found), initial=0)
    first = [p for (_, _, p), before in zip(found, total, strict=False) if before <= ELEMENTS[compiled]]
    return tuple((tuple(p.shape), p.dtype, p.role) for p in first[:TENSORS])


@functools.lru_cache(maxsize=256)
def _together(strategy: Strategy, small: Sizes, compiled: bool, device: str) -> int:
    if not small or not strategy.source.needs_autograd:
        return 0
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype, _ in small]
    fused = patch.object(Chunks, "kernel", _fused(Chunks.kernel)) if compiled else nullcontext()
    with fused, policy(device):
        return count.together_bytes(strategy, tensors, [r for _, _, r in small], "on" if compiled else "off")


@dataclass(frozen=True)
class Peak:
    """The binding event and its bytes by category, and every event's total."""

    event: str
    at_peak: Mapping[str, int]
    events: Mapping[str, int]

    @property
    def allocated(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.at_peak.values())


def combine(trace: Trace, held: Footprint, beside: Mapping[str, Moment] = MappingProxyType({})) -> Peak:
    """The peak of a step from the second on, when optimizer state exists.

    Args:
        trace: of the model.
        held: of the strategy.
        beside: what happens between steps, by name.
    """
    found = {**trace.moments, **{name: m for name, m in beside.items() if name != LOAD}}
    displaced = sum(held.displaced)
    more = {SAVE: max(held.copied, displaced), EVALUATION: displaced}  # copies are of checkpoints alone
    moments = {name: _with(m, held, more.get(name, 0)) for name, m in found.items()}
    moments |= {name: m for name, m in beside.items() if name == LOAD}  # no state is there yet
    if STEP in trace.moments:
        moments[STEP] = _with(trace.moments[STEP], held, held.worst)
    scratch = {kind(name): size for name, size in held.scratch.items()}
    steps = [_with(m, held, scratch.get(kind(name), 0)) for name, m in trace.releases.items()]
    if steps:
        moments[RELEASE] = max(steps, key=lambda m: m.total)
    binding = max(moments, key=lambda name: moments[name].total)
    totals = {name: m.total for name, m in moments.items()}
    bound = moments[binding].bytes
    rows = [*CATEGORIES, *(row for row in ROWS if any(row in m.bytes for m in moments.values()))]
    return Peak(binding, {row: bound.get(row, 0) for row in rows}, totals)


def _with(moment: Moment, held: Footprint, scratch: int) -> Moment:
    more = dict(moment.bytes)
    more["optimizer_state"] = more.get("optimizer_state", 0) + held.held
    more["workspace"] = more.get("workspace", 0) + held.kept + scratch
    return Moment(moment.event, more, moment.at)
