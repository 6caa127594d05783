"""What the device and the process say about memory, read on the host without waiting for the device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lowmem.errors import UserError

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
HISTORY = 200_000  # allocator events that a snapshot keeps


def reading(device: str) -> dict[str, int | None]:
    """Bytes now: allocated, peak since the last reset, reserved (CUDA), resident memory of the process."""
    found: dict[str, int | None] = {"allocated": None, "peak": None, "reserved": None, "resident": resident()}
    if device == "cuda":
        stats = torch.cuda.memory_stats()
        found |= {
            "allocated": stats["allocated_bytes.all.current"],
            "peak": stats["allocated_bytes.all.peak"],
            "reserved": stats["reserved_bytes.all.current"],
        }
    return found


def resident() -> int | None:
    """Resident bytes of the process; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return None


def start_peaks(device: str) -> None:
    """Begin a new peak: of the allocator, and where Linux allows it, of resident memory."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with suppress(
        OSError
    ):  # another system, or not permitted: the peak since the process began is what there is
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def resident_peak() -> int | None:
    """Highest resident bytes since `start_peaks`; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    row = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(row.split()[1]) * 1024 if row else None


def beside(device: str, tracked: int) -> dict[str, int | None]:
    """Everything that the tracker does not see, after a step that began with `start_peaks`.

    Args:
        device: "cuda" or "cpu".
        tracked: the tracker's peak, bytes.
    """
    found = {"tracked_peak": tracked, "resident_peak": resident_peak()}
    if device != "cuda":
        return found
    stats = torch.cuda.memory_stats()
    free, total = torch.cuda.mem_get_info()
    reserved = stats["reserved_bytes.all.current"]
    return {
        **found,
        "allocator_peak": stats["allocated_bytes.all.peak"],
        "unattributed": stats["allocated_bytes.all.peak"] - tracked,
        "reserved_peak": stats["reserved_bytes.all.peak"],
        "device_used": total - free,
        "outside_the_allocator": total - free - reserved,
        "allocation_retries": stats["num_alloc_retries"],
        "out_of_memory_errors": stats["num_ooms"],
    }


def check_snapshot(device: str) -> None:
    """Refuse a snapshot where there is no caching allocator to take one of.

    Raises:
        UserError: the device is not CUDA.
    """
    if device != "cuda":
        raise UserError(
            f"a memory snapshot shows CUDA's allocator, and this run is on {device}; leave the snapshot out "
            "(the report shows every tracked byte all the same)"
        )


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Record the allocator's history meanwhile and dump it to `path`, for memory_viz; None does nothing."""
    if path is None:
        yield
        return
    record: Any = torch.cuda.memory._record_memory_history
    record(max_entries=HISTORY, stacks="python")  # native stacks take a hundred times longer to dump
    try:
        yield
    finally:
        dump(path)
        record(enabled=None)


def dump(path: Path) -> None:
    """Write the allocator's blocks, with their history if it was recorded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.cuda.memory._dump_snapshot(str(path))  # type: ignore[no-untyped-call]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    words = ("out of memory", "can't allocate memory", "not enough memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
