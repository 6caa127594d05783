"""A process that trains tiny models in forks of itself and has them killed.

Reads one JSON order a line: {"folder", "moment", "wait"}. A fork trains to the
end, resuming from whatever the folder holds. With `moment` k it dies by SIGKILL
at the k-th of the moments that matter (a step, a write, a sync, a rename, a
delete); a write may be cut in half first. With `wait` it is killed from outside
after that many seconds. Answers with the exit status, the number of moments that
passed and a digest of the final weights.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from tiny_runs import trainer

from lowmem.training.folder import checkpoint

STEPS = 8


class Clock:
    """Counts the moments and dies at one of them."""

    def __init__(self, last: int | None) -> None:
        self.now, self.last = 0, last

    def tick(self, written: Path | None = None) -> None:
        self.now += 1
        if self.now == self.last:
            if written is not None and written.is_file() and self.now % 2:
                os.truncate(written, written.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str, written: int | None = None) -> None:
        """A moment before each call of a function, and one after it where it writes its argument."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = original(*args, **kwargs)
            if written is not None:
                self.tick(Path(args[written]))
            return result

        setattr(owner, name, call)


def train(folder: Path, clock: Clock) -> dict[str, Any]:
    """Train to the end from the newest whole checkpoint, or from the beginning."""
    clock.watch(torch, "save", written=1)
    clock.watch(transformers.PreTrainedModel, "save_pretrained")
    for owner, name in ((os, "fsync"), (os, "rename"), (shutil, "rmtree")):
        clock.watch(owner, name)
    found, skipped = checkpoint.newest(folder)
    run = trainer(
        folder,
        optim="galore",
        optim_args="rank=2,update_proj_gap=3",
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
    )
    clock.watch(run, "training_step")
    run.train(resume_from_checkpoint=str(found) if found else None)
    digest = hashlib.sha256()
    for name, p in sorted(run.model.named_parameters()):
        digest.update(name.encode() + p.detach().numpy().tobytes())
    from_step = int(found.name.split("-")[1]) if found else 0
    return {"digest": digest.hexdigest(), "moments": clock.now, "from": from_step, "skipped": skipped}


def fork(order: dict[str, Any]) -> dict[str, Any]:
    """Carry out one order in a fork."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            answer = train(Path(order["folder"]), Clock(order.get("moment")))
            os.write(write, json.dumps(answer).encode())
        except BaseException as error:
            os.write(write, json.dumps({"error": repr(error)}).encode())
        os._exit(0)
    os.close(write)
    if order.get("wait") is not None:
        time.sleep(order["wait"])
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(read) as stream:
        text = stream.read()
    return {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else None, **json.loads(text or "{}")}


def main() -> None:
    """Answer orders until the input ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
    for line in sys.stdin:
        sys.__stdout__.write(json.dumps(fork(json.loads(line))) + "\n")
        sys.__stdout__.flush()


if __name__ == "__main__":
    main()
