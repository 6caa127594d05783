"""Several processes that do one run: the first holds its folder and writes, all step together.

`torchrun` starts them and ends them all where one of them fails, so that the others may wait for the first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lowmem.training.folder.output import claim


@contextmanager
def claimed(args: Any, *, resume: bool, overwrite: bool) -> Iterator[tuple[Path | None, Sequence[str]]]:
    """`claim` the output folder in the first process, which tells the others where the run starts.

    Args:
        args: training arguments; resume, overwrite: as for `claim`.
    """
    with ExitStack() as stack:
        found: tuple[Path | None, Sequence[str]] = (None, ())
        if args.should_save:
            held = claim(Path(args.output_dir), resume=resume, overwrite=overwrite)
            found = stack.enter_context(held)
        yield said(found, args.world_size)


def said(value: Any, ranks: int) -> Any:
    """What the first of several processes says, in all of them."""
    if ranks == 1:
        return value
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def joined(values: list[Any], ranks: int) -> list[Any]:
    """The lists of all processes one after the other, in all of them."""
    if ranks == 1:
        return values
    import torch.distributed as dist

    found: list[Any] = [None] * ranks
    dist.all_gather_object(found, values)
    return [value for own in found for value in own]


@contextmanager
def shared_folder(args: Any) -> Iterator[Path]:
    """A folder that all processes see, beside what the run writes; it is gone afterwards.

    Args:
        args: training arguments.
    """
    name = ""
    if args.process_index == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        name = tempfile.mkdtemp(prefix=".shared-", dir=args.output_dir)
    folder = Path(said(name, args.world_size))
    try:
        yield folder
    finally:
        said(None, args.world_size)  # the others have read it, or failed
        if args.process_index == 0:
            shutil.rmtree(folder)


def own_batches(trainer: Any) -> Iterator[tuple[Any, bool]]:
    """This process's evaluation batches, and whether each counts; all have equally many.

    Where they shard a model they run it together, so one that has no batch left repeats another's.
    """
    rank, ranks = trainer.args.process_index, trainer.args.world_size
    if ranks == 1:
        yield from ((batch, True) for batch in trainer.get_eval_dataloader())
        return
    with patch.object(trainer.accelerator, "prepare", lambda loader: loader):  # it would repeat rows instead
        batches = iter(trainer.get_eval_dataloader())
    while turn := list(islice(batches, ranks)):
        yield turn[min(rank, len(turn) - 1)], rank < len(turn)


def summed(trainer: Any, *values: float) -> list[float]:
    """Sums over the processes."""
    if trainer.args.world_size == 1:
        return list(values)
    own = torch.tensor(values, dtype=torch.float64, device=trainer.args.device)
    total: list[float] = trainer.accelerator.reduce(own, "sum").tolist()
    return total
