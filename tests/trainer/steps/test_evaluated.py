"""What is evaluated and what is saved, where a method trains beside the weights that it evaluates."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_folder import make_model, make_rows
from tiny_runs import Rows, assert_equal, logged, trainer, weights

import lowmem
from lowmem.config import RunConfig, build
from lowmem.console import Console
from lowmem.optim.evaluated import evaluated
from lowmem.training import evaluation
from lowmem.training.evaluation import held_out_loss
from lowmem.training.folder import saving
from lowmem.training.general import general_loss

METHODS = {
    "schedule_free": {"optim": "schedule_free"},
    "lookahead": {"optim": "adamw", "optim_args": "modifiers=lookahead,every=4"},
}


def test_a_model_is_evaluated_and_saved_at_the_average_and_a_checkpoint_is_not(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, held=Rows(4), optim="schedule_free", max_steps=3, save_strategy="steps", save_steps=3,
        lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    run.train()
    trained, seen = weights(run), []
    hook = run.model.register_forward_pre_hook(lambda *_: seen.append(weights(run)))
    run.evaluate()
    hook.remove()
    assert_equal(weights(run), trained)
    run.save_model(str(tmp_path / "model"))
    with evaluated(run.lowmem_optimizer):
        averaged = weights(run)
    assert_equal(seen[0], averaged)
    assert any(not torch.equal(averaged[key], trained[key]) for key in trained)
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("model", "checkpoint-3")}
    for key, value in found["model"].items():
        torch.testing.assert_close(value, averaged[key], rtol=0, atol=0)
        torch.testing.assert_close(found["checkpoint-3"][key], trained[key], rtol=0, atol=0)


def test_inside_another_one_it_changes_nothing_more() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = lowmem.optimizer([weight], "schedule_free", lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    trained = weight.detach().clone()
    with evaluated(optimizer):
        averaged = weight.detach().clone()
        with evaluated(optimizer):
            assert torch.equal(weight, averaged)
        assert torch.equal(weight, averaged)
    assert torch.equal(weight, trained)
    assert not torch.equal(averaged, trained)


def test_others_get_the_average(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, optim="schedule_free", max_steps=3, lr_scheduler_type="constant")
    run.train()
    pushed: list[Any] = []
    monkeypatch.setattr(transformers.Trainer, "push_to_hub", lambda self: pushed.append(weights(self)))
    run.push_to_hub()
    with evaluated(run.lowmem_optimizer):
        assert_equal(pushed[0], weights(run))


@pytest.mark.parametrize("only", [False, True], ids=["whole", "model only"])
@pytest.mark.parametrize("method", METHODS)
def test_the_best_checkpoint_is_what_was_evaluated_best(method: str, only: bool, tmp_path: Path) -> None:
    """The first of several: later steps have moved both the weights and what is held beside them."""
    run = trainer(
        tmp_path, held=Rows(4), max_steps=7, save_strategy="steps", save_steps=3, eval_strategy="steps",
        eval_steps=3, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        save_only_model=only, lr_scheduler_type="constant", **METHODS[method],
    )  # fmt: skip
    seen: dict[int, dict[str, torch.Tensor]] = {}
    run.model.register_forward_pre_hook(
        lambda model, *_: None if model.training else seen.update({run.state.global_step: weights(run)})
    )
    run.train()
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best, *later = logged(run, "eval_loss")
    assert best > max(later)
    run.save_model(str(tmp_path / "model"))
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert_equal({key: found[key] for key in seen[3]}, seen[3])
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-6)


def settings(tmp_path: Path, **more: Any) -> RunConfig:
    values = {
        "model": str(make_model(tmp_path / "model")), "data": str(make_rows(tmp_path / "rows.jsonl")),
        "dtype": "float32", "lr": 1e-2, "seq_len": 64, "batch_size": 2, "steps": 6, "eval_rows": 4,
        "output_dir": str(tmp_path / "out"), "report": False, "threads": 1, "schedule": "constant",
    }  # fmt: skip
    return build({**values, **more})


def measured(config: RunConfig, folder: Path) -> tuple[float, float]:
    """Held-out loss and loss on general text of a model in a folder, as one that begins."""
    recipe = importlib.import_module("lowmem.recipes.finetune")
    fresh = build({**vars(config), "model": str(folder), "output_dir": str(folder / "not")})
    run = recipe.prepare(fresh, recipe.arguments(fresh), Console())
    return held_out_loss(run), general_loss(run)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_measured_is_what_is_saved(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, forgetting and answers of a run are those of the model in its folder, loaded anew."""
    seen: dict[str, dict[str, torch.Tensor]] = {}

    def looked(what: str, found: list[str]) -> Callable[..., list[str]]:
        def look(model: torch.nn.Module, *args: Any, **kwargs: Any) -> list[str]:
            seen[what] = {name: p.detach().clone() for name, p in model.named_parameters()}
            return found

        return look

    monkeypatch.setattr(evaluation, "answers", looked("answers", ["four"]))
    monkeypatch.setattr(saving, "nonfinite_weights", looked("nonfinite_weights", []))
    config = settings(tmp_path, forgetting=True, prompt=["What is 3 + 1?"], **METHODS[method])
    result = importlib.import_module("lowmem.recipes.finetune").finetune(config)
    loss, general = measured(config, tmp_path / "out")
    assert result["loss"]["after"] == pytest.approx(loss, rel=1e-5)
    assert result["general"]["after"] == pytest.approx(general, rel=1e-5)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    for held in (seen["answers"], seen["nonfinite_weights"]):
        assert_equal({key: held[key] for key in saved}, saved)


@pytest.mark.parametrize("method", METHODS)
def test_the_best_evaluation_is_kept_as_it_was_measured(method: str, tmp_path: Path) -> None:
    config = settings(tmp_path, lr=1.0, steps=7, eval_steps=1, keep_best=True, **METHODS[method])
    recipe = importlib.import_module("lowmem.recipes.finetune")
    result = recipe.finetune(config)
    report = json.loads((tmp_path / "out" / "memory_report.json").read_text())
    found = [entry["eval_loss"] for entry in report["log"] if "eval_loss" in entry]
    assert min(found) < found[-1]
    assert result["loss"]["after"] == pytest.approx(min(found), rel=1e-5)
    assert measured(config, tmp_path / "out")[0] == pytest.approx(min(found), rel=1e-5)
