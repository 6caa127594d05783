"""Gradient release: each tensor is stepped inside backward, as soon as its gradient is there.

The gradient is freed at once, so that one gradient lives instead of all of them.
It is the ordinary optimizer that steps: the same `step_param`, the same state,
the same checkpoint; `step()` finds no gradients and moves the clock. Without
clipping the result is the ordinary one, bit for bit.

Over several micro-batches a subspace strategy that drops its residual needs the
projected gradient only, so that is what is summed, r long numbers instead of
m n. A tensor whose basis is refreshed in this window keeps its whole gradient to
the end, and so does one that is not projected: the step is the ordinary one. Whether
a first basis is still missing is read from the device, at steps 1, 2, 4, 8, ... alone.

The norm of all gradients is not known when the first tensor steps. Clipping is
therefore by each tensor's own norm ("tensor") or by the norm of the step before
("previous", kept in the checkpoint); the first step is then not clipped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import Blocks, Dense, Projected
from lowmem.optim.contract import AnyRule, Rule
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.shards import Shard, local
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.marks import awake, trains

CLIP = ("none", "tensor", "previous")


@dataclass
class Release:
    """A handle on the hooks of gradient release; make it with `release`.

    Args:
        optimizer: what steps.
        clip: none, tensor or previous; max_norm: of the gradient.
        sync: whether the running micro-batch is the last of its window; set it before each one.
        projected: whether the norm of the last backward pass is, of some tensors, that of their projection.
    """

    optimizer: LowMemOptimizer
    clip: str
    max_norm: float
    sync: bool = True
    projected: bool = False
    _square: dict[torch.device, Tensor] = field(default_factory=dict)
    _previous: dict[torch.device, Tensor] = field(default_factory=dict)
    _low: dict[nn.Parameter, Tensor] = field(default_factory=dict)
    _stepped: set[nn.Parameter] = field(default_factory=set)
    _handles: list[Any] = field(default_factory=list)
    _shard: Shard | None = None

    def attach(self) -> None:
        """Hook every trainable parameter."""
        for _, p in self.optimizer.named_parameters():
            if trains(p):
                self._shard = self._shard or self.optimizer.place(p).shard
                with awake(p):
                    hook = p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
                self._handles.append(hook)
        self._on_load()
        self._handles.append(self.optimizer.register_load_state_dict_post_hook(self._on_load))
        self._handles.append(self.optimizer.register_step_post_hook(self._on_step))
        self._handles.append(self.optimizer.register_state_dict_pre_hook(self._on_save))
        self.optimizer.released = True

    def remove(self) -> None:
        """Take the hooks off; the optimizer is an ordinary one again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._low.clear()
        self._stepped.clear()
        self.optimizer.released = False

    def grad_norm(self) -> float:
        """Norm of the gradients of the last backward pass, before clipping. Reads from the device.

        A Trainer asks between backward and `step()`, on all ranks. Where only the projection of a
        gradient was kept, its norm stands for the gradient's: see `projected`.
        """
        squares = [float(square) for square in self._summed().values()]
        squares = squares or [float(norm) ** 2 for norm in self._previous.values()]
        return float(sum(squares) ** 0.5)

    @torch.no_grad()
    def _on_gradient(self, p: nn.Parameter) -> None:
        if p.grad is None:
            return
        if self.optimizer.resting(p):
            p.grad = None
            return
        if (not self.sync or p in self._low) and projecting(self.optimizer, p):
            self._accumulate(p, p.grad, self.optimizer.strategy.rules[self.optimizer.rule_name(p)])
            p.grad = None
        if not self.sync:
            return
        gradient = self._gradient(p)
        if gradient is not None:
            self._once(p)
            self.optimizer.step_param(p, gradient)
            p.grad = None

    def _once(self, p: nn.Parameter) -> None:
        """Refuse a part of a gradient that comes after the tensor was stepped by another part of it."""
        if p in self._stepped:
            raise UserError(
                f"gradient release: {self.optimizer.place(p).name!r} was stepped and gets another gradient "
                f"before step(); give accumulation_steps, and set `sync` to False for all but the last "
                f"backward pass of a step; where a layer runs twice, checkpoint it with use_reentrant=False"
            )
        self._stepped.add(p)

    def _accumulate(self, p: nn.Parameter, g: Tensor, rule: AnyRule) -> None:
        state = self.optimizer.ready(p)[0].parts[0].state
        low = cast("Rule", rule).project(Dense(g), state, self.optimizer.hyper(p))
        if p in self._low:
            self._low[p].add_(low)
        else:
            self._low[p] = low

    def _gradient(self, p: nn.Parameter) -> Blocks | None:
        if p in self._low:
            low = self._low.pop(p)
            self.projected = True
            factor = self._measure(low)
            like = Dense(p.detach())
            return Projected(like.shape, low if factor is None else low.mul_(factor), like.dtype)
        return None if p.grad is None else Dense(p.grad, self._measure(p.grad))

    def _measure(self, g: Tensor) -> Tensor | None:
        """Add a gradient's norm, or that of the rows here, to the step's, and give its clip factor."""
        norm = torch.linalg.vector_norm(local(g), dtype=torch.float32)
        total = self._square.setdefault(g.device, torch.zeros((), device=g.device))
        total.add_(norm.square())
        if self.clip == "none":
            return None
        if self.clip == "tensor" and self._shard is not None:
            norm = self._shard.total(norm.square()).sqrt()
        seen = norm if self.clip == "tensor" else self._previous.get(g.device)
        if seen is None:
            return None
        factor = (self.max_norm / (seen + 1e-6)).clamp(max=1.0)
        # a norm that is not finite clips nothing: the elements that made it so are not stepped
        return torch.where(torch.isfinite(seen), factor, 1.0)

    def _summed(self) -> dict[torch.device, Tensor]:
        """Squares of all gradients so far; of all ranks, which ask together."""
        shard = self._shard
        return {d: square if shard is None else shard.total(square) for d, square in self._square.items()}

    def _on_step(self, *_: Any) -> None:
        for device, square in self._summed().items():
            self._previous[device] = square.sqrt()
        self._square.clear()
        self._stepped.clear()
        self.projected = False

    def _on_load(self, *_: Any) -> None:
        """Go by the norm that the groups know, and by nothing of a step that is not there any more."""
        known = float(self.optimizer.param_groups[0]["previous_norm"])
        devices = {p.device for _, p in self.optimizer.named_parameters() if trains(p)}
        self._previous = {d: torch.tensor(known, device=d) for d in devices if known >= 0.0}
        self._square.clear()
        self._low.clear()
        self._stepped.clear()

    def _on_save(self, *_: Any) -> None:
        if self._previous:
            self.optimizer.param_groups[0]["previous_norm"] = self.grad_norm()


def projecting(optimizer: LowMemOptimizer, p: nn.Parameter) -> bool:
    """Whether the projected gradient of a tensor suffices for its next step."""
    rule, watched = optimizer.strategy.rules[optimizer.rule_name(p)], optimizer.strategy.schedule.observes
    if optimizer.place(p).shard is not None or watched or not rule.keeps_sum or not optimizer.state.get(p):
        return False  # of sharded gradients little is held
    # of a stack, some matrices may be refreshed and others not
    whole = len(optimizer.ready(p)[0].parts) == 1
    return whole and not rule.whole(optimizer.ready(p)[0].parts[0].state, optimizer.hyper(p))


def release(
    optimizer: LowMemOptimizer, *, accumulation_steps: int = 1, clip: str = "none", max_norm: float = 0.0
) -> Release:
    """Step each tensor inside backward and free its gradient at once.

    Args:
        optimizer: of a strategy that backpropagates.
        accumulation_steps: micro-batches in a step; set `sync` before each.
        clip: none, tensor (each by its own norm) or previous (all by the norm of the step before).
        max_norm: of the gradient; above 0 where there is clipping.

    Raises:
        UserError: a strategy or a combination that cannot be released, with the remedy.

    Example:
        >>> import lowmem
        >>> model = nn.Linear(4, 4)
        >>> handle = release(lowmem.optimizer(model, "adamw", lr=0.1))
        >>> model(torch.ones(1, 4)).sum().backward()
        >>> model.weight.grad is None
        True
    """
    problems = [problem for problem in _problems(optimizer, accumulation_steps, clip, max_norm) if problem]
    if problems:
        raise UserError("; ".join(problems))
    handle = Release(optimizer, clip, max_norm)
    handle.attach()
    return handle


def _problems(optimizer: LowMemOptimizer, steps: int, clip: str, max_norm: float) -> list[str]:
    strategy = optimizer.strategy
    found = []
    if not strategy.source.needs_autograd:
        found.append(f"gradient release: {strategy.name} makes no gradients; leave it out")
    if strategy.waits:
        found.append(f"gradient release: {strategy.name} {strategy.waits}; leave it out")
    if clip not in CLIP:
        found.append(f"gradient release: unknown clip {clip!r}; {nearest(clip, CLIP)}")
    if (clip == "none") != (max_norm == 0.0):
        found.append(
            f"gradient release: clip={clip!r} with max_norm={max_norm}; "
            f"take clip='tensor' or 'previous' with max_norm > 0, or clip='none' with max_norm=0"
        )
    if steps > 1 and strategy.source.needs_autograd:
        found.append(accumulation_problem(strategy))
    return found


def accumulation_problem(strategy: Strategy) -> str:
    """Why gradients cannot be released while they accumulate, or an empty string."""
    rule, name = strategy.rules["matrix"], strategy.name
    if rule.period == 1:
        return f"gradient release with accumulation: {name} refreshes at every step; take update_proj_gap > 1"
    if rule.keeps_sum and not strategy.schedule.observes:
        return ""
    remedy = "take accumulation 1, no gradient release, or galore"
    return f"gradient release with accumulation: {name} needs the whole gradient of a window; {remedy}"
