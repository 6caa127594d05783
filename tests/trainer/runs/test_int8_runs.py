"""The main job on int8 weights: planned, saved, resumed bit for bit, written as an ordinary model."""

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

import lowmem
from lowmem.config import RunConfig
from lowmem.errors import ConfigError, UserError
from lowmem.memory.footprint import LOAD
from lowmem.memory.trace.tracker import Tracker
from lowmem.models.int8.convert import held_bytes, quantize_weights_, weights
from lowmem.models.int8.files import save
from lowmem.models.int8.loading import load_int8
from lowmem.models.loading import load_model
from lowmem.optim.int8.tensor import Int8Weight

recipe = importlib.import_module("lowmem.recipes.finetune")


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    make_model(tmp_path / "model", hidden=64)
    make_rows(tmp_path / "rows.jsonl")
    return RunConfig(
        model=str(tmp_path / "model"), data=str(tmp_path / "rows.jsonl"), optim="q_galore", weights="int8",
        optim_args="rank=8,update_proj_gap=2", dtype="bfloat16", lr=1e-2, seq_len=64, batch_size=2, steps=4,
        save_steps=3, logging_steps=1, eval_rows=4, output_dir=str(tmp_path / "out"), schedule="constant",
        gradient_release=True, accumulation=2, int8_embeddings=True,
    )  # fmt: skip


def test_a_run_is_planned_saved_resumed_and_written_as_an_ordinary_model(config: RunConfig) -> None:
    """Resumed between two refreshes and on one, with release and accumulation."""
    result = recipe.finetune(config)
    assert result["loss"]["after"] < result["loss"]["before"]
    out = Path(result["output_dir"])
    report = json.loads((out / "memory_report.json").read_text())
    said, held = (report[key] for key in ("predicted", "measured"))
    assert said["state_bytes"] == held["state_bytes"]
    assert said["at_peak"]["weights"] == held["at_peak"]["weights"]
    assert held["peak"]["allocated"] <= said["peak"]["allocated"]  # of what accumulates, less is kept
    codes = load_file(out / "checkpoint-3" / "model.safetensors")
    assert {x.dtype for name, x in codes.items() if name.endswith(".codes")} == {torch.int8}
    final = load_file(out / "model.safetensors")
    assert {x.dtype for x in final.values()} == {torch.bfloat16}
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert all(torch.equal(x, dict(model.named_parameters())[name]) for name, x in final.items())
    for name in ("checkpoint-4", "model.safetensors"):
        place = out / name
        place.unlink() if place.is_file() else shutil.rmtree(place)
    resumed = recipe.finetune(dataclasses.replace(config, resume=True, report=False, keep_int8=True))
    assert resumed["resumed_from"] == "checkpoint-3"
    kept = load_file(out / "model.safetensors")
    again = load_int8(config.model, embeddings=True)[0]
    for name, w in weights(again).items():
        w.codes, w.scale = kept[f"{name}.codes"], kept[f"{name}.scale"]
        assert torch.equal(w.decode(), final[name]), name
    with pytest.raises(UserError, match="int8 codes already"):
        load_int8(str(out))


def test_loading_converts_as_it_reads_to_what_converting_afterwards_gives(config: RunConfig) -> None:
    tracker = Tracker()
    with tracker:
        tracker.enter("load")
        streamed, _ = load_int8(config.model)
    planned = lowmem.plan(config.model, "sgd", weights="int8", device="cpu", seq_len=64, advise=False)
    assert held_bytes(streamed) < tracker.peak().total <= planned.plans[0].events[LOAD]
    tracker.stop()
    whole = quantize_weights_(load_model(config.model)[0])
    assert held_bytes(streamed) == held_bytes(whole)
    for (name, a), b in zip(streamed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert isinstance(a, Int8Weight) is isinstance(b, Int8Weight)


def test_large_models_are_written_shard_by_shard(config: RunConfig, tmp_path: Path) -> None:
    model, _ = load_int8(config.model)
    save(model, tmp_path / "written", shard=40_000)
    assert len(list((tmp_path / "written").glob("*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "written", dtype=torch.bfloat16)
    found = dict(back.named_parameters())
    assert all(torch.equal(w.decode(), found[name]) for name, w in weights(model).items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora_rank": 4, "int8_embeddings": False}, "take quantize: nf4"),
        ({"quantize": "nf4"}, "give one of them"),
        ({"weights": None}, "give weights: int8 as well"),
        ({"optim": "mezo", "optim_args": "", "gradient_release": False, "accumulation": 1}, "take qzo"),
        ({"optim": "adamw", "optim_args": "writer=kahan"}, "take stochastic or eco"),
        (
            {"optim": "adamw", "optim_args": "writer=eco", "weights": None, "int8_embeddings": False},
            "for int8",
        ),
    ],
)
def test_what_does_not_go_together_is_told_before_a_model_loads(
    changes: dict[str, object], words: str, config: RunConfig
) -> None:
    with pytest.raises(ConfigError, match=words):
        recipe.finetune(dataclasses.replace(config, **changes))
