"""Preferences, judgements, scores and rewards: TRL's trainers on any first-order strategy."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_folder import make_model, tokenizer

import lowmem
from lowmem.config import RunConfig, build
from lowmem.console import Console
from lowmem.errors import ConfigError, UserError
from lowmem.memory.trace.tasks import kinds
from lowmem.models.quiet import quiet
from lowmem.models.scoring import with_score
from lowmem.training import arguments, tasks
from tests.enrolled import by_turns, unlike

recipe = importlib.import_module("lowmem.recipes.finetune")
FIRST_ORDER = [name for name in unlike() if lowmem.create(name).source.needs_autograd]
BASE: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_steps": 3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
}
REWARD = """
def first(completions, prompts, letter, **more):
    return [float(text.count(sign)) for text, sign in zip(completions, letter)]
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    make_model(folder / "model")
    rows = [{"prompt": f"What is {i}?", "chosen": f" it is {i}", "rejected": " no no"} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [{"prompt": f"What is {i}?", "letter": "e"} for i in range(24)]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (folder / "rewards.py").write_text(REWARD)
    return folder


def settings(place: Path, out: Path, task: str, **more: Any) -> RunConfig:
    values = {
        "task": task,
        "model": str(place / "model"),
        "data": str(place / "rows.jsonl"),
        "optim": "galore",
        "optim_args": "rank=4,update_proj_gap=3",
        "dtype": "float32",
        "lr": 1e-2,
        "seq_len": 64,
        "batch_size": 4,
        "steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "eval_rows": 4,
        "output_dir": str(out),
        "report": False,
    }
    if task == "grpo":
        reward = f"{place / 'rewards.py'}:first"
        values |= {"data": str(place / "asked.jsonl"), "reward": reward, "num_generations": 4}
        values |= {"max_completion": 8, "lr": 5e-2, "beta": 0}
    return build({**values, **more})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("task", tasks.OTHERS)
def test_a_run_learns_its_task_and_prints_nothing(task: str, place: Path, tmp_path: Path, capfd: Any) -> None:
    out = tmp_path / "out"
    result = recipe.finetune(settings(place, out, task, report=True))
    assert capfd.readouterr() == ("", "")
    before, after = (result["held_out"][when] for when in ("before", "after"))
    assert result["steps"] == 4
    if task == "grpo":
        assert after.keys() == {"reward"}
    else:
        assert after["loss"] < before["loss"]
    if task in tasks.REFERRING:  # nothing is preferred yet: sigmoid(0)
        assert before["loss"] == pytest.approx({"dpo": 0.6931, "kto": 0.5}[task], abs=1e-3)
    assert {"README.md", "model.safetensors", "config.yaml", "loss.png"} <= {p.name for p in out.iterdir()}
    json.dumps(result)
    report = json.loads((out / "memory_report.json").read_text())
    if task in kinds.PLANNED:  # and what it took stands beside what was predicted
        assert abs(report["error_percent"]["peak_allocated"]) < 1
        assert abs(report["error_percent"]["weights"]) == 0
        if task == "grpo":
            grown = [report[side]["events"]["generation"] for side in ("predicted", "measured")]
            assert grown[0] == pytest.approx(grown[1], rel=0.01)
        assert kinds.PLANNED[task].words in report["assumptions"][0]


@pytest.mark.parametrize("task", ["dpo", "kto", "orpo", "reward"])
def test_a_resumed_run_ends_as_one_that_was_not_cut(task: str, place: Path, tmp_path: Path) -> None:
    recipe.finetune(settings(place, tmp_path / "whole", task))
    recipe.finetune(settings(place, tmp_path / "cut", task, steps=2, schedule="constant"))
    recipe.finetune(settings(place, tmp_path / "cut", task, schedule="constant", resume=True))
    recipe.finetune(settings(place, tmp_path / "constant", task, schedule="constant"))
    resumed, straight = weights(tmp_path / "cut"), weights(tmp_path / "constant")
    assert all(torch.equal(resumed[name], value) for name, value in straight.items())
    linear = weights(tmp_path / "whole")
    assert any(not torch.equal(linear[name], value) for name, value in straight.items())


@pytest.mark.parametrize("task", ["dpo", "reward", "grpo"])
def test_adapters_name_their_base(task: str, place: Path, tmp_path: Path) -> None:
    recipe.finetune(settings(place, tmp_path / "out", task, lora_rank=2))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == str(place / "model")


def _trained(kind: Any, config: Any, model: Any, optim: dict[str, Any], folder: Path, **more: Any) -> Any:
    from datasets import Dataset

    rows = [{"prompt": f"What is {i}?", "chosen": f" it is {i}", "rejected": " no"} for i in range(12)]
    with quiet():
        args = config(output_dir=str(folder), **BASE, **optim, max_length=64, precompute_ref_log_probs=True)
        trainer = kind(
            model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer(), **more
        )
        trainer.train()
    return trainer.model


def test_adamw_is_trls_own_with_torchs_adamw(place: Path, tmp_path: Path) -> None:
    import trl

    first = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    theirs = _trained(
        trl.DPOTrainer, trl.DPOConfig, copy.deepcopy(first), {"optim": "adamw_torch"}, tmp_path / "a"
    )
    ours = _trained(
        lowmem.LowMemDPOTrainer,
        lowmem.LowMemDPOConfig,
        copy.deepcopy(first),
        {"optim": "adamw"},
        tmp_path / "b",
    )
    moved = 0.0
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)
        moved = max(moved, float((one - first.get_parameter(name)).detach().abs().max()))
    assert moved > 1e-2


@pytest.mark.parametrize("name", by_turns(FIRST_ORDER))
def test_every_first_order_strategy_moves_the_weights(name: str, place: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    before = {key: value.clone() for key, value in model.named_parameters()}
    trained = _trained(lowmem.LowMemDPOTrainer, lowmem.LowMemDPOConfig, model, {"optim": name}, tmp_path)
    assert any(not torch.equal(value, before[key]) for key, value in trained.named_parameters())
    assert all(value.isfinite().all() for value in trained.parameters())


def test_gradient_release_is_the_ordinary_step(place: Path, tmp_path: Path) -> None:
    recipe.finetune(settings(place, tmp_path / "a", "dpo", clip="none"))
    recipe.finetune(settings(place, tmp_path / "b", "dpo", clip="none", gradient_release=True))
    one, other = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_the_score_takes_the_place_of_the_head(place: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32)
    scoring = with_score(model, tokenizer(), seed=3)
    assert scoring.base_model is model.base_model
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = model.base_model(ids).last_hidden_state[0, -1]
    torch.testing.assert_close(scoring(ids).logits[0], hidden @ scoring.score.weight.T)
    again = with_score(copy.deepcopy(model), tokenizer(), seed=3)
    assert torch.equal(again.score.weight, scoring.score.weight)
    assert not any(p.is_meta for p in scoring.parameters())


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"task": "dpp"}, "did you mean 'dpo'"),
        ({"task": "grpo"}, "reward: task grpo needs one"),
        ({"task": "dpo", "reward": "a:b"}, "reward: for task grpo"),
        ({"task": "grpo", "reward": "a:b", "batch_size": 6}, "make that a multiple of 8"),
        ({"beta": 0.1}, "beta: task sft has none"),
        ({"task": "kto"}, "make it 2 or more"),
        ({"task": "reward", "prompt": ["a"]}, "gives no answers"),
        ({"columns": "prompt"}, "not of the form field=column"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build({"model": "gpt2", "optim": "adamw", **values})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact", "module:function"),
        ("no_such_module:f", "cannot import 'no_such_module'"),
        ("math:exakt", "no function 'exakt'"),
        ("no/such/file.py:f", "cannot import"),
    ],
)
def test_rewards_that_are_not_there(name: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        tasks.reward_function(name)


def test_a_reward_beside_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    function = tasks.reward_function("rewards:first")
    assert function(completions=["eel", "all"], prompts=["", ""], letter=["e", "e"]) == [2.0, 0.0]


def test_strategies_without_gradients_are_refused(tmp_path: Path) -> None:
    for task in tasks.OTHERS:
        with pytest.raises(ConfigError, match="this trainer needs gradients"), quiet():
            arguments.trl_config(task)(output_dir=str(tmp_path), optim="mezo", use_cpu=True, bf16=False)


def test_classes_are_found_by_their_name(tmp_path: Path) -> None:
    import pickle

    for task, (_, stem) in arguments.TRL.items():
        with quiet():
            args = getattr(lowmem, f"LowMem{stem}Config")(output_dir=str(tmp_path), use_cpu=True, bf16=False)
        assert type(pickle.loads(pickle.dumps(args))) is type(args)
        assert getattr(lowmem, f"LowMem{stem}Trainer") is tasks.trainer_class(task)


def test_prompts_that_leave_no_room_are_said(place: Path, tmp_path: Path) -> None:
    class Heard(Console):
        said: list[str] = []  # noqa: RUF012

        def say(self, text: str) -> None:
            self.said.append(text)

    heard = Heard()
    with pytest.raises(UserError, match="fills seq_len 4"):
        recipe.finetune(settings(place, tmp_path / "out", "dpo", seq_len=4), heard)
    assert not (tmp_path / "out").exists()
