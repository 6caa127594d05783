"""What a watched step took, with the keys of one plan, so that the two subtract; when steps begin and end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

from lowmem.memory.device import readings as device_memory
from lowmem.memory.measure import watch
from lowmem.memory.measure.watch import Watch
from lowmem.memory.trace.sampling import timeline


def measure(done: Watch, optimizer: Optimizer) -> dict[str, Any]:
    """One entry with the plan's keys from a finished watch.

    Args:
        done: the watch of one step.
        optimizer: whose state it held.
    """
    tracker = done.tracker
    moments = tracker.moments()
    peak = max(moments.values(), key=lambda moment: moment.total)
    strategy = getattr(optimizer, "strategy", None)
    seen = device_memory.beside(tracker.device, peak.total)
    at_peak = dict(peak.bytes)
    if (more := seen.get("unattributed")) is not None:
        at_peak["unattributed"] = more
    return {
        "strategy": getattr(strategy, "name", type(optimizer).__name__),
        "options": dict(getattr(strategy, "options", {})),
        "state_bytes": watch.held_bytes(optimizer),
        "at_peak": at_peak,
        "peak": {
            "allocated": sum(at_peak.values()),
            "reserved": seen.get("reserved_peak"),
            "device": seen.get("device_used"),
        },
        "event": peak.event,
        "events": {name: moment.total for name, moment in moments.items()},
        "certainty": dict.fromkeys(at_peak, "measured"),
        "fits": None,
        "headroom_bytes": None,
        "why": [f"Measured: the highest instant is in the phase '{peak.event}'."],
        "timeline": timeline(tracker),
        "modules": watch.modules(tracker, peak),
        "beside": seen,
        "batch": done.batch,
        "device": tracker.device,
    }


class Profiler(Protocol):
    """What is told of each step: `lowmem.memory.measure.profile.Profiler`."""

    at: int

    def step(self, model: nn.Module, optimizer: Optimizer) -> AbstractContextManager[None]: ...


@contextmanager
def attached(profiler: Profiler, trainer: Any) -> Iterator[None]:
    """Add the callback, and take it off whatever happens; an error inside a step reaches the profiler."""
    opened = ExitStack()  # the step that runs, if one does
    callback = _callback(profiler, opened)
    trainer.add_callback(callback)
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop())  # first: a step ends before another callback evaluates or saves
    try:
        with opened:
            yield
    finally:
        trainer.remove_callback(callback)


def _callback(profiler: Profiler, opened: ExitStack) -> Any:
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        """Opens a step of the profiler when the Trainer begins one, and closes it at its end."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """A run shorter than the step to track is tracked at its last step."""
            profiler.at = max(1, min(profiler.at, state.max_steps - state.global_step))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Begin a step: its micro-batches are fetched, nothing is computed yet."""
            optimizer = kwargs["optimizer"]
            inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
            opened.enter_context(profiler.step(kwargs["model"], inner))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """End it, before anything is logged, evaluated or saved."""
            opened.close()

    return Steps()
