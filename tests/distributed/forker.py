"""Forks the processes of a task: reads [TASK, RANKS, GIVEN, FOLDER] a line, writes how they ended.

What a task needs is imported once, before the first fork. One that fails takes the others with it, as
under torchrun, for they would wait for it.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

TRAINED = {
    "train": "tests.distributed.training:train_all",
    "finetune": "tests.distributed.finetuning:finetune",
    "copies": "tests.distributed.copies:train_copies",
    "write": "tests.distributed.onward:write",
    "read": "tests.distributed.onward:read",
}
STEPPED = "tests.distributed.worker"
"""Where the others are."""
PATIENCE = 300
"""Seconds for one task."""


def home(task: str) -> tuple[str, str]:
    """The module of a task, and the name of its function where it is not by its own name."""
    module, _, name = TRAINED.get(task, STEPPED).partition(":")
    return module, name


def rank_of(task: str, rank: int, ranks: int, given: Path, folder: Path) -> None:
    """Do a task on what is given, and leave what was found wrong in a file."""
    module, name = home(task)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    tasks = vars(importlib.import_module(module))
    found = (tasks[name] if name else tasks["TASKS"][task])(given, init_device_mesh("cpu", (ranks,)))
    (folder / f"found{rank}.json").write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def child(task: str, rank: int, ranks: int, given: Path, folder: Path, port: int) -> NoReturn:
    """A rank, from its first breath to its last."""
    log = os.open(folder / f"log{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {key: str(value) for key, value in (numbers | {"MASTER_PORT": port}).items()}
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    code = 1
    try:
        rank_of(task, rank, ranks, given, folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo that ask for the interpreter while it ends abort the process


def waited(children: list[int]) -> list[int]:
    """How all of them ended."""
    codes: dict[int, int] = {}
    end = time.monotonic() + PATIENCE
    while len(codes) < len(children):
        for pid in set(children) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or time.monotonic() > end:
            for pid in set(children) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in children]


def serve() -> None:
    """Until nobody asks any more."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        task, ranks, given, folder = json.loads(line)
        importlib.import_module(home(task)[0])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        children = []
        for rank in range(ranks):
            if not (pid := os.fork()):
                child(task, rank, ranks, Path(given), Path(folder), port)
            children.append(pid)
        sys.stdout.write(json.dumps(waited(children)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
