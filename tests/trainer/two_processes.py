"""One of two processes that train the same tiny model: FOLDER, and 1 to resume."""

import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy
import torch
from tiny_runs import trainer, weights

folder, resume = Path(sys.argv[1]), sys.argv[2] == "1"
run = trainer(
    folder / "run", optim="galore", optim_args="rank=4,update_proj_gap=3", max_steps=6,
    save_strategy="steps", save_steps=3, save_total_limit=2,
)  # fmt: skip
for _ in range(run.args.process_index):  # nothing may be drawn from a process's own generators
    random.random(), numpy.random.rand(), torch.rand(1)
run.train(resume_from_checkpoint=resume)
torch.save(weights(run), folder / f"weights-{run.args.process_index}-{int(resume)}.pt")
torch.distributed.destroy_process_group()
os._exit(0)  # threads of gloo that ask for the interpreter while it ends abort the process
