"""How checkpoints and results get into a run's folder: whole or not at all.

Both are written into a staging folder beside their destination and sealed there (`models.sealed`).
A checkpoint then appears by one rename. Results are many files beside other things: those that they
replace go first, then the new ones are moved in, and the manifest, last, says that they are whole. The
sealed folder is the commit point. Before it, nothing has happened; after it, `recover` finishes
what was cut off, however often. At no moment do files of two runs lie side by side.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from lowmem.errors import CheckpointError
from lowmem.models.sealed import MANIFEST, broken, discard, files, ours, sync

STAGING = ".lowmem.staging"
_RESULTS = "results"
_REPLACED = "replaced.json"


def staging(output_dir: Path) -> Path:
    """Folder in which checkpoints and results of `output_dir` are written before they count."""
    return output_dir / STAGING


def fresh(output_dir: Path) -> Path:
    """The staging folder, empty."""
    folder = staging(output_dir)
    discard(folder)
    folder.mkdir(parents=True)
    return folder


def publish(staged: Path, target: Path) -> None:
    """Make a sealed folder visible as `target`; a damaged or older one of that name gives way.

    Raises:
        CheckpointError: what is there was not written by lowmem.
    """
    if os.path.lexists(target) and not ours(target):
        raise CheckpointError(
            f"{target} was not written by lowmem, it is left as it is; move it away, then resume"
        )
    aside = staged.with_name("replaced-" + staged.name)
    discard(aside)
    if target.exists():
        os.rename(target, aside)
    os.rename(staged, target)
    sync(target.parent)
    discard(aside)


def results(output_dir: Path) -> Path:
    """A new folder to write results to."""
    made = fresh(output_dir) / _RESULTS
    made.mkdir()
    return made


def publish_results(output_dir: Path) -> None:
    """Move sealed results to where they belong, in the place of earlier ones."""
    made = staging(output_dir) / _RESULTS
    retract(output_dir)
    for name in _top(files(made)):
        if (made / name).exists():  # else it was moved before a cut
            os.replace(made / name, output_dir / name)
    sync(output_dir)
    os.replace(made / MANIFEST, output_dir / MANIFEST)
    sync(output_dir)
    discard(staging(output_dir))


def retract(output_dir: Path) -> None:
    """Delete published results; what else lies in the folder stays.

    The list of them is put aside first: from then on they are no results any more, and a cut
    leaves a list of what is still to delete.
    """
    aside = staging(output_dir) / _REPLACED
    if ours(output_dir):
        aside.parent.mkdir(exist_ok=True)
        os.replace(output_dir / MANIFEST, aside)
    if not aside.is_file():
        return
    for name in _top(json.loads(aside.read_text(encoding="utf-8"))["files"]):
        discard(output_dir / name)
    aside.unlink()


def recover(output_dir: Path) -> None:
    """Finish or discard what an interrupted run left in the staging folder."""
    folder = staging(output_dir)
    if folder.is_symlink() or not folder.is_dir():
        discard(folder)
        return
    if ours(folder / _RESULTS):
        publish_results(output_dir)
        return
    retract(output_dir) if (folder / _REPLACED).is_file() else None
    for staged in sorted(folder.glob("checkpoint-*")):
        target = output_dir / staged.name
        free = ours(target) or not os.path.lexists(target)
        if free and broken(staged) is None and broken(target) is not None:
            publish(staged, target)
    discard(folder)


def _top(names: list[str]) -> list[str]:
    """First parts of listed names, sorted; those that lead out of the folder are no results."""
    return sorted({parts[0] for name in names if (parts := Path(name).parts) and parts[0] not in ("..", "/")})
