"""Checkpoints that are whole or absent.

A checkpoint is written into a staging folder beside its destination, synced to
disk, sealed with a manifest (the last file written: names, sizes, hashes of every
byte, and what it belongs to) and only then renamed to `checkpoint-N`. So whatever happens
during a save (kill -9, power, a full disk), every folder named `checkpoint-N`
that verifies is whole, and the older ones are untouched.

The stock Trainer takes the highest number, and starts silently afresh where the
optimizer file is missing. Here a resume takes the newest folder that verifies,
names those it skipped, and refuses a checkpoint of another strategy or model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import CheckpointError
from lowmem.models.sealed import about, added, broken, discard, files, ours
from lowmem.training.folder.forms import form_of
from lowmem.training.folder.lock import BusyError, held
from lowmem.training.folder.staging import fresh, recover

REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
"""Without these a resumed run would be another run; several processes write rng_state_0.pth and so on,
and those of a sharded model an optimizer of another form."""


def damage(folder: Path) -> str | None:
    """Say what keeps a checkpoint from being resumed, None when it is whole."""
    if (reason := broken(folder)) is not None:
        return reason
    if more := added(folder):
        return f"{more[0]} was added to it"
    listing = files(folder)
    others = {"rng_state.pth"} if "rng_state_0.pth" in listing else set()
    others |= {"optimizer.pt"} if form_of(listing) else set()
    absent = [name for name in REQUIRED if name not in {*listing, *others}]
    return f"it was saved without {', '.join(absent)}" if absent else None


def is_checkpoint_name(path: Path) -> bool:
    """Whether a path names one checkpoint, rather than the folder of a run."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def step(folder: Path) -> int:
    """Steps that the checkpoint of this name has taken."""
    return int(folder.name.rpartition("-")[2])


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, highest N first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and is_checkpoint_name(p)]
    return sorted(found, key=step, reverse=True)


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Newest whole checkpoint, and one sentence for each newer one that was skipped.

    Args:
        output_dir: the run's folder; what an interrupted save left there is settled first.
    """
    _settle(output_dir)
    skipped: list[str] = []
    for folder in checkpoints(output_dir):
        reason = "it is a symbolic link" if folder.is_symlink() else damage(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {reason}")
    return None, skipped


def _settle(output_dir: Path) -> None:
    """Finish what an interrupted run left there, unless a run is under way."""
    if not output_dir.is_dir():
        return
    try:
        with held(output_dir):
            recover(output_dir)
    except (BusyError, PermissionError):
        return


def check_no_foreign(output_dir: Path, after: int) -> None:
    """Refuse a folder in which a checkpoint that lowmem did not write lies ahead.

    Args:
        output_dir: where a run will save.
        after: steps that the run has taken.
    """
    ahead = [folder for folder in checkpoints(output_dir) if step(folder) > after and not ours(folder)]
    if ahead:
        raise CheckpointError(
            f"{ahead[-1]} was not written by lowmem and is in the way; move it away, or name another folder"
        )


def check_origin(folder: Path, ours: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is damaged or belongs to another strategy or model.

    Args:
        folder: the checkpoint.
        ours: what the present run is, as given to `seal`.

    Raises:
        CheckpointError: says the first difference and what to do.
    """
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(
            f"cannot resume from {folder}: {reason}; name the run's folder to take the newest whole one"
        )
    check_about(folder, ours)


def check_about(folder: Path, ours: Mapping[str, Any]) -> None:
    """The half of `check_origin` for a checkpoint that is known to be whole."""
    theirs = about(folder)
    for key in ("strategy", "options", "parameters"):
        _same(folder.name, key, theirs.get(key), ours.get(key))


def rotate(output_dir: Path, keep: int | None, protect: Iterable[Path] = ()) -> None:
    """Delete all but the `keep` newest whole checkpoints (None or 0: keep all).

    A folder that is not what was written is not counted and not touched: it may be another program's.

    Args:
        output_dir: the run's folder.
        keep: how many to keep, the protected ones among them where they are new enough.
        protect: never deleted (the best one).
    """
    if not keep or keep < 0:
        return
    spared = {path.resolve() for path in protect}
    found = checkpoints(output_dir)
    if len(found) <= keep:  # nothing to delete, so nothing to read
        return
    whole = [folder for folder in found if not folder.is_symlink() and broken(folder) is None]
    for folder in whole[keep:]:
        if folder.resolve() not in spared:
            remove(folder)


def remove(folder: Path) -> None:
    """Delete a checkpoint; it is renamed first, for half a deletion must not look like one."""
    gone = fresh(folder.parent) / f"old-{folder.name}"
    os.rename(folder, gone)
    discard(gone.parent)


def _same(name: str, key: str, theirs: Any, ours: Any) -> None:
    if theirs == ours:
        return
    advice = "resume with what it was written with, or start afresh in another folder"
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        changed = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        what = f"{key} {changed[0]!r}"
        old, new = (repr(side[changed[0]]) if changed[0] in side else "not set" for side in (theirs, ours))
        more = f" ({len(changed)} differ)" if len(changed) > 1 else ""
    else:
        what, old, new, more = key, repr(theirs), repr(ours), ""
    raise CheckpointError(
        f"cannot resume from {name}: its {what} is {old}, this run's is {new}{more}; {advice}"
    )
