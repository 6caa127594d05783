"""A run whose loss is not finite says so, keeps the checkpoint before it, and ends."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Rows, logged, trainer

from lowmem.errors import ConfigError, UserError
from lowmem.training.arguments import LowMemArguments
from lowmem.training.folder import checkpoint
from lowmem.training.trainer import LowMemTrainer

RUN: dict[str, Any] = {
    "optim": "adamw",
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
}


def spoiled(folder: Path, bad: range, *, weights: bool = False, **values: Any) -> LowMemTrainer:
    """A run whose loss is NaN at some steps, or whose weights are before the first of them."""
    run = trainer(folder, **RUN | values)
    compute = run.compute_loss

    def loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        at = run.state.global_step + 1
        if weights and at == bad.start:
            with torch.no_grad():
                next(model.parameters())[7, 3] = math.inf
        factor = math.nan if at in bad and not weights else 1.0
        return compute(model, inputs, *args, **kwargs) * factor

    run.compute_loss = loss
    run.tell = [].append
    return run


@pytest.mark.parametrize("optim", ["adamw", "mezo"])
def test_it_ends_after_the_limit_and_names_the_checkpoint_before(tmp_path: Path, optim: str) -> None:
    run = spoiled(tmp_path, range(4, 99), optim=optim, nonfinite_limit=3)
    words = r"not finite since step 4, 3 steps in a row; .*checkpoint-3 is the last checkpoint before it"
    with pytest.raises(UserError, match=words) as caught:
        run.train()
    assert "\n" not in str(caught.value)
    assert run.state.global_step == 6
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoint.damage(tmp_path / "checkpoint-3") is None
    assert all(math.isnan(value) for value in logged(run, "loss")[3:])


def test_steps_in_a_row_count_and_others_do_not(tmp_path: Path) -> None:
    run = spoiled(tmp_path, range(4, 6), nonfinite_limit=3)
    run.train()
    assert [step for step, value in enumerate(logged(run, "loss"), 1) if math.isnan(value)] == [4, 5]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-12"]


def test_a_window_of_micro_batches_is_one_step(tmp_path: Path) -> None:
    run = spoiled(tmp_path, range(2, 99), nonfinite_limit=2, gradient_accumulation_steps=3)
    with pytest.raises(UserError, match="since step 2, 2 steps in a row"):
        run.train()


def test_ruined_weights_are_not_saved_even_while_the_loss_is_finite(tmp_path: Path) -> None:
    said: list[str] = []

    class Unlucky(Rows):
        """Rows without token 7, whose embedding the loss never sees."""

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            row = super().__getitem__(index)
            return {key: torch.where(value == 7, 8, value) for key, value in row.items()}

    run = spoiled(tmp_path, range(4, 5), weights=True, rows=Unlucky(), nonfinite_limit=2)
    run.tell = said.append
    with pytest.raises(UserError, match="checkpoint-3"):
        run.train()
    assert said[0] == "checkpoint-4 is not saved: the weights are not finite"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_without_a_checkpoint_it_says_so_and_zero_never_ends(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint was saved before it"):
        spoiled(tmp_path / "a", range(1, 99), nonfinite_limit=1).train()
    run = spoiled(tmp_path / "b", range(1, 99), nonfinite_limit=0, max_steps=7)
    run.train()
    assert run.state.global_step == 7


def test_a_negative_limit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nonfinite_limit: -1"):
        LowMemArguments(output_dir=str(tmp_path), nonfinite_limit=-1, use_cpu=True)
