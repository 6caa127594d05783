"""The caller's settings of torch, put aside while an optimizer computes.

A default dtype decides what an integer tensor times a number is, a default device
where a table is made, autocast in which precision a product runs. None of them is
about the step: its bits depend on weights, gradients and options alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

KINDS = ("cpu", "cuda")
"""Devices whose autocast is looked at."""


def settled() -> bool:
    """Whether all settings are those torch starts with; cheap."""
    return (
        torch.get_default_dtype() is torch.float32
        and not any(torch.is_autocast_enabled(kind) for kind in KINDS)
        and torch.get_default_device().type == "cpu"
    )


@contextmanager
def neutral() -> Iterator[None]:
    """Compute under the settings torch starts with; the caller's are back afterwards."""
    if settled():
        yield
        return
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for kind in KINDS:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
