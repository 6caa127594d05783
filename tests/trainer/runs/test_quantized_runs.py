"""The main job on 4-bit weights by forward passes alone: planned, saved, resumed, rebuilt from its log."""

from __future__ import annotations

import dataclasses
import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_folder import make_model, make_rows

from lowmem.config import RunConfig
from lowmem.errors import ConfigError
from lowmem.training.zeroth.replay import replay

pytest.importorskip("bitsandbytes")
recipe = importlib.import_module("lowmem.recipes.finetune")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    make_model(tmp_path / "model", hidden=128)  # rows shorter than a block of 64 cannot be packed
    make_rows(tmp_path / "rows.jsonl")
    return RunConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), optim="qzo", quantize="nf4",
        optim_args="queries=2", dtype="float32", lr=0.1, seq_len=64, batch_size=2, steps=4, save_steps=2,
        logging_steps=1, eval_rows=4, output_dir=str(tmp_path / "out"), report=True, schedule="constant",
    )  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_scales_are_trained_saved_resumed_and_replayed(config: RunConfig, tmp_path: Path) -> None:
    """The base is a plain model; what comes back has its codes, other scales, and bits that stay."""
    result = recipe.finetune(config)
    assert result["loss"]["after"] != result["loss"]["before"]
    assert result["state_bytes"] == 0
    out = Path(result["output_dir"])
    report = json.loads((out / "memory_report.json").read_text())
    said, held = (report[key]["peak"]["allocated"] for key in ("predicted", "measured"))
    assert said == pytest.approx(held, rel=0.01)
    assert report["predicted"]["at_peak"]["gradients"] == report["measured"]["at_peak"]["gradients"] == 0
    final, half = weights(out), weights(out / "checkpoint-2")
    moved = {name for name in final if not torch.equal(final[name], half[name])}
    assert moved == {name for name in final if name.endswith(".absmax")}
    again = dataclasses.replace(config, resume=True, report=False)
    for name in ("checkpoint-4", "model.safetensors"):  # as if the run had stopped at the first checkpoint
        place = out / name
        place.unlink() if place.is_file() else shutil.rmtree(place)
    resumed = recipe.finetune(again)
    assert resumed["resumed_from"] == "checkpoint-2"
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(out).items())
    rebuilt = replay(config.model, out / "zo_log.safetensors", tmp_path / "rebuilt")
    assert rebuilt["steps"] == 4
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(tmp_path / "rebuilt").items())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    assert loaded.config.quantization_config.load_in_4bit


def test_a_run_in_the_dtype_of_every_day_is_rebuilt(config: RunConfig, tmp_path: Path) -> None:
    """What is trained are fp32 scales; the model that they belong to is loaded in its own dtype."""
    run = dataclasses.replace(config, dtype="bfloat16", report=False, steps=2)
    out = Path(recipe.finetune(run)["output_dir"])
    replay(run.model, out / "zo_log.safetensors", tmp_path / "rebuilt")
    final = weights(out)
    assert all(torch.equal(tensor, final[name]) for name, tensor in weights(tmp_path / "rebuilt").items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantize": None}, "give quantize: nf4"),
        ({"lora_rank": 4}, "leave them out"),
        ({"optim": "adamw", "optim_args": ""}, "give lora_rank as well"),
    ],
)
def test_weights_that_do_not_fit_the_strategy_are_told_before_a_model_loads(
    changes: dict[str, object], words: str, config: RunConfig
) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.finetune(dataclasses.replace(config, **changes))
