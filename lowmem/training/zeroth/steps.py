"""Steps that evaluate the loss instead of differentiating it, and the log that they leave.

Micro-batches are gathered until the step is due; then the source evaluates the loss
of them all, each time under the same weights, so that the slope is the large batch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.training.zeroth.log import NAME, ReplayLog


class ZerothOrder:
    """What a Hugging Face trainer needs for strategies without gradients; mix in before it."""

    args: Any
    model: Any
    optimizer: Any
    lowmem_optimizer: Any
    origin: Mapping[str, Any]
    tell: Callable[[str], None]
    _strategy: Any
    _resumed: str | None
    _window: list[dict[str, Any]]
    replay_log: ReplayLog | None = None
    _handle: Any = None

    def _probe(
        self, model: nn.Module, inputs: dict[str, Any], num_items: Tensor | int | None, last: bool
    ) -> Tensor:
        """Gather micro-batches; at the last one let the source evaluate the loss of them all.

        All probes see the same micro-batches and no dropout, so their difference is the
        large batch's.
        """
        self._window.append(self._prepare_inputs(inputs))  # type: ignore[attr-defined]
        if not last:
            return torch.zeros((), device=self.args.device)
        window, self._window = self._window, []

        def loss() -> Tensor:
            return cast(
                Tensor, sum(self._micro_loss(model, batch, num_items, len(window)) for batch in window)
            )

        with _evaluating(model), torch.no_grad():
            value: Tensor = self.lowmem_optimizer.backward(loss, model)
        return value.detach().to(self.args.device)

    def _micro_loss(
        self, model: nn.Module, batch: dict[str, Any], num_items: Tensor | int | None, parts: int
    ) -> Tensor:
        """One micro-batch's share of the window's loss, in fp32."""
        trainer = cast(Any, self)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=num_items)
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items is not None
            scaled = counted or trainer.compute_loss_func is not None
        return cast(Tensor, loss.float() if scaled else loss.float() / parts)

    # ---- the log ----

    def _begin_log(self) -> None:
        """Write down every step from here; a resumed run goes on with its checkpoint's log."""
        self.replay_log = None
        if self._strategy.source.needs_autograd:
            return
        earlier = Path(self._resumed) / NAME if self._resumed else None
        if earlier is None:
            self.replay_log = ReplayLog.of(self.lowmem_optimizer, self.model, self.origin)
        elif earlier.is_file():
            self.replay_log = ReplayLog.load(earlier)
        else:
            self.tell(f"{earlier.parent.name} has no {NAME}: this run leaves none")
            return
        self._handle = self.replay_log.follow(self.lowmem_optimizer)

    def _end_log(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def save_log(self, folder: Path) -> None:
        """Put the log into a folder, where there is one."""
        if self.replay_log is not None and self.args.should_save:
            self.replay_log.save(folder / NAME)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off meanwhile."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
