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

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowmem.errors import CheckpointError

MANIFEST = "manifest.json"
REQUIRED = ("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth")
"""Without these a resumed run would be another run; several processes write rng_state_0.pth and so on."""


def staging(output_dir: Path) -> Path:
    """Folder in which checkpoints of `output_dir` are written before they count."""
    return output_dir / ".staging"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Sync every file of `folder` to disk, then write the manifest, last.

    Args:
        folder: a staged checkpoint, complete but for the manifest.
        about: what it belongs to (plain values), compared by `check_origin`.
    """
    files = _files(folder)
    for name in files:
        _sync(folder / name)
    listing = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in files
    }
    text = json.dumps({"format": 1, "files": listing, "about": dict(about)}, indent=1, sort_keys=True)
    unsealed = folder / (MANIFEST + ".part")
    unsealed.write_text(text, encoding="utf-8")
    _sync(unsealed)
    os.rename(unsealed, folder / MANIFEST)
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _sync(directory)


def publish(staged: Path, target: Path) -> None:
    """Make a sealed folder visible as `target`; a damaged or older one of that name gives way.

    The order leaves a sealed folder behind at every moment: `recover` finishes an
    interrupted call.
    """
    replaced = staged.with_name("replaced-" + staged.name)
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        os.rename(target, replaced)
    os.rename(staged, target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def recover(output_dir: Path) -> None:
    """Finish or discard what an interrupted save left in the staging folder."""
    folder = staging(output_dir)
    for staged in sorted(folder.glob("checkpoint-*")):
        target = output_dir / staged.name
        if damage(staged) is None and damage(target) is not None:
            publish(staged, target)
    shutil.rmtree(folder, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """Say what keeps a checkpoint from being resumed, None when it is whole."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        listing = _manifest(folder)["files"]
        for name, expected in listing.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return "it has no manifest.json: its save was cut off, or lowmem did not write it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    single = {"rng_state.pth"} if "rng_state_0.pth" in listing else set()
    absent = [name for name in REQUIRED if name not in {*listing, *single}]
    return f"it was saved without {', '.join(absent)}" if absent else None


def is_checkpoint_name(path: Path) -> bool:
    """Whether a path names one checkpoint, rather than the folder of a run."""
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def checkpoints(output_dir: Path) -> list[Path]:
    """Folders named checkpoint-N, highest N first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and is_checkpoint_name(p)]
    return sorted(found, key=_step, reverse=True)


def newest(output_dir: Path) -> tuple[Path | None, list[str]]:
    """Newest whole checkpoint, and one sentence for each newer one that was skipped.

    Args:
        output_dir: the run's folder; what an interrupted save left there is settled first.
    """
    recover(output_dir)
    skipped: list[str] = []
    for folder in checkpoints(output_dir):
        reason = damage(folder)
        if reason is None:
            return folder, skipped
        skipped.append(f"skipped {folder.name}: {reason}")
    return None, skipped


def check_origin(folder: Path, about: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that is damaged or belongs to another strategy or model.

    Args:
        folder: the checkpoint.
        about: what the present run is, as given to `seal`.

    Raises:
        CheckpointError: says the first difference and what to do.
    """
    reason = damage(folder)
    if reason is not None:
        raise CheckpointError(
            f"cannot resume from {folder}: {reason}; name the run's folder to take the newest whole one"
        )
    check_about(folder, about)


def check_about(folder: Path, about: Mapping[str, Any]) -> None:
    """The half of `check_origin` for a checkpoint that is known to be whole."""
    theirs = _manifest(folder)["about"]
    for key in ("strategy", "options", "parameters"):
        _same(folder.name, key, theirs.get(key), about.get(key))


def rotate(output_dir: Path, keep: int | None, protect: Iterable[Path] = ()) -> None:
    """Delete all but the `keep` newest whole checkpoints (None or 0: keep all).

    A folder that does not verify is not counted and not touched: it may be another program's.

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
    whole = [folder for folder in found if damage(folder) is None]
    for folder in whole[keep:]:
        if folder.resolve() not in spared:  # renamed first: half a deletion must not look like a checkpoint
            staging(output_dir).mkdir(exist_ok=True)
            os.rename(folder, staging(output_dir) / f"old-{folder.name}")
    shutil.rmtree(staging(output_dir), ignore_errors=True)


def _manifest(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return read


def _files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _digest(path: Path) -> str:
    """Hash of the whole file; the processor has instructions for sha256, so it is quicker than blake2b."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
