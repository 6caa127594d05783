"""The command that a plan names gives the same plan again, whatever was asked."""

from __future__ import annotations

import json
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.errors import UserError
from lowmem.memory.plan import plan
from lowmem.memory.run import Run
from tests.memory.families import BASE, FAMILIES

SMALL = {"batch_size": 2, "seq_len": 32}
LORA = {"lora_rank": 4, "dtype": "bfloat16"}
GRPO = {"task": "grpo", "batch_size": 8}
# each field of a run away from its default, with what it needs beside it
CHANGED: dict[str, dict[str, Any]] = {
    "batch_size": {"batch_size": 3},
    "seq_len": {"seq_len": 40},
    "dtype": {"dtype": "float16"},
    "autocast": {"autocast": True},
    "autocast_dtype": {"dtype": "float32", "autocast": True, "autocast_dtype": "float16"},
    "attention": {"attention": "eager"},
    "rows": {"rows": "padded"},
    "longest": {"rows": "packed", "longest": 8},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "gradient_release": {"gradient_release": True},
    "activation_offload": {"activation_offload": True},
    "offload_state": {"offload_state": True},
    "few_bit": {"few_bit": 3},
    "weights": {"weights": "int8"},
    "int8_embeddings": {"weights": "int8", "int8_embeddings": True},
    "accumulation": {"accumulation": 2},
    "loss": {"loss": "chunked"},
    "label_tokens": {"loss": "labels", "label_tokens": 8},
    "eval_batch_size": {"eval_batch_size": 5},
    "typical": {"rows": "padded", "typical": 8},
    "keep_output": {"keep_output": True},
    "max_grad_norm": {"max_grad_norm": 0.0},
    "lora_rank": LORA,
    "lora_alpha": {**LORA, "lora_alpha": 5.0},
    "lora_dropout": {**LORA, "lora_dropout": 0.25},
    "adapter": {"adapter": "ia3"},
    "adapter_args": {**LORA, "adapter_args": "use_dora=true"},
    "lora_targets": {**LORA, "lora_targets": "q_proj,v_proj"},
    "adapter_dtype": {**LORA, "adapter_dtype": "bfloat16"},
    "quantize": {**LORA, "quantize": "nf4"},
    "double_quant": {**LORA, "quantize": "nf4", "double_quant": False},
    "kbit_prepare": {**LORA, "quantize": "nf4", "kbit_prepare": True},
    "compile": {"compile": "on"},
    "steps": {"steps": 5000},
    "device": {"device": "cpu"},
    "compute_capability": {"compute_capability": 7.5},
    "workspace": {"workspace": 1 << 20},
    "ranks": {"ranks": 3},
    "shard": {"ranks": 2, "shard": "none"},
    "per_node": {"ranks": 4, "per_node": 2},
    "task": {"task": "dpo"},
    "num_generations": {**GRPO, "num_generations": 2},
    "max_completion": {**GRPO, "max_completion": 4},
}


def again(command: str | None) -> dict[str, Any]:
    assert command is not None
    done = CliRunner().invoke(cli.app, [*shlex.split(command)[1:], "--json"])
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place: Path = tmp_path_factory.mktemp("model with a blank")
    LlamaConfig(**BASE).save_pretrained(place)
    return str(place)


def test_every_option_is_tried():
    assert set(CHANGED) == {f.name for f in fields(Run)}


@pytest.mark.parametrize("name", CHANGED)
def test_every_option_of_a_run_comes_back(folder, name):
    found = plan(folder, "adamw", **SMALL | CHANGED[name], advise=False)
    assert getattr(found.run, name) != getattr(Run(), name)
    document = again(found.command)
    assert document["run"] == json.loads(json.dumps(found.to_dict()["run"]))
    assert [row["peak"] for row in document["plans"]] == [dict(row.peak) for row in found.plans]


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        (
            "galore(rank=4,states=int8,update_proj_gap=7),adamw(states=bf16)",
            {"gpu": "t4", "dtype": "float16"},
        ),
        ("frugal", {"options": "rank=0.5", "budget": "3GiB"}),
        ("galore", {"options": "rank=4,writer=kahan", "budget": 2 << 30}),
    ],
)
def test_strategies_options_and_budgets_come_back(folder, strategy, more):
    found = plan(folder, strategy, **SMALL, **more, advise=False)
    document, expected = again(found.command), json.loads(json.dumps(found.to_dict()))
    for given, wanted in zip(document["plans"], expected["plans"], strict=True):
        assert {k: given[k] for k in given if k != "why"} == {k: wanted[k] for k in wanted if k != "why"}
    assert {k: document[k] for k in ("model", "run", "budget_bytes")} == {
        k: expected[k] for k in ("model", "run", "budget_bytes")
    }


def test_what_has_no_name_has_no_command():
    assert plan(FAMILIES["llama"](), "adamw", **SMALL, advise=False).command is None


@pytest.mark.parametrize(
    ("strategy", "options", "match"),
    [
        ("galore(rank=4", None, "bracket is missing"),
        ("galore(rank=4)", "rank=8", "given twice"),
        ("galore(rank=4),adamw", "rank=8", "belong to one strategy"),
    ],
)
def test_options_are_given_once_and_whole(strategy, options, match):
    with pytest.raises(UserError, match=match):
        plan(FAMILIES["llama"](), strategy, options=options, **SMALL)


@pytest.mark.parametrize("option", ["gradient_release", "gradient_checkpointing", "activation_offload"])
def test_what_a_strategy_without_gradients_has_no_use_for_is_refused(option):
    with pytest.raises(UserError, match=f"{option}: mezo works without gradients.*leave it out"):
        plan(FAMILIES["llama"](), "mezo", **{option: True}, **SMALL)
    several = plan(FAMILIES["llama"](), "mezo,adamw", **{option: True}, **SMALL, advise=False)
    assert {row.strategy for row in several.plans} == {"mezo", "adamw"}


def test_release_is_refused_where_a_step_waits_for_all_gradients():
    with pytest.raises(UserError, match=r"gradient_release: sophia .*leave it out"):
        plan(FAMILIES["llama"](), "sophia", gradient_release=True, **SMALL)
    several = plan(FAMILIES["llama"](), "sophia,adamw", gradient_release=True, **SMALL, advise=False)
    assert {row.strategy for row in several.plans} == {"sophia", "adamw"}
