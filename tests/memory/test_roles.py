"""Rules of their own for embedding and head, from the plan to what is held."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import lowmem
from lowmem.memory.advice import levers as advice
from lowmem.memory.count import model_state_bytes
from lowmem.memory.footprint import footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.windows import Parameter
from lowmem.models.entries import resolve, skeleton
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.tensors import roles
from lowmem.report.units import format_bytes

GIB = 1 << 30


def spared(**options: Any) -> lowmem.Strategy:
    """GaLore, with Adafactor for embedding and head."""
    factored = lowmem.create("adafactor").rules["matrix"]
    made = lowmem.create("galore", **options)
    return replace(made, rules={**made.rules, "embedding": factored, "head": factored})


def parameters(model: torch.nn.Module) -> list[Parameter]:
    found = roles.find(model)
    return [
        Parameter(name, tuple(p.shape), p.dtype, roles.refined(found.get(name, "matrix"), p.shape))
        for name, p in model.named_parameters()
    ]


def test_the_state_of_llama_3_1_8b() -> None:
    """2.79 GiB by galore with int8 moments, of which embedding and head hold the most."""
    big = skeleton(resolve("llama-3.1-8b"))
    plain = lowmem.create("galore", states="int8")
    assert round(model_state_bytes(plain, big) / GIB, 2) == 2.79
    assert round(model_state_bytes(spared(states="int8"), big) / GIB, 2) == 0.81
    run = Run(batch_size=1, seq_len=128, compile="on")
    assert footprint(plain, parameters(big), run).state_bytes == model_state_bytes(plain, big)
    (said,) = advice.roles(plain, parameters(big))
    assert (
        said == "Embedding and head hold 71% of the state: embedding=adafactor,head=adafactor saves 1.99 GiB."
    )
    assert advice.roles(spared(states="int8"), parameters(big)) == []


def test_held_is_planned_on_a_copy_scaled_down() -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=4008, hidden_size=128, intermediate_size=448, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2,
    )  # fmt: skip
    strategy = spared(states="int8", rank=8)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    optimizer = LowMemOptimizer(model.parameters(), strategy, lr=1e-3, model=model)
    ids = torch.arange(32).view(2, 16)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state_bytes() == model_state_bytes(strategy, model)
    by_role = {place.role: place.rule for place in optimizer.roster.places.values()}
    assert by_role == {"embedding": "embedding", "matrix": "matrix", "vector": "small", "head": "head"}
    assert set(optimizer.state[model.lm_head.weight]) == {"square.row", "square.col", "age"}


def test_tied_weights_are_advised_about_once() -> None:
    model = skeleton(resolve("smollm2-135m"))
    (said,) = advice.roles(lowmem.create("galore"), parameters(model))
    assert said.startswith("Embedding holds ")
    assert "embedding=adafactor saves" in said
    assert "head" not in said


@pytest.mark.parametrize("name", ["adamw", "badam", "lisa", "misa", "spam", "zo_adamu", "muon_8bit", "dct"])
def test_what_is_said_to_be_saved_is_what_both_differ_by(name: str) -> None:
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = skeleton(transformers.LlamaConfig(vocab_size=8000, **sizes))
    held = parameters(model)
    own = lowmem.create(name)
    said = advice.roles(own, held)
    assert bool(said) == (name in ("adamw", "lisa", "muon_8bit", "dct"))
    for sentence in said:
        options = dict(pair.split("=") for pair in sentence.split(": ")[1].split(" saves ")[0].split(","))
        one, other = (
            footprint(s, held, Run(), steps="none").state_bytes for s in (own, lowmem.create(name, **options))
        )
        assert sentence.endswith(f"saves {format_bytes(one - other)}.")
        assert 0 < int(sentence.split("%")[0].split()[-1]) <= 100


def test_nothing_is_advised_where_nothing_is_gained() -> None:
    model = skeleton(resolve("smollm2-135m"))
    assert advice.roles(lowmem.create("adafactor"), parameters(model)) == []
    assert advice.roles(lowmem.create("mezo"), parameters(model)) == []
