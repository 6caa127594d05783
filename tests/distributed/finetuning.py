"""`lowmem finetune` on ranks, with the flags of a file."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import transformers

import lowmem.cli as cli
from lowmem.training.trainer import LowMemSFTTrainer
from tests.distributed.on_cpu import let_cpus_shard


class Killed(transformers.TrainerCallback):  # type: ignore[misc]
    """Ends the last rank by SIGKILL after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Die if it is time."""
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


def finetune(given: Path, mesh: Any) -> list[str]:
    """Run the command line; where the file says so, a rank dies on the way."""
    order = json.loads((given / "order.json").read_text())
    let_cpus_shard()
    if order["dies"]:
        made = LowMemSFTTrainer.__init__

        def make(self: Any, *args: Any, **kwargs: Any) -> None:
            made(self, *args, **kwargs)
            self.add_callback(Killed(order["dies"]))

        LowMemSFTTrainer.__init__ = make
    code = cli.app(["finetune", *order["flags"]], standalone_mode=False)
    return [f"ended with {code}"] if code else []
