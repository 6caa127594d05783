"""One row of what fits a card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lowmem.memory.advice.kinds import KINDS
from lowmem.memory.advice.ways import time
from lowmem.memory.device.allocator import FITS, OUT, RETRIES
from lowmem.memory.footprint import Peak
from lowmem.memory.run import Run
from lowmem.optim.strategy import Strategy


@dataclass(frozen=True)
class Found:
    """One way to train the model on the card.

    Args:
        strategy: the method; mode: what is trained; run: the same with its levers.
        kind: of `KINDS`; levers: their names.
        peak: bytes by row at the peak, and the event; state_bytes: of the optimizer.
        verdict: fits, fits with retries or out of memory; headroom_bytes: to spare, or missing.
        checked: the allocator was simulated over the whole model; otherwise the verdict is an estimate.
        needs: what would make it fit, "" where it does.
        ranks_needed: cards over which it would fit, 0 where no number does; None where that was not asked.
        refused: levers that it does not take and why, where it does not fit.
        largest_batch: that the tensors leave room for, by a line; None where it was not looked for.
        command: that plans it in full; None for a model without a name.
    """

    strategy: Strategy
    mode: Run
    run: Run
    kind: str
    levers: tuple[str, ...]
    peak: Peak
    state_bytes: int
    verdict: str
    headroom_bytes: int
    checked: bool = False
    needs: str = ""
    ranks_needed: int | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    largest_batch: int | None = None
    command: str | None = None

    @property
    def trains(self) -> str:
        """What is trained, in two words."""
        if not self.run.adapts:
            return f"all weights, {self.run.weights}" if self.run.weights else "all weights"
        over = ", 4-bit base" if self.run.quantize else ""
        return f"LoRA {self.run.lora_rank}{over}" if self.run.lora_rank else f"{self.run.adapter}{over}"

    @property
    def order(self) -> tuple[int, int, int, int, bool]:
        """Smaller is better."""
        word = (FITS, RETRIES, OUT).index(self.verdict)
        kind = 0 if word else KINDS.index(self.kind)  # where nothing fits, what misses least comes first
        plain = self.strategy.name != "adamw"  # of equals, what everybody knows
        return word, kind, 0 if word else time(self.run), -self.headroom_bytes, plain

    def to_dict(self) -> dict[str, Any]:
        """Plain values, sizes in bytes."""
        return {
            "strategy": self.strategy.name, "options": dict(self.strategy.options), "trains": self.trains,
            "kind": self.kind, "levers": list(self.levers), "batch_size": self.run.batch_size,
            "seq_len": self.run.seq_len, "loss": self.run.loss, "state_bytes": self.state_bytes,
            "allocated": self.peak.allocated, "event": self.peak.event, "fits": self.verdict == FITS,
            "verdict": self.verdict, "headroom_bytes": self.headroom_bytes, "checked": self.checked,
            "needs": self.needs, "ranks_needed": self.ranks_needed, "refused": dict(self.refused),
            "largest_batch_size": self.largest_batch, "command": self.command,
        }  # fmt: skip
