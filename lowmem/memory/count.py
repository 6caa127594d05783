"""What the optimizer takes, counted by running its own code on the meta device.

There is no table of formulas here. The bytes of state are those of the tensors
that `init` makes; the workspace of a step is what lives, at most, while
`step_param` runs. Both run on `meta`, where tensors have sizes but no memory,
so plan and reality cannot drift apart. What a kernel allocates inside itself
(the scratch of a QR) does not show; compiled kernels need less than the eager
ones that are counted.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.memory.trace.tracker import Tracker, storages
from lowmem.optim.blocks import Blocks
from lowmem.optim.engine.cutting import policy
from lowmem.optim.evaluated import displacements
from lowmem.optim.int8.tensor import Int8Weight, is_coded
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.schedules.schedule import Always
from lowmem.optim.shards import Shard
from lowmem.optim.source import Query
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors import roles
from lowmem.optim.tensors.marks import has_turns
from lowmem.optim.tensors.seats import fresh
from lowmem.optim.terms.hyper import stagger
from lowmem.optim.terms.state import State

Shape = tuple[int, ...]
FAR = 1_000_003
"""A step at which no schedule has just begun (prime, so it is no multiple of a gap)."""


def _bytes(tensors: Iterable[Tensor]) -> int:
    found = {s._cdata: s.nbytes() for t in tensors for s in storages(t)}
    return sum(found.values())


def state_bytes(
    strategy: Strategy,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    role: str = "matrix",
    *,
    ranks: int = 1,
    rank: int = 0,
    coded: bool = False,
) -> int:
    """Bytes of optimizer state held for one weight, exactly; constants shared by all weights not included.

    Args:
        strategy: from `create`.
        shape: of the weight; dtype: of the weight.
        role: what the weight is (`lowmem.optim.tensors.roles.ROLES`), or "other".
        ranks: processes over which FSDP2 spreads its rows; rank: the one that is asked for (rank 0 has most).
        coded: the weight is held as int8 codes.

    Raises:
        UserError: a rank that is none of so many.

    Example:
        >>> from lowmem import create
        >>> state_bytes(create("adamw"), (3, 5)), state_bytes(create("adamw"), (3, 5), ranks=2)
        (124, 84)
    """
    shard = _shard(shape, ranks, rank)
    return _held_bytes(strategy, strategy.rule_name(role, shape, shard), role, shape, dtype, shard, coded)


def _shard(shape: Shape, ranks: int, rank: int) -> Shard | None:
    """The rows of a tensor that a rank holds; None where there is one rank, or no rows."""
    if not 0 <= rank < ranks:
        raise UserError(f"ranks is at least 1 and rank one of 0 to ranks - 1, got ranks={ranks}, rank={rank}")
    return Shard.of(shape, ranks, rank) if ranks > 1 and shape else None


def _held_bytes(
    strategy: Strategy, rule_name: str, role: str, shape: Shape, dtype: torch.dtype, shard: Shard | None,
    coded: bool = False,
) -> int:  # fmt: skip
    return _bytes(fresh_state(strategy, rule_name, role, shape, dtype, shard, coded).values())


def fresh_state(
    strategy: Strategy, rule_name: str, role: str, shape: Shape, dtype: torch.dtype, shard: Shard | None,
    coded: bool = False,
) -> State:  # fmt: skip
    """The state of one weight, without memory.

    Args:
        strategy, role, shape, dtype: as for `state_bytes`; rule_name: that it follows.
        shard: the rows of it that are held; None where that is all.
        coded: the weight is held as int8 codes.
    """
    device = torch.device("meta")
    strategy = strategy.sided(shard is not None)
    if shard is not None:
        return fresh(strategy, rule_name, role, shard, dtype, device)
    return strategy.init(rule_name, like(shape, dtype, device, coded), role)


def like(shape: Shape, dtype: torch.dtype, device: torch.device | str, coded: bool) -> Tensor:
    """A weight of this shape, or int8 codes of one."""
    if coded:
        return Int8Weight.empty(shape, dtype, device)
    return torch.empty(shape, dtype=dtype, device=device)


def shared_sizes(strategy: Strategy, used: Iterable[tuple[str, str, Shape]]) -> list[int]:
    """Bytes of each constant that an optimizer holds once for all tensors.

    Args:
        strategy: from `create`; used: name of the rule, role and shape of each tensor.
    """
    device, found = torch.device("meta"), {}
    for rule_name, role, shape in sorted(set(used)):
        found.update({c.name: c for c in strategy.constants(rule_name, shape, role).values()})
    return [constant.make(device).untyped_storage().nbytes() for constant in found.values()]


def model_state_bytes(
    strategy: Strategy,
    model: nn.Module,
    *,
    step: int = 0,
    seed: int = 0,
    decided: str = "",
    ranks: int = 1,
    rank: int = 0,
) -> int:
    """Bytes of optimizer state for the trainable parameters of a model, constants included.

    Args:
        strategy: from `create`; model: on any device, meta too, not sharded.
        step: for schedules that change which tensors hold state; seed: of the run.
        decided: of the optimizer's groups, for schedules that go by gradients.
        ranks, rank: as for `state_bytes`.
    """
    strategy, found = strategy.sided(ranks > 1), roles.find(model)
    trained = {name: p for name, p in model.named_parameters() if has_turns(p)}
    shards = {name: _shard(tuple(p.shape), ranks, rank) for name, p in trained.items()}
    ordinary = {
        name: strategy.rule_name(found.get(name, "matrix"), p.shape, shards[name])
        for name, p in trained.items()
    }
    cache: dict[tuple[str, str, Shape, torch.dtype, bool], int] = {}
    total, rules = 0, strategy.rules_at(ordinary, step, seed, decided)
    for name, p in trained.items():
        role = found.get(name, "matrix")
        key = (rules[name], role, tuple(p.shape), p.dtype, is_coded(p))
        if key not in cache:
            cache[key] = _held_bytes(strategy, *key[:4], shards[name], key[4])
        total += cache[key]
    return total + sum(shared_sizes(strategy, [key[:3] for key in cache]))


def workspace_bytes(
    strategy: Strategy,
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    role: str = "matrix",
    refresh: bool = False,
    device: str = "cpu",
) -> int:
    """Bytes that live, at most, beside weight, gradient and state while one tensor is stepped (eager).

    Args:
        strategy, shape, dtype, role: as for `state_bytes`.
        refresh: at a step where the basis is found anew; False for an ordinary step.
        device: type of the device whose policy of sizes counts.

    Example:
        >>> from lowmem import create
        >>> workspace_bytes(create("galore"), (1024, 4096)) <= (64 << 20) + 4 * 128 * 4096
        True
    """
    return workspace(strategy, shape, dtype, role, refresh, device).peak


@functools.lru_cache(maxsize=4096)
def _workspace(
    strategy: Strategy, shape: Shape, dtype: torch.dtype, role: str, refresh: bool, device: str, coded: bool
) -> Workspace:
    with policy(device):
        return measure_workspace(strategy, shape, dtype, role, refresh, coded=coded)


@dataclass(frozen=True)
class Workspace:
    """What the step of one tensor allocates.

    Args:
        peak: bytes that live at most beside weight, gradient and state.
        grids: (rows, width) of the index grids among them: they are kept for the next step.
        rows: in which a card counts what it skips: kept as well, in a tensor that all parameters share.
    """

    peak: int
    grids: frozenset[tuple[int, int]]
    rows: int = 0

    @property
    def transient(self) -> int:
        """Bytes that are gone after the step."""
        return self.peak - sum(4 * (rows + width) for rows, width in self.grids) - 4 * self.rows


def workspace(
    strategy: Strategy, shape: Shape, dtype: torch.dtype, role: str, refresh: bool = True,
    device: str = "cpu", coded: bool = False,
) -> Workspace:  # fmt: skip
    """What a step allocates, and keeps; arguments as `workspace_bytes`."""
    return _workspace(strategy, shape, dtype, role, refresh, device, coded)


def measure_workspace(
    strategy: Strategy, shape: Shape, dtype: torch.dtype, role: str, refresh: bool, device: str = "meta",
    compile: str = "off", coded: bool = False,
) -> Workspace:  # fmt: skip
    """`workspace` of any strategy by the policy that is named, not remembered.

    Args:
        device: where it runs, "cpu" under a fake-tensor mode; compile: whether pieces are compiled ones.
        coded: the weight is held as int8 codes.
    """
    strategy = replace(strategy, schedule=Always())  # while the tensor is active
    if strategy.slices(strategy.rule_name(role, shape), role, shape):
        shape = shape[1:]  # one matrix of the stack after the other
    p = nn.Parameter(like(shape, dtype, device, coded))
    gradient = _gradient(strategy, p)
    optimizer = LowMemOptimizer([{"params": [("w", p)], "role": role}], strategy, compile=compile)
    optimizer.init_state()
    group, held = optimizer.place(p).group, optimizer.state[p]
    group["step"] = 0 if refresh else between(strategy.rules[optimizer.rule_name(p)].period)
    tracker = Tracker()
    tracker.register([p, *held.values(), *([gradient] if isinstance(gradient, Tensor) else [])], "weights")
    tracker.register(optimizer.constants(p).values(), "weights")
    before = tracker.live
    with tracker:
        tracker.enter("step", "workspace")
        optimizer.hear([(p, gradient)])
        optimizer.step_param(p, gradient)
    peak = tracker.peak().total - before
    tracker.stop()
    return Workspace(max(0, peak), frozenset(optimizer.chunks.grids), optimizer.chunks.skipped.rows)


def together_bytes(strategy: Strategy, tensors: Sequence[Tensor], roles: Sequence[str], compile: str) -> int:
    """Bytes that live, at most, while a step takes small tensors, all at once, by the policy that is named.

    Args:
        tensors: like the parameters, on meta; roles: of each; compile: as in `measure_workspace`.
    """
    strategy = replace(strategy, schedule=Always())  # all of them active; made-up names are in no layer
    params = [nn.Parameter(torch.empty_like(x, device="meta")) for x in tensors]
    groups = [
        {"params": [(f"w{i}", p) for i, p in enumerate(params) if roles[i] == role], "role": role}
        for role in sorted(set(roles))
    ]
    optimizer = LowMemOptimizer(groups, strategy, lr=0.0, compile=compile)  # nobody is there to be told
    optimizer.init_state()
    for group in optimizer.param_groups:
        group["step"] = FAR
    for p in params:
        p.grad = torch.empty_like(p)
    tracker = Tracker()
    held = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
    tracker.register([*held, *optimizer._constants.values()], "weights")
    before = tracker.live
    with tracker:
        tracker.enter("step", "workspace")
        optimizer.step()
    peak = tracker.peak().total - before
    tracker.stop()
    return max(0, peak)


@functools.lru_cache(maxsize=4096)
def displaced_bytes(
    strategy: Strategy, shape: Shape, dtype: torch.dtype, role: str, coded: bool = False
) -> int:
    """Bytes that an evaluation keeps of a weight it displaces; arguments as `measure_workspace`."""
    strategy = replace(strategy, schedule=Always())
    p = nn.Parameter(like(shape, dtype, "meta", coded))
    optimizer = LowMemOptimizer([{"params": [("w", p)], "role": role}], strategy)
    optimizer.init_state()
    return _bytes([w.clone() for w, _, _ in displacements(optimizer)])


def _gradient(strategy: Strategy, p: nn.Parameter) -> Tensor | Blocks:
    """What the source would hand over for one parameter: a tensor, or something to be drawn."""
    source = strategy.source
    if source.needs_autograd:
        return torch.empty_like(p)
    zero = torch.zeros((), device=p.device)
    probe = [("w", nn.Parameter(torch.empty(1, dtype=p.dtype, device=p.device)))]
    _, evidence = source.backward(probe, lambda: zero, model=None, query=Query(0, 0))
    return next(g for _, g in source.gradients([("w", p)], [evidence]))


def between(gap: int) -> int:
    """A step on which the tensor "w" is not refreshed, where there is one."""
    offset = stagger("w", gap) if gap else 0
    return next((step for step in range(FAR, FAR + 2) if gap and (step + offset) % gap), FAR)
