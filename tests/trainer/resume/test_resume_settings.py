"""Resumed with other settings: what can be changed is used from the next step on, the rest is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_runs import assert_equal, keep_only, logged, trainer, weights

from lowmem.errors import CheckpointError
from lowmem.training.trainer import LowMemTrainer

RUN: dict[str, Any] = {
    "optim": "galore",
    "optim_args": "rank=2,update_proj_gap=3",
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


class Turn(transformers.TrainerCallback):
    """Sets numbers of every parameter group after step 3, by hand."""

    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            for group in kwargs["optimizer"].param_groups:
                decays = group["weight_decay"] > 0
                group.update({k: v for k, v in self.numbers.items() if k != "weight_decay" or decays})
            if "lr" in self.numbers:
                scheduler = kwargs["lr_scheduler"]
                scheduler.base_lrs = [self.numbers["lr"]] * len(scheduler.base_lrs)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of six steps of which only the checkpoint of the third is left."""
    folder = tmp_path_factory.mktemp("half") / "run"
    trainer(folder, **RUN).train()
    keep_only(folder, 3)
    return folder


def resumed(half: Path, folder: Path, **values: Any) -> tuple[LowMemTrainer, list[str]]:
    """The second half of the run with other values, and what it said."""
    shutil.copytree(half, folder)
    run, said = trainer(folder, **(RUN | values)), []
    run.tell = said.append
    run.train(resume_from_checkpoint=True)
    return run, said


@pytest.mark.parametrize(
    ("values", "numbers", "words"),
    [
        ({"learning_rate": 3e-3}, {"lr": 3e-3}, "lr: 0.01 -> 0.003"),
        ({"weight_decay": 0.5}, {"weight_decay": 0.5}, "weight_decay: 0.1 -> 0.5"),
        ({"adam_beta1": 0.5}, {"betas": (0.5, 0.999)}, "betas: [0.9, 0.999] -> [0.5, 0.999]"),
        ({"adam_epsilon": 1e-2}, {"eps": 1e-2}, "eps: 1e-08 -> 0.01"),
    ],
)
def test_numbers_of_the_optimizer_act_from_the_next_step_on(
    half: Path, tmp_path: Path, values: dict[str, Any], numbers: dict[str, Any], words: str
) -> None:
    by_hand = trainer(tmp_path / "whole", **RUN | {"save_strategy": "no"})
    by_hand.add_callback(Turn(**numbers))
    by_hand.train()
    run, said = resumed(half, tmp_path / "half", **values)
    assert said == [f"resuming with another {words}"]
    assert_equal(weights(run), weights(by_hand))
    again, said = resumed(half, tmp_path / "same")
    assert said == []
    assert any((a != b).any() for a, b in zip(weights(run).values(), weights(again).values(), strict=True))


def test_a_schedule_is_taken_over_at_the_step_it_has_reached(half: Path, tmp_path: Path) -> None:
    run, said = resumed(half, tmp_path / "run", lr_scheduler_type="linear", learning_rate=0.1, max_steps=10)
    assert said == [
        "resuming with another lr: 0.01 -> 0.1",
        "resuming with another schedule: 'constant' -> 'linear'",
        "resuming with another steps: 6 -> 10",
    ]
    rates = logged(run, "learning_rate")
    # the Trainer logs, after a step, the rate of the optimizer before the schedule moves on
    assert rates[3:] == pytest.approx([0.1 * (10 - step) / 10 for step in range(3, 10)], rel=1e-12)


def test_saving_and_logging_go_by_the_present_run(half: Path, tmp_path: Path) -> None:
    run, _ = resumed(half, tmp_path / "run", save_steps=1, logging_steps=2, save_total_limit=5)
    assert {p.name for p in (tmp_path / "run").iterdir()} == {f"checkpoint-{n}" for n in (3, 4, 5, 6)}
    assert [e["step"] for e in run.state.log_history if "loss" in e] == [1, 2, 3, 4, 6]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"seed": 7}, r"seed: 42 -> 7"),
        ({"data_seed": 7}, r"data_seed: None -> 7"),
        ({"compile": "on"}, r"compile: 'auto' -> 'on'"),
        ({"gradient_accumulation_steps": 2}, r"rows_per_step: 2 -> 4"),
        ({"seed": 7, "compile": "off"}, r"compile: 'auto' -> 'off'; seed: 42 -> 7"),
    ],
)
def test_what_would_make_it_another_run_is_refused(
    half: Path, tmp_path: Path, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"other settings: {words}; .* start afresh") as caught:
        resumed(half, tmp_path / "run", **values)
    assert "\n" not in str(caught.value)


def test_the_same_rows_in_other_batches_are_the_same_run(half: Path, tmp_path: Path) -> None:
    _, said = resumed(half, tmp_path / "run", per_device_train_batch_size=1, gradient_accumulation_steps=2)
    assert said == []


def test_nothing_is_announced_that_no_step_is_left_for(half: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lr: 0.01 -> 0.02: checkpoint-3 is the last of 3 steps"):
        resumed(half, tmp_path / "done", max_steps=3, learning_rate=0.02)
    with pytest.raises(CheckpointError, match=r"checkpoint-3 has taken 3 already, this run has 2"):
        resumed(half, tmp_path / "less", max_steps=2)


def test_a_checkpoint_of_another_source_is_refused_unless_that_moved(half: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    for path in (here, there):
        path.write_text("{}")
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    run = trainer(folder, **RUN | {"max_steps": 4, "save_steps": 4})
    run.tell, run.origin = [].append, {"data": str(here)}
    with pytest.raises(CheckpointError, match="data: None"):
        run.train(resume_from_checkpoint=True)
    first = trainer(folder, **RUN | {"max_steps": 1})
    first.origin = {"data": str(here)}
    first.train()
    run = trainer(folder, **RUN | {"max_steps": 2})
    said: list[str] = []
    run.tell, run.origin = said.append, {"data": str(there)}
    with pytest.raises(CheckpointError, match=r"data: .*here\.jsonl' -> .*there\.jsonl"):
        run.resume_path(str(folder / "checkpoint-1"))
    here.unlink()
    run.resume_path(str(folder / "checkpoint-1"))
    assert said[0] == f"data: {here} is gone, {there} takes its place"
