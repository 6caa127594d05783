"""Killed at any moment, a run resumes from a whole checkpoint to the very same weights."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowmem.training.folder import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def order():
    """Give an order to a process that trains in forks; importing happens once."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed_runs.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )

    def give(folder: Path, **values):
        process.stdin.write(json.dumps({"folder": str(folder), **values}) + "\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    yield give
    process.stdin.close()
    process.wait(timeout=60)
    process.stdout.close()


@pytest.fixture(scope="module")
def whole(order, tmp_path_factory):
    """The uninterrupted run."""
    answer = order(tmp_path_factory.mktemp("whole") / "run")
    assert answer["signal"] is None
    return answer


def test_twenty_seeded_moments(order, whole, tmp_path):
    moments = sorted(random.Random(0).sample(range(1, whole["moments"] + 1), 20))
    started = set()
    for moment in moments:
        folder = tmp_path / f"killed-{moment}"
        assert order(folder, moment=moment)["signal"] == 9, moment
        again = order(folder)
        assert again["signal"] is None
        assert again["digest"] == whole["digest"], moment
        assert again["skipped"] == [], moment  # a folder named checkpoint-N is whole, always
        started.add(again["from"])
        left = {p.name for p in folder.iterdir()}
        assert left - {"checkpoint-4"} == {"checkpoint-6", "checkpoint-8"}, (
            moment
        )  # 4: killed before its turn
        assert all(checkpoint.damage(folder / name) is None for name in left), moment
        shutil.rmtree(folder)
    assert len(started) >= 4, started  # the moments were spread over the run


def test_killed_again_and_again_in_one_folder(order, whole, tmp_path):
    chance = random.Random(1)
    for _ in range(4):
        order(tmp_path, moment=chance.randrange(1, whole["moments"] // 2))
    assert order(tmp_path)["digest"] == whole["digest"]


def test_killed_from_outside(order, whole, tmp_path):
    for wait in (0.05, 0.25, 0.6):
        folder = tmp_path / str(wait)
        order(folder, wait=wait)
        assert order(folder)["digest"] == whole["digest"], wait
