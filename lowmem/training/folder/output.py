"""The folder of a run: who may write there, and when.

    with claim(folder, resume=..., overwrite=...) as (start, notes):     one run at a time
        begin(folder, text, overwrite=...)                               the first write
        ...                                                              checkpoints
        with results(folder, about) as made: ...                         all of them, or none

A folder with something in it is written to only when it holds a run of lowmem
(its config.yaml says so) and the user said to resume or to replace it. That file is
written first and replaced last, so that whatever is cut off leaves a folder
that can be resumed or replaced.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lowmem.errors import CheckpointError, UserError, first_line, ran_out_of_room
from lowmem.models.sealed import about, discard, ours, seal, sync
from lowmem.texts import parse_json
from lowmem.training.folder import checkpoint, staging
from lowmem.training.folder.lock import LOCK, held

CONFIG = "config.yaml"
REPORT = "memory_report.json"
OWN = {LOCK, staging.STAGING}
BESIDE = ("out_of_memory.html", "out_of_memory.json", "out_of_memory.pickle")
"""What a run may leave that belongs to no results."""


@contextmanager
def claim(folder: Path, *, resume: bool, overwrite: bool) -> Iterator[tuple[Path | None, list[str]]]:
    """Hold a folder for one run, and decide where the run starts; nothing is replaced yet.

    Args:
        folder: output folder, perhaps missing; one that stays empty is taken away again.
        resume: go on from the newest whole checkpoint.
        overwrite: replace an earlier run.

    Returns:
        The checkpoint to resume from or None, and sentences to tell the user.

    Raises:
        UserError: the folder holds something and the user did not say what to do with it, or another
            run is writing to it.
        CheckpointError: there are checkpoints and none is whole, or one that lowmem did not write.
    """
    _check_claim(folder, resume, overwrite)
    with _made(folder), held(folder):
        _check_claim(folder, resume, overwrite)  # another run may have come first
        staging.recover(folder)
        start, notes = _newest(folder) if resume else (None, [])
        checkpoint.check_no_foreign(folder, after=checkpoint.step(start) if start else 0)
        yield start, notes


def _check_claim(folder: Path, resume: bool, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    entries = sorted({p.name for p in folder.iterdir()} - OWN) if folder.is_dir() else []
    if not entries:
        return
    shown = ", ".join(entries[:3]) + (", ..." if len(entries) > 3 else "")
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"output_dir: {folder} is not empty ({shown}) and holds no run of lowmem (no {CONFIG}), "
            "it is left alone; name another folder"
        )
    if not (resume or overwrite):
        raise UserError(
            f"output_dir: {folder} is not empty ({shown}); --resume goes on with the run in it, "
            "--overwrite replaces it, or name another folder"
        )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make what is missing of a path, and take away again what stays empty."""
    made: list[Path] = []
    try:
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            path.mkdir()
            made.append(path)
    except OSError as error:
        _take_away(made)
        raise UserError(
            f"output_dir: {folder} cannot be made ({error.strerror}); name another folder"
        ) from None
    try:
        yield
    finally:
        _take_away(made)


def _take_away(made: list[Path]) -> None:
    for path in reversed(made):
        if any(path.iterdir()):
            return
        path.rmdir()


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    found, skipped = checkpoint.newest(folder)
    if found is None and skipped:
        raise CheckpointError(
            "; ".join([f"no whole checkpoint in {folder}", *skipped, "--overwrite starts afresh"])
        )
    if found is None and ours(folder):
        raise CheckpointError(
            f"no checkpoint to resume in {folder}, but results of a run that ended; --overwrite replaces them"
        )
    empty = not (folder / CONFIG).is_file()
    none = f"{'nothing to resume' if empty else 'no checkpoint'} in {folder} yet: starting from the beginning"
    return found, [*skipped, f"resuming from {found.name}" if found else none]


def check_model_stays(folder: Path, model: str, overwrite: bool) -> None:
    """Refuse to replace a folder that holds the model which is read."""
    place = Path(model).resolve()
    if overwrite and place.exists() and folder.resolve() in (place, *place.parents):
        raise UserError(f"output_dir: it holds the model that is trained, {model}; name another folder")


def begin(folder: Path, config: str, *, overwrite: bool) -> None:
    """The first write: delete what is replaced, then say what this run is.

    Args:
        folder: held by `claim`.
        config: text of the run's config.yaml.
        overwrite: an earlier run's results and checkpoints go; what no run wrote stays.
    """
    beside = staging.fresh(folder) / CONFIG
    try:
        beside.write_text(config, encoding="utf-8")
        sync(beside)
        if overwrite:
            _clear(folder)
        os.replace(beside, folder / CONFIG)
        sync(folder)
    finally:
        discard(staging.staging(folder))


def _clear(folder: Path) -> None:
    """Delete what an earlier run left but its config.yaml, the newest checkpoint last."""
    staging.retract(folder)
    for path in reversed(checkpoint.checkpoints(folder)):
        if ours(path):
            os.rename(path, staging.staging(folder) / f"old-{path.name}")
    for name in BESIDE:
        (folder / name).unlink(missing_ok=True)


@contextmanager
def results(folder: Path, belongs: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write results to; they appear in `folder` when all of them are there.

    Args:
        folder: of the run.
        belongs: what they are of, kept in their manifest.
    """
    try:
        made = staging.results(folder)
        yield made
        for path in made.iterdir():
            path.chmod(0o644)  # safetensors writes 0600: a shared folder could not be read
        seal(made, belongs)
    except BaseException as error:  # safetensors and tokenizers have classes of their own for a full disk
        discard(staging.staging(folder))
        if not isinstance(error, OSError) and not ran_out_of_room(error):
            raise
        raise UserError(
            f"could not write the results to {folder}: {first_line(error)}; make room, then --resume"
        ) from error
    staging.publish_results(folder)


def earlier_report(folder: Path, step: int) -> dict[str, Any] | None:
    """The memory report beside results of this step; what it says of the run itself left out."""
    if not ours(folder) or about(folder).get("steps") != step:
        return None
    try:
        report: dict[str, Any] = parse_json((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {key: value for key, value in report.items() if key not in ("result", "log")} or None
