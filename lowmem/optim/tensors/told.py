"""An optimizer that is told more than gradients, where its rules ask for it.

    loss        step(closure) and backward(loss_fn) know it; a loop of its own says add_loss(loss)
    curvature   at every k-th step a loop says probe(logits) before step()
    sums        over all tensors, before the first one steps: found here

Labels of a probe are drawn from the model's own distribution by the run's seed, the step and
their place, never by the global generator: a resumed run draws the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.engine import noise
from lowmem.optim.source import Query
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.saved import Resumable
from lowmem.optim.terms.asks import Asks
from lowmem.optim.terms.overall import Overall
from lowmem.optim.terms.state import State, scoped

Pairs = Iterable[tuple[Any, Tensor | Blocks]]
ROWS = 256
"""Distributions from which labels are drawn at a time."""


class Informed(Resumable):
    """What an optimizer is told; mixed into the one that steps."""

    strategy: Strategy
    roster: Any
    _loss: Tensor | None = None
    _overall: Overall | None = None
    _probed: int = -1

    def add_loss(self, loss: Tensor | None) -> None:
        """Tell the loss of a micro-batch; those of a step are summed, as its gradients are.

        Args:
            loss: scalar, the mean over ranks where there are several; None for nothing new.
        """
        if loss is not None and self.strategy.asks_loss:
            value = loss.detach().double()
            self._loss = value if self._loss is None else self._loss.to(value.device) + value

    def query(self: Any, index: int) -> Query:
        """The name of the index-th evaluation of the loss since the last step."""
        group, held = self.param_groups[0], dict[str, State]()
        if self.strategy.source.holds:
            self.init_state()
            held = {name: scoped(self.state[p], "source") for name, p in self.named_parameters()}
        return Query(group["seed"], group["step"], index, self.chunks.compile, held)

    @property
    def probe_due(self) -> bool:
        """Whether the next step asks for a probe that it has not had: call `probe` before it."""
        step, every = self.param_groups[0]["step"], self.strategy.probes
        return bool(every) and step % every == 0 and self._probed != step

    def probe(self, logits: Tensor, counted: Tensor | None = None) -> None:
        """Sense the curvature: differentiate the loss of labels that are drawn from the logits.

        Gradients that are there already stay as they are; those of the probe are taken in and dropped.

        Args:
            logits: of a forward pass of its own, (..., classes), with its graph.
            counted: bool, (...), which of them have a label; all, if None.

        Raises:
            UserError: a strategy that asks for no probe, or nothing to draw a label for.

        Example:
            >>> import lowmem
            >>> model = torch.nn.Linear(4, 3)
            >>> optimizer = lowmem.optimizer(model, "sophia", lr=1e-4)
            >>> if optimizer.probe_due:
            ...     optimizer.probe(model(torch.ones(2, 4)))
            >>> optimizer.probe_due
            False
        """
        if not self.strategy.probes:
            raise UserError(f"{self.strategy.name} asks for no probe of the curvature; leave it out")
        chosen = logits.reshape(-1, logits.shape[-1]) if counted is None else logits[counted]
        if not len(chosen):
            raise UserError("a probe needs a place that counts; give it a batch with labels")
        group, before = self.param_groups[0], {p: p.grad for p in self.roster.places}
        for p in before:
            p.grad = None
        labels = drawn(chosen.detach(), (group["seed"], group["step"]))
        with torch.enable_grad():
            F.cross_entropy(chosen.float(), labels).backward()  # type: ignore[no-untyped-call]
        count = torch.tensor(float(len(chosen)), dtype=torch.float64, device=chosen.device)
        with self._at_work():  # type: ignore[attr-defined]
            for p, kept in before.items():
                self._sense(p, count)
                p.grad = kept
        self._probed = group["step"]

    def _sense(self: Any, p: Any, count: Tensor) -> None:
        """Let the rule of a parameter take in the gradient that it has."""
        if p.grad is None or not p.numel() or self.resting(p):
            return
        seat, fresh = self.ready(p)
        for part in seat.parts:
            if part.rule.probes:
                g, hp = part.seen(p, Dense(p.grad)), self.hyper(p, part, fresh)
                part.rule.sense_(g, part.state, hp, count.to(p.device))

    def _heard(self: Any, pairs: Pairs) -> Pairs:
        """The same gradients, once all is known that rules ask for."""
        strategy, moves = self.strategy, any(float(group["lr"]) for group in self.param_groups)
        self._overall = None
        if moves and strategy.asks_loss and self._loss is None:
            raise UserError(
                f"{strategy.name} goes by the value of the loss: call step(closure), or "
                "add_loss(loss) after loss.backward()"
            )
        if moves and self.probe_due:
            raise UserError(
                f"{strategy.name} asks for a probe of the curvature every {strategy.probes} steps: call "
                "probe(logits) before step() wherever probe_due says so"
            )
        known: Pairs = self.hear(pairs)
        return known

    def hear(self, pairs: Pairs) -> Pairs:
        """The same gradients, once the sums over all tensors are known that rules ask for."""
        if not any(rule.joint for rule in self.strategy.rules.values()):
            return pairs
        if self.roster.spread:
            raise UserError(
                f"{self.strategy.name} sums over all tensors, which does not work for sharded ones yet; take "
                "ldog or another method, or whole weights"
            )
        found = list(pairs)
        self._overall = self._summed(found)
        return found

    def _summed(self: Any, pairs: list[tuple[Any, Tensor | Blocks]]) -> Overall:
        """Sums over tensors, in the order of their names; and the numbers that they share."""
        terms: dict[str, list[Tensor]] = {}
        shared: dict[str, list[Tensor]] = {}
        each: dict[str, Tensor] = {}
        for p, g in sorted(pairs, key=lambda pair: self.place(pair[0]).name):
            rule: Asks = self.strategy.rules[self.rule_name(p)]
            if not rule.joint or not p.numel() or self.resting(p):
                continue
            blocks, (seat, fresh) = Dense(g) if isinstance(g, Tensor) else g, self.ready(p)
            for part in seat.parts:
                found = rule.terms(part.seen(p, blocks), part.state, self.hyper(p, part, fresh))
                name, held = type(rule).__name__, torch.stack([part.state[key] for key in rule.joint])
                each[part.name], home = found, terms[name][0].device if name in terms else p.device
                terms.setdefault(name, []).append(torch.where(found.isfinite().all(), found, 0.0).to(home))
                shared.setdefault(name, []).append(held.to(home))
        sums = {name: torch.stack(found).sum(0) for name, found in terms.items()}
        latest = {name: _latest(torch.stack(copies)) for name, copies in shared.items()}
        return Overall(sums, latest, each, self._loss)


def _latest(copies: Tensor) -> Tensor:
    """The row whose first number is largest."""
    return copies.index_select(0, copies[:, 0].argmax().view(1))[0]


def drawn(logits: Tensor, name: tuple[int, int]) -> Tensor:
    """A label for each row, from its distribution: where a random number falls among the sums of chances.

    Args:
        logits: (n, classes); name: what the numbers are drawn by, seed and step.
    """
    (key,) = noise.key_tensor([(*name, "curvature", "labels")], logits.device)
    labels = []
    for start in range(0, len(logits), ROWS):
        rows = logits[start : start + ROWS]
        sums = rows.double().softmax(-1).cumsum(-1)
        place = noise.uniform(noise.bits(noise.positions(start, len(rows), logits.device), key)).double()
        found = torch.searchsorted(sums, (place * sums[:, -1])[:, None])
        labels.append(found[:, 0].clamp(max=logits.shape[-1] - 1))
    return torch.cat(labels)
