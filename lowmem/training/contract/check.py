"""One short run of a strategy on a small model answers what it promises.

counted       planned bytes are held bytes, before the first step and after the last
fixed         keys, shapes and dtypes of the state stay, where no schedule switches
guarded       an element whose gradient is not finite keeps its weight and is counted, all else steps
stopped       a gradient of nothing but NaN moves no weight
resumed       a run that went through a file ends with the same weights and state, to the last bit
released      stepping during the backward pass is the ordinary step
made again    its options make it again
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowmem.memory import count
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.checks import BETAS, EPS
from lowmem.strategies import create, optimizer
from lowmem.strategies.method import AXES, ROLES
from lowmem.strategies.registry import beside
from lowmem.training.contract import zoo

BAD = [float("nan"), float("inf"), float("-inf")]
BAD_AT, NAN_AT = 2, 4


class BrokenError(Exception):
    """A promise that was not kept, in one line."""


@dataclass(frozen=True)
class Finding:
    """What came of one promise.

    Args:
        promise: one word or two; dtype: of the weights.
        problem: what was seen instead, empty where it is kept.
    """

    promise: str
    dtype: str
    problem: str


def check(strategy: Strategy, dtype: torch.dtype = torch.float32, *, steps: int = 7) -> list[Finding]:
    """Ask one strategy for everything that all strategies promise.

    Args:
        strategy: gaps between refreshes should be shorter than `steps`, or none is seen.
        dtype: of the weights.
        steps: of the run; the third gradient has bad elements, the fifth is nothing but NaN.

    Example:
        >>> {finding.problem for finding in check(create("lion"))}
        {''}
    """
    run = _Run(strategy, dtype, steps)
    promises: dict[str, Callable[[], None]] = {
        "made again": run.made_again,
        "counted": run.counted,
        "guarded and stopped": run.guarded,
        "fixed": run.fixed,
        "resumed": run.resumed,
        "released": run.released,
    }
    return [Finding(name, str(dtype).removeprefix("torch."), _problem(ask)) for name, ask in promises.items()]


def _problem(ask: Callable[[], None]) -> str:
    try:
        ask()
    except BrokenError as broken:
        return str(broken)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ""


class _Run:
    """One run, made when it is first asked for, and what was kept of it on the way."""

    def __init__(self, strategy: Strategy, dtype: torch.dtype, steps: int) -> None:
        self.strategy, self.dtype, self.steps = strategy, dtype, steps
        self.model, self.optimizer = self.fresh()
        self.optimizer.init_state()
        self.first = forms(self.optimizer)
        self.saved: tuple[bytes, bytes] | None = None
        self.problems: list[str] = []

    def fresh(self, seed: int = 0, lr: float = 1e-2) -> tuple[zoo.Zoo, LowMemOptimizer]:
        """Model and optimizer; numbers that no rule reads are left alone."""
        model = zoo.build(self.dtype, seed=seed)
        uses = {number for rule in self.strategy.rules.values() for number in rule.uses}
        betas = (0.9, 0.99) if "betas" in uses else BETAS
        eps = 1e-8 if "eps" in uses else EPS
        return model, optimizer(model, self.strategy, lr=lr, betas=betas, eps=eps, weight_decay=0.01)

    def made_again(self) -> None:
        """Its name and options make an equal strategy."""
        if self.strategy.name and create(self.strategy.name, **self.strategy.options) != self.strategy:
            raise BrokenError("create(name, **options) is another strategy")

    def counted(self) -> None:
        """Before the first step."""
        self._count(0, "before the first step")

    def _count(self, step: int, when: str) -> None:
        decided = self.optimizer.param_groups[0]["decided"]
        planned = count.model_state_bytes(self.strategy, self.model, step=step, decided=decided)
        if planned != (held := self.optimizer.state_bytes()):
            raise BrokenError(f"{when} {held} bytes are held, {planned} were planned")

    def guarded(self) -> None:
        """The run itself, bad gradients included."""
        for step in range(self.steps):
            if step == self.steps - 2:
                self.saved = to_file(self.model.state_dict()), to_file(self.optimizer.state_dict())
            self.problems += list(advance(self.strategy, self.optimizer, self.model, step))
        if self.problems:
            raise BrokenError(self.problems[0])

    def fixed(self) -> None:
        """After the last step."""
        self._count(self.steps - 1, "after the last step")
        switched = any(self.strategy.schedule.switches(step) for step in range(1, self.steps))
        if not switched and forms(self.optimizer) != self.first:
            raise BrokenError("keys, shapes or dtypes of the state have changed")

    def resumed(self) -> None:
        """A fresh process's view: other weights, another lr, then the file."""
        if self.saved is None:
            raise BrokenError("the run did not come to its checkpoint")
        model, second = self.fresh(seed=99, lr=0.5)
        model.load_state_dict(from_file(self.saved[0]))
        second.load_state_dict(from_file(self.saved[1]))
        for step in range(self.steps - 2, self.steps):
            list(advance(self.strategy, second, model, step))
        self._same(model, second, "after a resume")

    def released(self) -> None:
        """Only where there are gradients, and each may be stepped at once."""
        if not self.strategy.source.needs_autograd or self.strategy.waits:
            return
        from lowmem.optim.release import release

        model, whole = self.fresh()
        other, second = self.fresh()
        handle = release(second)
        for step in range(3):
            whole.backward(lambda step=step: zoo.loss_of(model, step), model)  # type: ignore[misc]
            second.backward(lambda step=step: zoo.loss_of(other, step), other)  # type: ignore[misc]
            for one in (whole, second):
                one.step()
                one.zero_grad()
        handle.remove()
        if not same(zoo.weights(model), zoo.weights(other)):
            raise BrokenError("under release the weights are others")

    def _same(self, model: zoo.Zoo, second: LowMemOptimizer, when: str) -> None:
        if not same(zoo.weights(model), zoo.weights(self.model)):
            raise BrokenError(f"{when} the weights are others")
        if not same(state_of(second), state_of(self.optimizer)):
            raise BrokenError(f"{when} the state is another")


def advance(strategy: Strategy, optimizer: LowMemOptimizer, model: zoo.Zoo, step: int) -> Iterator[str]:
    """One step of the run; yields what was wrong with it."""
    if not strategy.source.needs_autograd:
        optimizer.backward(lambda: zoo.loss_of(model, step), model)
        optimizer.step()
        optimizer.zero_grad()
        return
    before, counted = zoo.weights(model), optimizer.nonfinite() + seen(optimizer, model)
    bad = feed(model, step)
    decay = [group["weight_decay"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0 if step == BAD_AT else group["weight_decay"]
    tell(optimizer, lambda: model(zoo.batch(step)[0]))
    optimizer.step()
    optimizer.zero_grad()
    for group, value in zip(optimizer.param_groups, decay, strict=True):
        group["weight_decay"] = value
    if step == BAD_AT:
        yield from _guarded(optimizer, model, before, bad, counted)
    elif step == NAN_AT and not same(zoo.weights(model), before):
        yield "a gradient of nothing but NaN moved a weight"
    if not all_finite(optimizer, model):
        yield f"after step {step} a weight or state is not finite"


def tell(optimizer: LowMemOptimizer, logits: Callable[[], Tensor]) -> None:
    """What rules ask for beside gradients: a loss, and a probe of the curvature where one is due."""
    optimizer.add_loss(torch.ones(()))
    if optimizer.probe_due:
        optimizer.probe(logits())


def _guarded(
    optimizer: LowMemOptimizer,
    model: zoo.Zoo,
    before: dict[str, Tensor],
    bad: dict[str, Tensor],
    counted: int,
) -> Iterator[str]:
    for name, p in model.named_parameters():
        if not torch.equal(p.detach()[bad[name]], before[name][bad[name]]):
            yield f"{name}: an element whose gradient is not finite was stepped"
    if optimizer.nonfinite() < counted:
        yield "elements whose gradient is not finite were not all counted"


def feed(model: zoo.Zoo, step: int) -> dict[str, Tensor]:
    """Random gradients, with one bad element each or nothing but NaN when it is their turn; returns where."""
    where = spoiled(model, 77 + step, bad=step == BAD_AT)
    for p in model.parameters() if step == NAN_AT else ():
        p.grad = torch.full_like(p, torch.nan)
    return where


def spoiled(model: zoo.Zoo, seed: int, *, bad: bool = True) -> dict[str, Tensor]:
    """Random gradients, with one `bad` element each, NaN and infinities in turn; returns where."""
    g = torch.Generator().manual_seed(seed)
    where = {}
    for i, (name, p) in enumerate(model.named_parameters()):
        p.grad = torch.randn(p.shape, generator=g).to(p.dtype)
        where[name] = torch.zeros(p.shape, dtype=torch.bool)
        where[name].view(-1)[p.numel() // 2] = True
        if bad:
            p.grad[where[name]] = BAD[i % len(BAD)]
    return where


def small(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options for a small model: what is given, and sizes and gaps turned down where they are not."""
    options = beside(method, **{key: value for key, value in given.items() if key in (*AXES, *ROLES)})
    turned = {key: o.limits.small for key, o in options.items() if o.limits.small is not None}
    return {**turned, **given}


def seen(optimizer: LowMemOptimizer, model: zoo.Zoo) -> int:
    """Tensors of which every element is looked at; a projection that drops coordinates leaves some out."""
    rules: list[Any] = [
        optimizer.strategy.rules[optimizer.rule_name(p)]
        for name, p in model.named_parameters()
        if name in stepping(optimizer, model)
    ]
    return sum(not hasattr(rule, "projector") or rule.residual.reads_rest for rule in rules)


def stepping(optimizer: LowMemOptimizer, model: nn.Module) -> set[str]:
    """Names of the tensors that take part in the next step: a schedule may let others rest."""
    return {name for name, p in model.named_parameters() if not optimizer.resting(p)}


def all_finite(optimizer: LowMemOptimizer, model: zoo.Zoo) -> bool:
    """Whether no weight and no state holds NaN or an infinity."""
    floating = [v for s in state_of(optimizer).values() for v in s.values() if v.is_floating_point()]
    return all(bool(torch.isfinite(v).all()) for v in [*floating, *model.parameters()])


def state_of(optimizer: LowMemOptimizer) -> dict[int, dict[str, Tensor]]:
    """The state tensors, by the position of their parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: dict(optimizer.state[p]) for i, p in enumerate(params) if p in optimizer.state}


def forms(optimizer: LowMemOptimizer) -> dict[int, dict[str, Any]]:
    """Dtypes and shapes of the state."""
    return {i: {k: (v.dtype, v.shape) for k, v in s.items()} for i, s in state_of(optimizer).items()}


def same(a: Any, b: Any) -> bool:
    """Equal to the last bit, dtypes and shapes included; NaN equals NaN."""
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return torch.equal(a, b) or (
            a.is_floating_point() and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def to_file(payload: Any) -> bytes:
    """As torch.save writes it."""
    buffer = io.BytesIO()
    torch.save(payload, buffer)
    return buffer.getvalue()


def from_file(data: bytes) -> Any:
    """As torch.load reads it, data alone."""
    return torch.load(io.BytesIO(data), weights_only=True)
