"""Measured memory in the plan's own words: the same rows, so that the two subtract.

One step of a run (the third by default: optimizer state exists by then) happens under the storage tracker
of `lowmem.memory.trace`. Every live byte belongs to one category, and the peak is one instant: its
categories sum to it. Every other step costs nothing but a host-side reading at its end: no hook, no
dispatch mode and no device synchronisation is left behind.

Three ways to the same numbers:

    profile(step, model, optimizer)                 run a few steps of a closure and return the `Profile`
    with profiler.on(trainer): trainer.train()      any Hugging Face Trainer; then `profiler.result()`
    with profiler.step(): ...                       each step of a hand-written loop

`Profile.to_dict()` is `{"kind": "profile", "model", "run", "budget_bytes", "predicted": PLAN | None,
"measured": PLAN, "error_percent": {row: float | None}, "steps": [...], "advice": [...], "command"}`; PLAN
has the keys of one entry of `plan --json`'s "plans": strategy, options, state_bytes, at_peak, peak, event,
events, certainty, fits, headroom_bytes, why; the measured one also timeline, modules and beside.

On a CPU there is no caching allocator: tracked bytes are the truth, resident memory is shown beside them as
a sanity check. On CUDA the allocator's own peak is the truth, and what it saw and the tracker did not (what
kernels allocate for themselves) is a row of its own, `unattributed`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem.errors import UserError
from lowmem.memory.device import readings as device_memory
from lowmem.memory.measure.measured import measure
from lowmem.memory.measure.watch import Watch
from lowmem.models.computing.wide import wide
from lowmem.optim.tensors.marks import trains
from lowmem.report.profile import errors
from lowmem.report.units import format_bytes

STEPS_KEPT = 512
Predictor = Callable[[Mapping[str, Any], Any], tuple[Mapping[str, Any] | None, Sequence[str]]]
Predicted = Mapping[str, Any] | Predictor | None


@dataclass(frozen=True)
class Profile:
    """What a run took, beside what was predicted.

    Args:
        model: {"name", "parameters", "trainable"}.
        run: settings that memory depends on.
        measured: one entry with the plan's keys, and "timeline", "modules", "beside".
        predicted: the plan's entry for this run, or None.
        budget_bytes: what the run had to fit into, or None.
        steps: readings at the end of steps: {"step", "seconds", "allocated", "peak", "reserved", "resident"}.
        command: how the run was started.
        out_of_memory: whether it ended for lack of memory.
        assumptions: what the prediction took for granted, as sentences.
    """

    model: Mapping[str, Any]
    run: Mapping[str, Any]
    measured: Mapping[str, Any]
    predicted: Mapping[str, Any] | None = None
    budget_bytes: int | None = None
    steps: Sequence[Mapping[str, Any]] = ()
    command: str = ""
    out_of_memory: bool = False
    assumptions: Sequence[str] = ()

    @property
    def error_percent(self) -> dict[str, float | None]:
        """100 (predicted - measured) / measured for each row; None where only one of them is zero."""
        return {} if self.predicted is None else errors(self.predicted, self.measured)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `lowmem profile --json` prints them."""
        return {
            "kind": "profile",
            "model": dict(self.model),
            "run": dict(self.run),
            "budget_bytes": self.budget_bytes,
            "predicted": None if self.predicted is None else dict(self.predicted),
            "measured": dict(self.measured),
            "error_percent": self.error_percent,
            "steps": [dict(step) for step in self.steps],
            "advice": advice(self.predicted) if self.out_of_memory else [],
            "out_of_memory": self.out_of_memory,
            "assumptions": list(self.assumptions),
            "command": self.command,
        }


@dataclass
class Profiler:
    """Measures one step of a run and reads the rest of it in passing.

    Args:
        predicted: the plan's entry for this run (one of `report_data(plan(...))["plans"]` in
            `lowmem.memory.pictures`), or a function that makes it after the run,
            (measured entry, strategy) -> (entry or None, notes), such as `predict.of_run(config)`; or None.
        name: the model's name.
        run: settings to show in the report.
        at: which step of this process to track, from 1; in a shorter run the last one.
        budget: bytes the run has to fit into.
        command: how the run was started.
        folder: where to leave `out_of_memory.html`, `.json` and, on CUDA, `.pickle` if memory runs out.
        snapshot: also write the allocator's history of the tracked step to this file (CUDA).

    Example:
        profiler = Profiler(name="smollm2-135m")
        with profiler.on(trainer):
            trainer.train()
        print(profiler.result().to_dict()["measured"]["peak"])
    """

    predicted: Predicted = None
    name: str = "model"
    run: Mapping[str, Any] = field(default_factory=dict)
    at: int = 3
    budget: int | None = None
    command: str = ""
    folder: Path | None = None
    snapshot: Path | None = None

    def __post_init__(self) -> None:
        if self.at < 1:
            raise UserError(f"the step to profile is counted from 1, got {self.at}")
        self._count = 0
        self._began = 0.0
        self._steps: list[dict[str, Any]] = []
        self._stride = 1
        self._watch: Watch | None = None
        self._measured: dict[str, Any] | None = None
        self._about: dict[str, Any] = {}
        self._strategy: Any = None

    @contextmanager
    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """Put around every step of a loop, micro-batches, optimizer step and zero_grad included.

        Args:
            model: the model in training.
            optimizer: its optimizer.
        """
        self._begin(model, optimizer)
        try:
            if self._count == self.at:
                with self._tracked(model, optimizer):
                    yield
            else:
                yield
        except BaseException as error:
            self._failed(error, model, optimizer)
            raise
        self._end()

    @contextmanager
    def on(self, trainer: Any) -> Iterator[None]:
        """Attach to a Hugging Face Trainer meanwhile; nothing of it is left afterwards.

        Raises:
            UserError: memory ran out; the message holds the table and the plan's advice.
        """
        from lowmem.memory.measure.measured import attached

        with attached(self, trainer):
            yield

    def result(self) -> Profile:
        """The profile.

        Raises:
            UserError: no step has been tracked.
        """
        if self._measured is None:
            raise UserError(
                f"nothing was measured: the run took {self._count} steps and step {self.at} was to be tracked"
            )
        return self._profile(self._measured, out_of_memory=False)

    def _profile(self, measured: Mapping[str, Any], *, out_of_memory: bool) -> Profile:
        notes: Sequence[str] = ()
        if callable(self.predicted):
            asked = {**measured, "out_of_memory": out_of_memory}
            predicted, notes = self.predicted(asked, self._strategy)
        else:
            predicted = self.predicted
        budgeted = {**measured, **_verdict(measured, self.budget)}
        if predicted is not None:
            budgeted |= {"strategy": predicted["strategy"], "options": predicted["options"]}
        return Profile(
            model={"name": self.name, **self._about},
            run=dict(self.run),
            measured=budgeted,
            predicted=predicted,
            budget_bytes=self.budget,
            steps=list(self._steps),
            command=self.command,
            out_of_memory=out_of_memory,
            assumptions=notes,
        )

    def _begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._count += 1
        self._device = next(model.parameters()).device.type
        if self._count == 1:
            counts = [(p.numel(), trains(p)) for p in model.parameters()]
            self._strategy = getattr(optimizer, "strategy", None)
            self._about = {
                "parameters": sum(n for n, _ in counts),
                "trainable": sum(n for n, t in counts if t),
            }
            if self.snapshot is not None:
                device_memory.check_snapshot(self._device)
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # host side only; each step has its own peak
        self._began = time.perf_counter()

    @contextmanager
    def _tracked(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        device_memory.start_peaks(self._device)
        self._watch = Watch(model, optimizer)
        with device_memory.recording(self.snapshot), self._watch:
            yield
        self._measured = measure(self._watch, optimizer)
        self._watch = None

    def _end(self) -> None:
        if self._count % self._stride:
            return
        seconds = time.perf_counter() - self._began
        tracked = {"tracked": True} if self._count == self.at else {}
        reading = device_memory.reading(self._device)
        self._steps.append({"step": self._count, "seconds": seconds, **reading, **tracked})
        if len(self._steps) > STEPS_KEPT:  # a long run keeps every second reading, then every fourth, ...
            self._steps = self._steps[1::2]
            self._stride *= 2

    def _failed(self, error: BaseException, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if not device_memory.is_out_of_memory(error):
            return
        from lowmem.memory.measure.out_of_memory import explain, held

        measured = held(self._watch, model, optimizer)
        document = self._profile(measured, out_of_memory=True).to_dict()
        raise explain(document, measured, self._count, self.folder, error) from error


def _verdict(measured: Mapping[str, Any], budget: int | None) -> dict[str, Any]:
    if budget is None:
        return {}
    used = measured["peak"]["device"] or measured["peak"]["allocated"]
    return {"fits": used <= budget, "headroom_bytes": budget - used}


def profile(
    step: Callable[[], Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int = 3,
    predicted: Predicted = None,
    name: str = "model",
    run: Mapping[str, Any] | None = None,
    budget: int | None = None,
    command: str = "",
    snapshot: Path | None = None,
) -> Profile:
    """Run `steps` real steps, the last one under the tracker; products are taken as in lowmem's trainers.

    Args:
        step: one whole step: forward, loss, backward, optimizer.step(), optimizer.zero_grad().
        model: the model in training.
        optimizer: its optimizer; any of torch's will do.
        steps: how many; state exists from the second on, so the default tracks the third.
        predicted: see `Profiler`.
        name: the model's name.
        run: settings to show in the report.
        budget: bytes the run has to fit into.
        command: how the run was started.
        snapshot: also write the allocator's history to this file (CUDA).

    Raises:
        UserError: fewer than one step, a snapshot without CUDA, or memory ran out.

    Example:
        >>> model = torch.nn.Linear(8, 8); optimizer = torch.optim.AdamW(model.parameters())
        >>> def step():
        ...     model(torch.ones(2, 8)).sum().backward(); optimizer.step(); optimizer.zero_grad()
        >>> profile(step, model, optimizer).measured["at_peak"]["weights"]
        288
    """
    profiler = Profiler(
        predicted, name, run or {}, at=steps, budget=budget, command=command, snapshot=snapshot
    )
    for _ in range(steps):
        with profiler.step(model, optimizer), wide(model):
            step()
    return profiler.result()


def advice(predicted: Mapping[str, Any] | None) -> list[str]:
    """What the plan would change to lower the peak, the largest saving first."""
    if predicted is None:
        return ["`lowmem plan` with this model and --optim all shows what fits and what to change."]
    from lowmem.report.plan import saved

    gains = sorted(
        ((saved(lever, predicted), lever["lever"]) for lever in predicted.get("levers") or ()), reverse=True
    )
    found = [
        f"{name} would lower the planned peak by {format_bytes(gain)}." for gain, name in gains if gain > 0
    ]
    return found or [
        "No lever of the plan lowers this peak; take a shorter sequence, a smaller batch or another strategy."
    ]
