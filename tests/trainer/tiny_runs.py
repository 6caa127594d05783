"""Short training runs on tiny models, and what they leave."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import tiny

from lowmem.training.arguments import LowMemArguments
from lowmem.training.trainer import LowMemTrainer

BASE: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
}


class Rows(torch.utils.data.Dataset):
    """Random token rows; each is a pure function of its index."""

    def __init__(self, count: int = 40, length: int = 10) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(3, 61, (self.length,), generator=generator)
        labels = ids.clone()
        labels[: index % 4] = -100
        return {"input_ids": ids, "labels": labels}


def trainer(
    folder: Path, *, model: Any = None, rows: Any = None, held: Any = None, **values: Any
) -> LowMemTrainer:
    """A LowMemTrainer on a tiny model, silent."""
    args = LowMemArguments(output_dir=str(folder), **(BASE | values))
    model = tiny() if model is None else model
    made = LowMemTrainer(model, args, train_dataset=rows or Rows(), eval_dataset=held)
    made.remove_callback(transformers.PrinterCallback)
    return made


def stock(folder: Path, choice: Any, *, model: Any = None, rows: Any = None, **values: Any) -> Any:
    """A stock Trainer with a lowmem optimizer, silent."""
    args = transformers.TrainingArguments(output_dir=str(folder), **(BASE | values))
    made = transformers.Trainer(
        tiny() if model is None else model,
        args,
        train_dataset=rows or Rows(),
        optimizer_cls_and_kwargs=choice,
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def weights(run: Any) -> dict[str, torch.Tensor]:
    """A copy of what the run trained."""
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert list(a) == list(b)
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def keep_only(folder: Path, step: int) -> None:
    """Delete all checkpoints but one."""
    for path in folder.glob("checkpoint-*"):
        if path.name != f"checkpoint-{step}":
            shutil.rmtree(path)


def logged(run: Any, key: str) -> list[float]:
    """What the run logged under a key, in order."""
    return [entry[key] for entry in run.state.log_history if key in entry]
