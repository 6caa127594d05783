"""Several processes that do one task together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 300
"""Seconds for one start."""


def together(task: str, ranks: int, given: Path) -> list[str]:
    """What all ranks found wrong with a task of `worker`.

    Args:
        task: its name; ranks: processes; given: the folder that it reads.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = [_start(task, rank, ranks, given, folder, environment) for rank in range(ranks)]
        try:
            _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
        logs = "\n".join((folder / f"log{rank}").read_text()[-2000:] for rank in range(ranks))
        assert all(process.returncode == 0 for process in started), logs
        found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]
    return [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines]


def _start(
    task: str, rank: int, ranks: int, given: Path, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.distributed.worker", task, str(rank), str(ranks)]
    with (folder / f"log{rank}").open("wb") as log:
        return subprocess.Popen(
            [*command, str(given), str(folder)], cwd=ROOT, env=environment, stdout=log, stderr=log
        )


def _wait(started: list[subprocess.Popen[bytes]]) -> None:
    """Until all are done, or one has failed."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and any(process.poll() is None for process in started):
        if any(process.poll() not in (None, 0) for process in started):
            return
        time.sleep(0.2)
