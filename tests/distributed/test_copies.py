"""Plain data parallelism: copies that stay equal, one whole checkpoint, and what is exchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_runs import assert_equal, trainer, weights

from lowmem.strategies import create
from lowmem.training.folder import checkpoint
from lowmem.training.ranks.low_rank_sync import needs_whole
from tests.distributed.copies import GALORE, PROBED
from tests.distributed.ranks import together


def test_copies_agree_resume_exactly_and_exchange_what_they_must(tmp_path: Path) -> None:
    assert together("copies", 2, tmp_path) == []
    left = {(name, rank): torch.load(tmp_path / f"{name}-{rank}.pt") for name in NAMES for rank in (0, 1)}
    for name in NAMES:
        assert_equal(left[name, 0], left[name, 1])
    assert_equal(left["run", 0], left["half", 0])
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == ["checkpoint-3", "checkpoint-6"]
    assert all(checkpoint.damage(tmp_path / "run" / name) is None for name in names)
    near(left["seen", 0], one_process(tmp_path / "one-seen", **GALORE, clip="none"), 1e-4)
    # the fourth step of the two is the one that is left out
    near(left["probed", 0], one_process(tmp_path / "one-probed", **{**PROBED, "max_steps": 3}), 1e-3)


NAMES = ("run", "half", "seen", "probed")


def one_process(folder: Path, **values: object) -> dict[str, torch.Tensor]:
    run = trainer(folder, **{**values, "per_device_train_batch_size": 4})
    run.train()
    return weights(run)


def near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], rtol: float) -> None:
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("fira", {}, "needs whole gradients"),
        ("adamw", {}, "needs whole gradients"),
        ("mezo", {}, "needs whole gradients"),
        ("galore", {"update_proj_gap": 1}, "update_proj_gap > 1"),
        ("galore", {}, ""),
    ],
)
def test_projections_are_exchanged_where_they_suffice(name: str, options: dict[str, int], words: str) -> None:
    found = needs_whole(create(name, **options))
    assert bool(found) == bool(words)
    assert words in found
