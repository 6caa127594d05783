"""One run at a time in a folder.

A run holds `.lowmem.lock` open under the kernel's lock, so that it is free again however the run ends,
and writes into it who holds it. A file system may not pass the kernel's lock on to other machines: what
another machine has written there counts as held until it is deleted, what this one has (before a
kill, or before it was started again) does not.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem.errors import UserError
from lowmem.texts import parse_json

LOCK = ".lowmem.lock"
_held: dict[Path, int] = {}  # folders that this process holds: a recipe and its trainer are one run


class BusyError(UserError):
    """Another run holds the folder."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder meanwhile; a run that holds it already goes on.

    Raises:
        BusyError: another run holds it, named by process and machine.
    """
    place = folder.resolve()
    if _held.get(place) == os.getpid():
        yield
        return
    handle = _take(place / LOCK)
    _held[place] = os.getpid()
    try:
        yield
    finally:
        del _held[place]
        try:
            (place / LOCK).unlink(missing_ok=True)  # before others can have it: else they would hold no name
        finally:
            os.close(handle)


def _take(path: Path) -> int:
    """Open and lock the file, and write into it who does."""
    while True:
        if path.is_symlink():
            path.unlink()
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(handle, path)
            if _is(handle, path):  # else its owner deleted it before we had the lock
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(_owner()).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    owner, mine = _read(handle), _owner()
    by = f"output_dir: {path.parent} is in use by process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    here = owner.get("boot") == mine["boot"]
    if not _free(handle, here and owner.get("pid")):
        raise BusyError(f"{by}; wait for that run, or name another folder")
    if owner and not here and owner.get("host") != mine["host"]:
        raise BusyError(f"{by}, another machine; if that run is over, delete {path}")


def _free(handle: int, pid: Any) -> bool:
    """Take the kernel's lock, or where the file system has none, see that the owner is gone."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return not (isinstance(pid, int) and pid != os.getpid() and Path(f"/proc/{pid}").exists())
    return True


def _owner() -> dict[str, Any]:
    """Who this is: the process, the machine, and which of its starts (containers of one machine share it)."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    started = boot.read_text().strip() if boot.is_file() else ""
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": started}


def _read(handle: int) -> dict[str, Any]:
    """What the file says of its owner; nothing where it was cut off."""
    try:
        read = parse_json(os.pread(handle, 4096, 0).decode(errors="replace"))
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _is(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False
