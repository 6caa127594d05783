"""One of several processes that train a tiny model by forward passes: FOLDER, and steps."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from tiny_runs import trainer, weights

folder, steps, rank = Path(sys.argv[1]), int(sys.argv[2]), int(os.environ.get("RANK", "0"))
alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
run = trainer(
    folder / "run", optim="mezo", max_steps=steps, learning_rate=1e-3, lr_scheduler_type="constant",
    per_device_train_batch_size=4 if alone else 2,
)  # fmt: skip
compute = run.compute_loss


def spoilt(*args, **kwargs):
    """The last step of one process meets a loss that is not finite."""
    loss = compute(*args, **kwargs)
    return loss * float("nan") if rank == 1 and run.state.global_step == 3 else loss


run.compute_loss = spoilt
run.train()
assert run.model_wrapped is run.model
assert (run.lowmem_optimizer.nonfinite() > 0) == (not alone)
torch.save(weights(run) | {"log": torch.tensor(run.replay_log.steps[0][1])}, folder / f"weights-{rank}.pt")
if not alone:
    torch.distributed.destroy_process_group()
    os._exit(0)  # threads of gloo that ask for the interpreter while it ends abort the process
