"""Strategies that look at one point after the other share the trace of two."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

import lowmem
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated, trained
from lowmem.memory.trace.replica import trace
from lowmem.optim.strategy import Strategy
from lowmem.sources.estimators import Curved

CONFIG = LlamaConfig(
    hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=5, vocab_size=40,
    tie_word_embeddings=False,
)  # fmt: skip
RUN = Run(batch_size=2, seq_len=16).forwards


def curved() -> Strategy:
    mezo = lowmem.create("mezo")
    return replace(mezo, source=replace(mezo.source, estimator=Curved(), queries=2))


@pytest.mark.parametrize("strategy", [lowmem.create("fzoo"), curved()])
def test_passes_that_are_not_traced_leave_what_those_leave_that_are(strategy: Strategy) -> None:
    quick, real = extrapolated(CONFIG, RUN, strategy), trace(CONFIG, RUN, strategy)
    assert {name: dict(m.bytes) for name, m in quick.moments.items()} == {
        name: dict(m.bytes) for name, m in real.moments.items()
    }


def test_what_is_trained_is_known_without_a_step() -> None:
    run = replace(RUN, lora_rank=4, quantize="nf4")
    assert set(trained(CONFIG, run)) == set(trace(CONFIG, run).parameters)
