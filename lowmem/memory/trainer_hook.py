"""The profiler on a Hugging Face Trainer: steps are told by a callback that is there for one run only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from lowmem.memory.profile import Profiler


class _Steps(TrainerCallback):
    """Opens a step of the profiler when the Trainer begins one, and closes it when the Trainer ends it."""

    def __init__(self, profiler: Profiler) -> None:
        self.profiler = profiler
        self.open = ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run shorter than the step to track is tracked at its last step."""
        self.profiler.at = max(1, min(self.profiler.at, state.max_steps - state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin a step: its micro-batches are fetched, nothing is computed yet."""
        optimizer = kwargs["optimizer"]
        self.open.enter_context(
            self.profiler.step(kwargs["model"], getattr(optimizer, "optimizer", optimizer))
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End it, before anything is logged, evaluated or saved."""
        self.open.close()


@contextmanager
def attached(profiler: Profiler, trainer: Any) -> Iterator[None]:
    """Add the callback, and take it off whatever happens; an error inside a step reaches the profiler."""
    steps = _Steps(profiler)
    trainer.add_callback(steps)
    try:
        with steps.open:
            yield
    finally:
        trainer.remove_callback(steps)
