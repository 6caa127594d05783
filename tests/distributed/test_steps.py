"""Every strategy on 2, 3 and 4 processes takes the steps of one, its rows sharded by FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed import steps
from tests.distributed.ranks import together


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


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_plain_loop_has_the_losses_of_one_process(ranks: int, tmp_path: Path) -> None:
    assert together("loop", ranks, tmp_path) == []
