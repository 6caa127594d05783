"""Several processes that do one task together, forked from one that has imported what they need."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def together(task: str, ranks: int, given: Path) -> list[str]:
    """What all ranks found wrong with a task of `worker` or `forker`.

    Args:
        task: its name; ranks: processes; given: the folder that it reads.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        assert not any(ended(task, ranks, given, folder)), logs(folder)
        found = [json.loads((folder / f"found{rank}.json").read_text()) for rank in range(ranks)]
    return [f"rank {rank}: {line}" for rank, lines in enumerate(found) for line in lines]


def ended(task: str, ranks: int, given: Path, folder: Path) -> list[int]:
    """How each rank ended, as `os.waitstatus_to_exitcode` says it; where one fails the others are killed."""
    forker = _forker()
    assert forker.stdin is not None
    assert forker.stdout is not None
    forker.stdin.write(json.dumps([task, ranks, str(given), str(folder)]) + "\n")
    forker.stdin.flush()
    codes: list[int] = json.loads(forker.stdout.readline())
    return codes


def logs(folder: Path) -> str:
    """The last lines that each rank printed."""
    return "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(folder.glob("log*")))


@functools.cache
def _forker() -> subprocess.Popen[str]:
    """The process that forks; it ends with this one, whose end of the pipe is closed then."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "trainer")])
    return subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.forker"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
