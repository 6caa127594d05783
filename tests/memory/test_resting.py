"""The plan knows that what rests has neither gradient nor state, and that less is kept for it."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

import lowmem
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated, remembered
from lowmem.memory.trace.windows import special

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
LAYER = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32)
ENDS = 4 * (2 * 40 * 32 + 32)
RUN = Run(batch_size=1, seq_len=16, dtype="float32", device="cpu")


def config(depth: int) -> LlamaConfig:
    return LlamaConfig(num_hidden_layers=depth, vocab_size=40, tie_word_embeddings=False, **SIZES)


@pytest.mark.parametrize(("name", "options", "gradients"), [
    ("badam", {}, LAYER), ("lisa", {"count": 2}, ENDS + 2 * LAYER), ("adamw", {}, ENDS + 7 * LAYER),
])  # fmt: skip
def test_gradients_are_those_of_active_tensors(name: str, options: dict[str, Any], gradients: int) -> None:
    found = extrapolated(config(7), RUN, special(lowmem.create(name, **options)))
    assert found.moments["optimizer step"].bytes["gradients"] == gradients
    assert len(found.parameters) == 3 + 7 * 9


def test_layers_that_rest_keep_less_for_the_backward_pass() -> None:
    one, all_of_them = (
        remembered(config(3), RUN, special(lowmem.create(name))) for name in ("badam", "adamw")
    )
    kept, whole = (found.moments["loss backward"].bytes["activations"] for found in (one, all_of_them))
    assert kept < whole


def test_state_is_that_of_one_layer() -> None:
    row = lowmem.plan(config(3), "badam", seq_len=16, dtype="float32", device="cpu", advise=False).plans[0]
    assert row.state_bytes == 2 * LAYER + 9 * 4
