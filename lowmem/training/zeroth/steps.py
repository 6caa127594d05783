"""Steps that evaluate the loss instead of differentiating it, and the log that they leave.

Micro-batches are gathered until the step is due; then the source evaluates the loss
of them all, each time under the same weights, so that the slope is the large batch's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.sources import replicas
from lowmem.training.zeroth.log import NAME, ReplayLog, unreplayable
from lowmem.training.zeroth.scales import load_scales
from lowmem.training.zeroth.usual import expected


class ZerothOrder:
    """What a Hugging Face trainer needs for strategies without gradients; mix in before it."""

    args: Any
    accelerator: Any
    state: Any
    model: Any
    optimizer: Any
    lowmem_optimizer: Any
    origin: Mapping[str, Any]
    tell: Callable[[str], None]
    _strategy: Any
    _resumed: str | None
    _steps: int | None
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
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # transformers 5.23 brings it
        if scaled is None:
            counted = trainer.model_accepts_loss_kwargs and num_items is not None
            scaled = counted or trainer.compute_loss_func is not None
        return cast(Tensor, loss.float() if scaled else loss.float() / parts)

    @contextmanager
    def _without_wrapper(self) -> Iterator[None]:
        """Keep the model as it is: several processes have no gradients to reduce, they exchange losses."""
        accelerator = self.accelerator
        if self._strategy.source.needs_autograd or self.args.world_size == 1:
            yield
            return
        accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)
        try:
            yield
        finally:
            del accelerator.prepare_model

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights, and scales that are trained."""
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        self._load_scales(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """The same for the best one."""
        super()._load_best_model()  # type: ignore[misc]
        self._load_scales(self.state.best_model_checkpoint)

    def _load_scales(self, folder: str) -> None:
        source = self._strategy.source
        if source.quantized:
            load_scales(source.trained(self.model), Path(folder))

    # ---- the log ----

    def _begin_log(self) -> None:
        """Write down every step from here; a resumed run goes on with its checkpoint's log."""
        self.replay_log = None
        if self._strategy.source.needs_autograd:
            return
        earlier = Path(self._resumed) / NAME if self._resumed else None
        if earlier is None:
            self.tell(expected(self.args, self._steps))
            if problem := unreplayable(self.lowmem_optimizer):
                self.tell(f"{problem}; this run leaves no {NAME}")
                return
            self.replay_log = ReplayLog.of(self.lowmem_optimizer, self.model, self.origin)
            if not replicas.agree(self.replay_log.header["base"], self.args.device):
                raise UserError("the processes start from different weights: give all of them one model")
        elif earlier.is_file():
            log = ReplayLog.load(earlier)
            if other := log.elsewhere(self.lowmem_optimizer):
                self.tell(f"{earlier.parent.name} was trained elsewhere ({other}): this run leaves no {NAME}")
                return
            self.replay_log = log
        else:
            self.tell(f"{earlier.parent.name} has no {NAME}: this run leaves none")
            return
        self._handle = self.replay_log.follow(self.lowmem_optimizer)

    def _end_log(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def cut_log(self, steps: int) -> None:
        """Forget the steps after the first ones: those of the weights that are kept."""
        if self.replay_log is not None:
            self.replay_log = self.replay_log.cut(steps)

    def save_log(self, folder: Path) -> None:
        """Put the log into a folder, where there is one that the run has not left."""
        if self.replay_log is not None and self.replay_log.left:
            self.tell(f"{self.replay_log.left}; this run leaves no {NAME}")
            self._end_log()
            self.replay_log = None
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
