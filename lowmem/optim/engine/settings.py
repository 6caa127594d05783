"""The caller's settings of torch, put aside while an optimizer computes.

A default dtype decides what an integer tensor times a number is, a default device
where a table is made, autocast in which precision a product runs. None of them is
about the step: its bits depend on weights, gradients and options alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

KINDS = ("cpu", "cuda")
"""Devices whose autocast is looked at."""


@dataclass(frozen=True)
class Settings:
    """What a caller may have set.

    Args:
        dtype, device: the defaults of new tensors.
        autocast: dtype of autocast on each of `KINDS`, None where it is off.
    """

    dtype: torch.dtype
    device: torch.device
    autocast: tuple[torch.dtype | None, ...]

    @classmethod
    def now(cls) -> Settings:
        """Those of this moment; cheap."""
        casts = (torch.get_autocast_dtype(k) if torch.is_autocast_enabled(k) else None for k in KINDS)
        return cls(torch.get_default_dtype(), torch.get_default_device(), tuple(casts))

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Compute under these settings; those of before are back afterwards."""
        before = Settings.now()
        if before == self:
            yield
            return
        with ExitStack() as stack:
            for kind, cast, was in zip(KINDS, self.autocast, before.autocast, strict=True):
                if cast != was:
                    stack.enter_context(torch.autocast(kind, dtype=cast or was, enabled=cast is not None))
            if self.device != before.device:
                stack.enter_context(torch.device(self.device))
            torch.set_default_dtype(self.dtype)
            try:
                yield
            finally:
                torch.set_default_dtype(before.dtype)


NEUTRAL = Settings(torch.float32, torch.device("cpu"), (None,) * len(KINDS))
"""Those that torch starts with."""


def under(settings: Settings, f: Callable[[], T]) -> Callable[[], T]:
    """The function, called under these settings."""

    def call() -> T:
        with settings.entered():
            return f()

    return call
