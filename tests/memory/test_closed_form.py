"""Closed forms against traces of the real models, at published widths: event by event."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from lowmem.memory import closed_form
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import shallow
from lowmem.memory.trace.replica import trace
from lowmem.models.entries import resolve
from tests.memory.families import BASE

MODELS = ["llama-7b", "llama-3-8b", "qwen2.5-7b", "qwen3-0.6b", "gemma-2b", "smollm2-135m"]
RUNS = {
    "plain": Run(batch_size=1, seq_len=1024),
    "batch": Run(batch_size=4, seq_len=512),
    "checkpointing": Run(batch_size=2, seq_len=512, gradient_checkpointing=True),
    "release": Run(batch_size=2, seq_len=512, gradient_release=True),
    "both": Run(batch_size=4, seq_len=512, gradient_checkpointing=True, gradient_release=True),
    "short": Run(batch_size=1, seq_len=64),
    "eager": Run(batch_size=1, seq_len=1024, attention="eager"),
    "accumulation": Run(batch_size=1, seq_len=64, accumulation=2),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("name", MODELS)
def test_binding_event_and_peak_agree_with_the_trace(name, run):
    config = shallow(resolve(name).config(), 3)
    if not closed_form.supports(config, run):
        pytest.skip("no closed form, and the plan says so")
    found = {event: moment.total for event, moment in trace(config, run).moments.items()}
    said = closed_form.events(config, run)
    peak, formula = max(found.values()), max(said.values())
    assert formula == pytest.approx(peak, rel=1e-3)
    for event, size in said.items():
        assert size <= found[event] * 1.005, event  # none is invented


@pytest.mark.parametrize("name", ["llama-7b", "qwen2.5-7b", "qwen3-0.6b", "gemma-2b"])
def test_parameters_are_counted(name):
    assert closed_form.shape_of(resolve(name).config()).parameters == resolve(name).parameters


def test_textbook_bytes_per_token_and_layer():
    # by hand: 2 (8h + 4) + 2 (4ad) + 4a + 8f
    seven, eight = (closed_form.shape_of(resolve(n).config()) for n in ("llama-7b", "llama-3-8b"))
    assert closed_form.saved_per_token(seven, Run()) == 186_504
    assert closed_form.saved_per_token(eight, Run()) == 200_840


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("gemma-2-2b", Run()),
        ("gpt2", Run()),
        ("opt-125m", Run()),
        ("llama-7b", Run(dtype="float32")),
        ("llama-7b", Run(lora_rank=8)),
        ("llama-7b", Run(rows="padded")),
        ("llama-7b", Run(loss="chunked")),
        ("llama-7b", Run(autocast=True)),
        ("llama-7b", Run(device="cpu")),
        ("llama-7b", Run(keep_output=True)),
        ("llama-7b", Run(accumulation=2, gradient_release=True, max_grad_norm=0.0)),
        ("llama-7b", Run(attention="eager", dtype="float16")),
        ("llama-7b", Run(compute_capability=7.5)),  # attention in bf16 is math there
        ("llama-3-8b", Run(compute_capability=7.5, dtype="float16")),  # as it is of grouped queries
        ("mistral-7b", Run(seq_len=4096)),  # as long as the window: there is a mask
    ],
)
def test_what_was_not_derived_is_not_claimed(name, run):
    assert not closed_form.supports(resolve(name).config(), run)


@pytest.mark.parametrize("change", [{"head_dim": 320}, {"hidden_act": "relu"}])
def test_layers_that_were_not_derived_are_not_claimed(change):
    config = resolve("llama-7b").config()
    assert closed_form.supports(config, Run())
    for name, value in change.items():
        setattr(config, name, value)
    assert not closed_form.supports(config, Run())


def test_an_older_card_has_a_fused_kernel_for_heads_with_keys_of_their_own():
    config = LlamaConfig(**BASE | {"num_key_value_heads": 4})
    run = Run(batch_size=2, seq_len=512, dtype="float16", compute_capability=7.5)
    assert closed_form.supports(config, run)
    found = max(moment.total for moment in trace(config, run).moments.values())
    assert max(closed_form.events(config, run).values()) == pytest.approx(found, rel=1e-3)
