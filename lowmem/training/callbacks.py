"""What a trainer does at the Trainer's own events: interruption and progress.

Ctrl-C during training finishes the step, saves a checkpoint and stops; a second
Ctrl-C stops at once. The stock Trainer loses everything since its last save.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.training.console import Console


class Interruption(TrainerCallback):
    """Turns the first Ctrl-C into a checkpoint and an end of training after the step.

    Attributes:
        asked: whether Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT meanwhile; only the main thread of a process can."""
        self.asked = False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop where Ctrl-C was pressed during the step."""
        if self.asked:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False


class Report(TrainerCallback):
    """Passes the Trainer's progress on to a `Console`.

    Args:
        console: receiver; stages are opened and closed by whoever runs the trainer.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, float] = {}
        self.rows = 0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the newest numbers."""
        self.last |= {key: value for key, value in (logs or {}).items() if isinstance(value, (int, float))}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report one optimizer step."""
        self.console.advance(state.global_step, self.last)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report one evaluation batch."""
        if not state.is_local_process_zero:
            return
        self.rows += 1
        if not self.training(control):
            self.console.advance(self.rows, {})

    @staticmethod
    def training(control: TrainerControl) -> bool:
        """Whether the evaluation interrupts training, whose stage stays open."""
        return bool(control.should_evaluate)
