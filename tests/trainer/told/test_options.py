"""Options of a run that people know from elsewhere: adapters, schedules, evaluation, noise, progress."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_folder import make_model, make_rows

from lowmem.combinations import missing_tracker
from lowmem.config import RunConfig, build
from lowmem.console import Console
from lowmem.errors import ConfigError, UserError
from lowmem.models.peft_methods import adapter_config

recipe = importlib.import_module("lowmem.recipes.finetune")


class Heard(Console):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[dict[str, float]] = []
        self.stage = ""

    def say(self, text: str) -> None:
        self.said.append(text)

    def start(self, stage: str, total: int | None = None) -> None:
        self.stage = stage

    def advance(self, done: int, values: dict[str, float]) -> None:
        if self.stage == "train":
            self.steps.append(dict(values))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("options")
    make_model(folder / "model")
    make_rows(folder / "rows.jsonl")
    return folder


def settings(place: Path, out: Path, **more: Any) -> RunConfig:
    values = {
        "model": str(place / "model"),
        "data": str(place / "rows.jsonl"),
        "optim": "adamw",
        "dtype": "float32",
        "lr": 1e-2,
        "seq_len": 64,
        "batch_size": 2,
        "steps": 6,
        "save_steps": 100,
        "eval_rows": 4,
        "output_dir": str(out),
        "report": False,
    }
    return build({**values, **more})


def log(out: Path) -> list[dict[str, Any]]:
    entries = json.loads((out / "memory_report.json").read_text())["log"]
    return [entry for entry in entries if "loss" in entry or "eval_loss" in entry]


def test_loss_and_tokens_are_known_from_the_first_step(place: Path, tmp_path: Path) -> None:
    heard = Heard()
    recipe.finetune(settings(place, tmp_path / "out", logging_steps=4), heard)
    assert len(heard.steps) == 6
    assert all(step["loss"] > 0 for step in heard.steps)
    assert all(step["tokens_per_second"] > 0 for step in heard.steps[1:])


def test_wsd_rises_stays_and_falls(place: Path, tmp_path: Path) -> None:
    more = {"schedule": "wsd", "warmup": 2, "decay": 3, "steps": 10, "logging_steps": 1}
    recipe.finetune(settings(place, tmp_path / "out", **more))
    rates = [entry["learning_rate"] / 1e-2 for entry in log(tmp_path / "out") if "learning_rate" in entry]
    assert rates[:2] == [0.0, 0.5]
    assert rates[2:8] == [1.0] * 6
    assert 1 > rates[8] > rates[9] > 0
    recipe.finetune(settings(place, tmp_path / "tenth", schedule="wsd", logging_steps=1))
    assert log(tmp_path / "tenth")[-1]["learning_rate"] == pytest.approx(1e-2)  # one step of six


def test_the_best_evaluation_is_kept(place: Path, tmp_path: Path) -> None:
    """A learning rate that overshoots: the held-out loss is best before the end."""
    from safetensors.torch import load_file

    more = {"lr": 1.0, "steps": 8, "eval_steps": 1, "keep_best": True, "schedule": "constant"}
    heard = Heard()
    result = recipe.finetune(settings(place, tmp_path / "out", save_total_limit=1, **more), heard)
    found = {e["step"]: e["eval_loss"] for e in log(tmp_path / "out") if "eval_loss" in e}
    best = min(found, key=lambda step: found[step])
    assert best < 8
    assert result["loss"]["after"] == pytest.approx(found[best], rel=1e-5)
    assert f"the weights are those of checkpoint-{best}, the best evaluation" in heard.said
    kept, final = (
        load_file(f / "model.safetensors") for f in (tmp_path / f"out/checkpoint-{best}", tmp_path / "out")
    )
    assert all((final[name] == value).all() for name, value in kept.items())


def test_training_ends_when_nothing_gets_better(place: Path, tmp_path: Path) -> None:
    more = {"lr": 0.0, "steps": 30, "eval_steps": 2, "early_stopping": 3}
    result = recipe.finetune(settings(place, tmp_path / "out", **more))
    assert result["steps"] == 8  # best at 2, then three that are not better


def test_noise_on_the_embeddings_changes_the_training_alone(place: Path, tmp_path: Path) -> None:
    plain = recipe.finetune(settings(place, tmp_path / "a"))
    noisy = recipe.finetune(settings(place, tmp_path / "b", neftune=5))
    assert noisy["loss"]["before"] == plain["loss"]["before"]
    assert noisy["loss"]["after"] != plain["loss"]["after"]


@pytest.mark.parametrize("method", ["ia3", "vera", "loha", "lora"])
def test_any_method_of_peft(method: str, place: Path, tmp_path: Path) -> None:
    args = "target_modules=q_proj+down_proj" + (",feedforward_modules=[down_proj]" if method == "ia3" else "")
    args = args.replace("[down_proj]", "down_proj+down_proj")
    recipe.finetune(settings(place, tmp_path / "out", adapter=method, adapter_args=args, steps=2))
    fields = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert fields["peft_type"] == method.upper()
    assert set(fields["target_modules"]) == {"q_proj", "down_proj"}
    assert fields["base_model_name_or_path"] == str(place / "model")


def test_lora_is_made_as_the_settings_say() -> None:
    made = adapter_config(
        build(
            {
                "model": "gpt2",
                "optim": "adamw",
                "lora_rank": 4,
                "lora_alpha": 12,
                "lora_dropout": 0.1,
                "lora_targets": "q_proj,v_proj",
                "adapter_args": "use_rslora=true",
            }
        )
    )
    assert (made.r, made.lora_alpha, made.lora_dropout, made.use_rslora) == (4, 12, 0.1, True)
    assert set(made.target_modules) == {"q_proj", "v_proj"}
    plain = adapter_config(build({"model": "gpt2", "optim": "adamw", "lora_rank": 4}))
    assert (plain.lora_alpha, plain.target_modules) == (8, "all-linear")
    assert adapter_config(build({"model": "gpt2", "optim": "adamw"})) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"adapter": "lorra"}, "did you mean 'lora'"),
        ({"adapter": "vera", "adapter_args": "rnk=3"}, "VeraConfig has no 'rnk'"),
        ({"lora_rank": 2, "adapter_args": "use_dora"}, "not name=value"),
    ],
)
def test_adapters_that_peft_does_not_know(values: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        adapter_config(build({"model": "gpt2", "optim": "adamw", **values}))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lora_alpha": 3}, "lora_alpha: of LoRA; give lora_rank"),
        ({"lora_rank": 2, "adapter": "ia3"}, "lora_rank: of LoRA, adapter is ia3"),
        ({"adapter_args": "r=3"}, "no adapter is trained"),
        ({"keep_best": True}, "keep_best: give eval_steps"),
        ({"early_stopping": 2}, "early_stopping: give eval_steps"),
        ({"decay": 2}, "decay: of schedule wsd"),
        ({"decay": 5, "warmup": 3, "steps": 7, "schedule": "wsd"}, "make them fewer"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
    ],
)
def test_settings_that_do_not_go_together(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build({"model": "gpt2", "optim": "adamw", **values})


def test_a_tracker_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, place: Path, tmp_path: Path
) -> None:
    assert missing_tracker("none") is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        recipe.finetune(settings(place, tmp_path / "out", report_to="wandb"))
    assert not (tmp_path / "out").exists()


def test_several_data_sets_from_the_command_line(place: Path, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    import lowmem.cli as cli

    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps({"question": f"q{i}", "answer": "a"}) + "\n" for i in range(10)))
    flags = [
        "--model",
        place / "model",
        "--optim",
        "adamw",
        "--data",
        place / "rows.jsonl",
        "--data",
        f"{more}=2",
    ]
    flags += [
        "--steps",
        1,
        "--seq-len",
        64,
        "--eval-rows",
        4,
        "--no-report",
        "--output-dir",
        tmp_path / "out",
        "--json",
    ]
    done = CliRunner().invoke(cli.app, ["finetune", *map(str, flags)])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)["data"]["train"]
    assert "56 rows" in told  # 40 - 2, and (10 - 1) twice
    assert "more.jsonl x 2" in told
    assert "checking the settings" in done.stderr.splitlines()[0]
