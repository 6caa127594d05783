"""What a trainer does at the Trainer's own events: interruption, divergence and progress.

Ctrl-C during training finishes the step, saves a checkpoint and stops; a second
Ctrl-C stops at once. The stock Trainer loses everything since its last save.
A loss that stays away from the numbers ends the run: no later step would bring it back.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.console import Console
from lowmem.errors import UserError
from lowmem.memory.device import readings as device
from lowmem.training.folder.checkpoint import newest


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


class Divergence(TrainerCallback):
    """Ends a run whose loss has not been finite for some steps in a row.

    Args:
        limit: how many steps; 0 never ends it.

    Attributes:
        since: the first of those steps, None where the last step's loss was finite.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.forget()

    def forget(self) -> None:
        """Begin a run."""
        self.since: int | None = None
        self._finite: Tensor | None = None

    def see(self, loss: Tensor) -> Tensor:
        """Take note of one micro-batch's loss, and give it back."""
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        return loss

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count the step; this waits for it, where the stock Trainer would to filter its log.

        Raises:
            UserError: there were too many, with the checkpoint to go back to.
        """
        finite, self._finite = self._finite is None or bool(self._finite), None
        if finite:
            self.since = None
            return
        self.since = state.global_step if self.since is None else self.since
        if self.limit and state.global_step - self.since + 1 >= self.limit:
            found, _ = newest(Path(str(args.output_dir)))
            before = (
                f"{found} is the last checkpoint before it" if found else "no checkpoint was saved before it"
            )
            raise UserError(
                f"the loss is not finite since step {self.since}, {self.limit} steps in a row; {before}: "
                "lower lr or look at the data of that step, then resume; nonfinite_limit=0 would go on"
            )


class Report(TrainerCallback):
    """Passes training steps on to a `Console`; whoever runs the trainer opens and closes the stage.

    Args:
        console: receiver.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, float] = {}
        self._seen: deque[tuple[float, int]] = deque(maxlen=10)
        self._warm = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin to count tokens."""
        self._seen.clear()
        self._warm = False
        self._seen.append((time.perf_counter(), state.num_input_tokens_seen))

    def _count(self, state: TrainerState) -> None:
        """Tokens per second over the last steps, padding included; a first that compiles is soon left out."""
        self._seen.append((time.perf_counter(), state.num_input_tokens_seen))
        if len(self._seen) == 3 and not self._warm:
            self._seen.popleft()
            self._warm = True
        (began, before), (now, tokens) = self._seen[0], self._seen[-1]
        if tokens > before and now > began:
            self.last["tokens_per_second"] = (tokens - before) / (now - began)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report a step whose loss is logged, with the newest numbers."""
        logs = logs or {}
        self.last |= {key: value for key, value in logs.items() if isinstance(value, (int, float))}
        if "loss" in logs:
            self.console.advance(state.global_step, self.last)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Report a step that is not logged; the others are reported with their loss."""
        self._count(state)
        if not control.should_log:
            self.console.advance(state.global_step, self.last)


class Peak(TrainerCallback):
    """Highest memory of the training steps: of the allocator on CUDA, resident on a CPU.

    Attributes:
        bytes: the peak, None where the system does not say.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self.device = "cpu"

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget what loading took."""
        self.device = args.device.type
        device.start_peaks(self.device)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Read after each step: the profiler begins a new peak at the step that it tracks."""
        seen = device.reading("cuda")["peak"] if self.device == "cuda" else device.resident_peak()
        self.bytes = max((value for value in (self.bytes, seen) if value is not None), default=None)


def replace_printers(trainer: Any) -> None:
    """Take off the callbacks that print to stdout and draw bars; `Report` does it instead."""
    from transformers import PrinterCallback, ProgressCallback

    for printer in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(printer)
