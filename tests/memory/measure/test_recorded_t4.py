"""Plans beside peaks that others recorded on a card: see `about` in configs/measured/t4.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from lowmem.memory.plan import plan

RECORDED = json.loads((Path(__file__).parents[3] / "configs" / "measured" / "t4.json").read_text("utf-8"))
FAMILIES = {"Qwen2": Qwen2Config, "Mistral": MistralConfig}
STANDS = ("SmolLM2-1.7B", 1)
"""Model and rows of those that stand for the others."""


def config(name: str) -> PretrainedConfig:
    sizes = {"max_position_embeddings": 8192, **RECORDED["models"][name]}
    made = next((made for start, made in FAMILIES.items() if name.startswith(start)), LlamaConfig)
    return made(**({"sliding_window": None} if made is MistralConfig else {}), **sizes)


def told(row: dict[str, Any]) -> Any:
    marks = [] if (row["model"], row["batch_size"]) == STANDS else [pytest.mark.thorough]
    keys = ("model", "attention", "quantize", "batch_size", "seq_len")
    return pytest.param(row, id=" ".join(str(row[key]) for key in keys), marks=marks)


@pytest.mark.parametrize("row", [told(row) for row in RECORDED["rows"]])
def test_a_plan_is_within_two_percent_of_the_card(row: dict[str, Any]) -> None:
    asked = {key: value for key, value in row.items() if key not in ("model", "allocated_mib") and value}
    if row["quantize"]:
        asked |= {"kbit_prepare": True, "double_quant": False}
    found = plan(
        config(row["model"]), "adamw", gpu="t4", advise=False, dtype="float16",
        lora_targets="q_proj,k_proj,v_proj,o_proj", lora_dropout=0.0, adapter_dtype="float32",
        gradient_checkpointing=True, keep_output=True, max_grad_norm=0.0, **asked,
    )  # fmt: skip
    allocated = found.plans[0].peak["allocated"] / 2**20
    assert allocated == pytest.approx(row["allocated_mib"], rel=0.02)
    if not row["quantize"] and row["attention"] == "eager":
        assert allocated == pytest.approx(row["allocated_mib"], rel=0.006)
