"""The folder of a run: who may write there, and how results get there whole.

A folder with something in it is written to only when it holds a run of lowmem
(its config.yaml says so) and the user said to resume or to replace it. Results
are made in the staging folder and moved, so an error leaves no half of a file.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from lowmem.errors import CheckpointError, UserError, first_line, ran_out_of_room
from lowmem.training import checkpoint

CONFIG = "config.yaml"
RESULTS = (
    CONFIG,
    "*.safetensors",
    "*.safetensors.index.json",
    "README.md",
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "loss.png",
    "memory_report.*",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*.json",
    "tokenizer.model",
    "training_args.bin",
    "vocab.*",
)
"""What a run leaves beside its checkpoints, and may replace."""


def claim(folder: Path, *, resume: bool, overwrite: bool) -> tuple[Path | None, list[str]]:
    """Decide where a run starts, before anything is written.

    Args:
        folder: output folder, perhaps missing.
        resume: go on from the newest whole checkpoint.
        overwrite: replace an earlier run.

    Returns:
        The checkpoint to resume from or None, and sentences to tell the user.

    Raises:
        UserError: the folder holds something and the user did not say what to do with it.
        CheckpointError: there are checkpoints and none is whole.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output_dir: {folder} is a file; name a folder")
    _try_to_make(folder)
    entries = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    if not entries:
        note = f"nothing to resume in {folder} yet: starting from the beginning"
        return None, [note] if resume else []
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
    return _newest(folder) if resume else (None, [])


def _try_to_make(folder: Path) -> None:
    """Make what is missing of a path and take it away again: a folder that cannot be is said at once."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    made = []
    try:
        for path in reversed(missing):
            path.mkdir()
            made.append(path)
    except OSError as error:
        raise UserError(
            f"output_dir: {folder} cannot be made ({error.strerror}); name another folder"
        ) from None
    finally:
        for path in reversed(made):
            path.rmdir()


def _newest(folder: Path) -> tuple[Path | None, list[str]]:
    found, skipped = checkpoint.newest(folder)
    if found is None and skipped:
        raise CheckpointError(
            "; ".join([f"no whole checkpoint in {folder}", *skipped, "--overwrite starts afresh"])
        )
    note = (
        f"resuming from {found.name}"
        if found
        else f"no checkpoint in {folder} yet: starting from the beginning"
    )
    return found, [*skipped, note]


def clear(folder: Path) -> None:
    """Delete what an earlier run left; files and folders that no run writes stay."""
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir() and (checkpoint.is_checkpoint_name(path) or path == checkpoint.staging(folder)):
            shutil.rmtree(path)
        elif path.is_file() and _is_result(path.name):
            path.unlink()


@contextmanager
def results(folder: Path) -> Iterator[Path]:
    """A folder to write results to; they are moved into `folder` when all of them are there."""
    made = checkpoint.staging(folder) / "results"
    shutil.rmtree(made, ignore_errors=True)
    try:
        made.mkdir(parents=True)
        yield made
        for path in sorted(made.iterdir()):
            path.chmod(0o644)  # safetensors writes 0600: a shared folder could not be read
            os.replace(path, folder / path.name)
    except Exception as error:  # safetensors and tokenizers have classes of their own for a full disk
        if not ran_out_of_room(error):
            raise
        raise UserError(
            f"could not write the results to {folder}: {first_line(error)}; make room, then --resume"
        ) from error
    finally:
        shutil.rmtree(checkpoint.staging(folder), ignore_errors=True)


def _is_result(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in RESULTS)
