"""Mixtures of experts whose experts lie in stacks are planned as they train, and read as they were saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowmem
from lowmem.memory.measure.profile import profile
from lowmem.models.entries import MIXTURES
from lowmem.models.loading import load_model
from tests.trainer.tiny_folder import tokenizer

SIZES = {
    "vocab_size": 264, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 96, "num_experts_per_tok": 2,
}  # fmt: skip
OWN: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 16},
    "olmoe": {"num_experts": 4},
}


def config_of(kind: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(kind, **SIZES, **OWN[kind])


def model_of(kind: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config_of(kind), dtype=dtype).train()


@pytest.mark.parametrize("kind", MIXTURES)
def test_the_experts_are_stacks(kind: str) -> None:
    shapes = {
        n: tuple(p.shape) for n, p in model_of(kind, torch.float32).named_parameters() if "experts." in n
    }
    stacks = [shape for name, shape in shapes.items() if "shared" not in name]
    assert stacks
    assert all(len(shape) == 3 and shape[0] == 4 for shape in stacks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MIXTURES)
def test_the_plan_is_what_a_step_takes(kind: str, dtype: torch.dtype) -> None:
    strategy = lowmem.create("galore", rank=8)
    settings = {"dtype": str(dtype).removeprefix("torch."), "device": "cpu", "compile": "off"}
    planned = lowmem.plan(config_of(kind), strategy, batch_size=2, seq_len=32, max_grad_norm=0.0, **settings)
    planned = planned.to_dict()["plans"][0]
    model = model_of(kind, dtype)
    optimizer = lowmem.optimizer(model, "galore", rank=8, compile="off")
    ids = torch.arange(64).remainder(256).view(2, 32)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    measured = profile(step, model, optimizer).measured
    assert planned["state_bytes"] == measured["state_bytes"]
    for event, size in measured["events"].items():
        assert planned["events"][event] == pytest.approx(size, rel=0.005), event


@pytest.mark.parametrize("kind", MIXTURES)
def test_saved_experts_are_read_back(kind: str, tmp_path: Path) -> None:
    """transformers writes each expert by itself."""
    model = model_of(kind, torch.bfloat16)
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    read = dict(load_model(str(tmp_path))[0].named_parameters())
    assert all(torch.equal(p, read[name].to(p.dtype)) for name, p in model.named_parameters())
