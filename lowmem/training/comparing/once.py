"""A run of `lowmem finetune` as a child process of its own, kept once it is done.

    config -> FOLDER/NAME.yaml, NAME.log -> child -> FOLDER/NAME.json, with the settings it belongs to

What recipes that compare many runs share: calling again with the same settings reads the JSON, with others
it runs anew, and after an interruption it goes on from the newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig, dump
from lowmem.errors import UserError

Keep = Callable[[Mapping[str, Any], Path], Mapping[str, Any]]  # the run's result, its folder -> what to keep


def once(config: RunConfig, folder: Path, keep: Keep, *, tidy: bool = False) -> dict[str, Any]:
    """What a run found, and the settings it belongs to: kept from before, or by a child process.

    Args:
        config: whose `output_dir` is a folder below `folder`; its name is that of the run.
        folder: of the results.
        keep: what of the result of `lowmem finetune` and of its folder is wanted later.
        tidy: remove the run's own folder, with its model, when it is done.

    Raises:
        UserError: the run failed; the message names its log.
    """
    work = Path(str(config.output_dir))
    wanted = fingerprint(config)
    file = folder / f"{work.name}.json"
    if file.is_file() and (kept := json.loads(file.read_text(encoding="utf-8")))["settings"] == wanted:
        return dict(kept)
    found = {"settings": wanted, **keep(_child(config, folder, work), work)}
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(beside, file)
    if tidy:
        shutil.rmtree(work, ignore_errors=True)
    return found


def fingerprint(config: RunConfig) -> str:
    """By which a kept run is known to be the one that is asked for."""
    return hashlib.sha256(dump(config).encode()).hexdigest()


def _child(config: RunConfig, folder: Path, work: Path) -> dict[str, Any]:
    """The document of `lowmem finetune --json` of a run."""
    settings, log = folder / f"{work.name}.yaml", folder / f"{work.name}.log"
    settings.write_text(dump(config), encoding="utf-8")
    again = ["--resume"] if any(work.glob("checkpoint-*")) else ["--overwrite"]
    command = [sys.executable, "-m", "lowmem", "finetune", "--config", str(settings), "--json", *again]
    with open(log, "a", encoding="utf-8") as said:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=said, text=True, check=False)
    if child.returncode:
        raise UserError(f"{work.name} ended with {child.returncode}: see {log}")
    found: dict[str, Any] = json.loads(child.stdout)
    return found
