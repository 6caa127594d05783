"""Closed forms against traces of the real models, at published widths: event by event."""

from __future__ import annotations

import pytest

from lowmem.memory import closed_form
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import shallow
from lowmem.memory.trace.replica import trace
from lowmem.models.entries import resolve

MODELS = ["llama-7b", "llama-3-8b", "qwen2.5-7b", "qwen3-0.6b", "gemma-2b", "smollm2-135m"]
RUNS = {
    "plain": Run(batch_size=1, seq_len=1024),
    "batch": Run(batch_size=4, seq_len=512),
    "checkpointing": Run(batch_size=2, seq_len=512, gradient_checkpointing=True),
    "release": Run(batch_size=2, seq_len=512, gradient_release=True),
    "both": Run(batch_size=4, seq_len=512, gradient_checkpointing=True, gradient_release=True),
    "short": Run(batch_size=1, seq_len=64),
    "eager": Run(batch_size=1, seq_len=1024, attention="eager"),
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
    ],
)
def test_what_was_not_derived_is_not_claimed(name, run):
    assert not closed_form.supports(resolve(name).config(), run)
