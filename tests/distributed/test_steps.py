"""Every strategy on 2, 3 and 4 processes takes the steps of one, its rows sharded by FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import moving, steps
from tests.distributed.ranks import ROOT, together


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of one device, a file for each run."""
    folder = tmp_path_factory.mktemp("one_device")
    for case, dtype in {*steps.chosen(2), *steps.chosen(3)}:
        torch.save(steps.reference(case, dtype), folder / f"{steps.key(case, dtype)}.pt")
    return folder


def test_strategies_step_as_on_one_device(references: Path) -> None:
    wrong = {ranks: together("step", ranks, references) for ranks in (2, 3, 4)}
    assert not any(wrong.values()), wrong


@pytest.mark.thorough
def test_ranks_move_what_is_counted(tmp_path: Path) -> None:
    assert together("moved", 2, tmp_path) == []


def test_the_guide_says_what_is_moved() -> None:
    guide = (ROOT / "docs/guides/shard.md").read_text(encoding="utf-8").splitlines()
    for name in moving.FEW:
        word, told = moving.entry(name)
        assert any(line.startswith(f"| {word} |") and told in line for line in guide), told


@pytest.mark.thorough
def test_the_guide_says_what_each_method_moves() -> None:
    assert moving.table() in (ROOT / "docs/guides/shard.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plain_loop_has_the_losses_of_one_process(ranks: int, tmp_path: Path) -> None:
    assert together("loop", ranks, tmp_path) == []
