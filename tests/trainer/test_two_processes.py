"""Plain data parallelism: one whole checkpoint from two processes, and an exact resume."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_runs import assert_equal, keep_only

from lowmem.training.folder import checkpoint

pytestmark = pytest.mark.slow


def run(folder, resume):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"),
        *(str(Path(__file__).with_name("two_processes.py")), str(folder), str(int(resume))),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"weights-{rank}-{int(resume)}.pt") for rank in (0, 1)]


def test_two_processes_agree_and_resume_bit_exactly(tmp_path):
    first = run(tmp_path, resume=False)
    assert_equal(*first)
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-3", "checkpoint-6"]
    assert all(checkpoint.damage(tmp_path / "run" / name) is None for name in names)
    keep_only(tmp_path / "run", 3)
    again = run(tmp_path, resume=True)
    assert_equal(first[0], again[0])
    assert_equal(*again)


def probe(folder, processes, steps):
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launched = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}")
    script = (str(Path(__file__).with_name("two_probers.py")), str(folder), str(steps))
    command = [sys.executable, *(launched if processes > 1 else ()), *script]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"weights-{rank}.pt") for rank in range(processes)]


def test_two_processes_without_gradients_are_one_with_the_joined_batch(tmp_path):
    """They exchange losses alone; where one of them is not finite both leave the step out."""
    first, second = probe(tmp_path / "two", 2, 4)
    assert_equal(first, second)
    (alone,) = probe(tmp_path / "one", 1, 3)  # the fourth step of the two is the one that is left out
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-5)
