"""What is not finite: whether a tensor has any of it, as its ranks see it, and how much was not stepped."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.optim.terms.fp32 import LARGEST
from lowmem.optim.terms.hyper import Hyper


def all_finite(x: Tensor, hp: Hyper) -> Tensor:
    """0-D bool, the same for all shards."""
    if hp.sound is not None:
        return hp.sound
    return _finite(x) if hp.shard is None else hp.total(unsound(x), "max") == 0.0


def unsound(x: Tensor) -> Tensor:
    """0-D fp32: 1 where an element is not finite, else 0."""
    return (~_finite(x)).float() if x.numel() else torch.zeros((), device=x.device)


def _finite(x: Tensor) -> Tensor:
    least, most = x.aminmax()
    return most - least <= LARGEST  # false for NaN and Inf


@dataclass
class Skipped:
    """Elements that were not stepped, counted where they are; only `total` reads from a device.

    A kernel counts on the way: into one number, or on a card into one for each of its rows, as
    a sum over all rows would be a kernel of its own.
    """

    _counters: dict[torch.device, Tensor] = field(default_factory=dict)
    _tallies: dict[torch.device, Tensor] = field(default_factory=dict)
    _judged: list[tuple[Tensor, int]] = field(default_factory=list)

    def counter(self, device: torch.device) -> Tensor:
        """The number of a device, 0-D int64."""
        if device not in self._counters:
            self._counters[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._counters[device]

    def tally(self, rows: int, device: torch.device) -> Tensor:
        """The numbers of rows on a device, (rows, 1) int32."""
        known = self._tallies.get(device)
        if known is None or known.shape[0] < rows:
            if known is not None:
                self.counter(device).add_(known.sum())
            self._tallies[device] = known = torch.zeros((rows, 1), dtype=torch.int32, device=device)
        return known[:rows]

    @property
    def rows(self) -> int:
        """Of the tallies that are kept."""
        return sum(tally.shape[0] for tally in self._tallies.values())

    def judge(self, ok: Tensor, count: int) -> None:
        """Count so many elements if the 0-D bool turns out false."""
        self._judged.append((ok, count))
        if len(self._judged) >= 4096:
            self._settle()

    def total(self) -> int:
        """All so far."""
        self._settle()
        return sum(int(count.sum()) for count in (*self._counters.values(), *self._tallies.values()))

    def _settle(self) -> None:
        for device in {ok.device for ok, _ in self._judged}:
            here = [(ok, count) for ok, count in self._judged if ok.device == device]
            counts = torch.tensor([count for _, count in here]).to(device, non_blocking=True)
            self.counter(device).add_((~torch.stack([ok for ok, _ in here]) * counts).sum())
        self._judged.clear()
