"""4-bit bases: the stand-ins hold and keep what bitsandbytes, peft and TRL do in a real step."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.memory.trace import quantized
from lowmem.memory.trace.replica import trace
from tests.memory.families import BASE, FAMILIES, peaks_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
RUN = {
    "batch_size": 2,
    "seq_len": 48,
    "device": "cpu",
    "max_grad_norm": 0.0,
    "lora_rank": 4,
    "quantize": "nf4",
}
WIDE = {**BASE, "hidden_size": 128, "intermediate_size": 192}  # rows of a block of 64 at least
PEAKS = ("loss backward", "first layer backward", "last layer backward", "optimizer step")


def config(family: str = "llama") -> Any:
    import transformers

    if family == "gpt2":
        return transformers.GPT2Config(vocab_size=512, n_embd=128, n_layer=3, n_head=4, n_positions=128)
    return transformers.LlamaConfig(**WIDE)


def real(folder: Path, family: str, *, double: bool, kbit: bool, dtype: torch.dtype) -> nn.Module:
    """As a script with peft makes it: load in 4 bits, prepare, adapt, and cast the adapters as TRL does."""
    pytest.importorskip("bitsandbytes")
    import peft
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(config(family), dtype=torch.bfloat16).save_pretrained(
            folder
        )
        base = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16,
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )  # fmt: skip
        base.config.use_cache = False
        if kbit:
            base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
        made = peft.get_peft_model(base, lora)
    for p in made.parameters():
        if p.requires_grad:
            p.data = p.data.to(dtype)
    return made.train()


def measured(made: nn.Module) -> dict[str, dict[str, int]]:
    return peaks_of(made, constants=[constant for _, constant in quantized.constants(made)])


@pytest.mark.parametrize(
    ("family", "double", "kbit", "adapter"),
    [
        ("llama", True, False, None),  # `lowmem finetune --quantize nf4`
        ("llama", False, True, "float32"),  # the usual script
        ("llama", True, True, "bfloat16"),
        ("gpt2", True, False, None),
    ],
)
def test_a_4_bit_step_is_planned_as_it_runs(tmp_path, family, double, kbit, adapter):
    run = Run(**RUN, double_quant=double, kbit_prepare=kbit, adapter_dtype=adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = real(tmp_path, family, double=double, kbit=kbit, dtype=getattr(torch, run.dtype_of_adapters))
        expected = measured(made)
    found = trace(config(family), run)
    names = {name: p.dtype for name, p in made.named_parameters() if p.requires_grad}
    assert {p.name: p.dtype for p in found.parameters} == names
    for phase in PEAKS:
        row, theirs = found.moments[phase].bytes, expected[phase]
        assert row["weights"] == theirs["weights"], phase
        assert sum(row.values()) == pytest.approx(sum(theirs.values()), rel=0.002), phase


def test_adapters_over_4_bits_are_in_the_dtype_trl_gives_them():
    plain, wide = (
        trace(config(), Run(**RUN, adapter_dtype=dtype)).moments["optimizer step"].bytes
        for dtype in (None, "float32")
    )
    assert wide["gradients"] == 2 * plain["gradients"]
    assert wide["weights"] - plain["weights"] == plain["gradients"]


def test_prepared_for_kbit_training_is_fp32_where_nothing_is_packed():
    plain, prepared = (
        trace(FAMILIES["llama"](), Run(**RUN, kbit_prepare=kbit)).moments["optimizer step"].bytes["weights"]
        for kbit in (False, True)
    )
    outside = 2 * 512 * 64 + 7 * 64  # embedding, head, norms
    assert prepared - plain == 2 * outside


def test_a_kept_output_holds_its_logits_through_backward():
    options = {"batch_size": 2, "seq_len": 64, "dtype": "bfloat16", "device": "cpu"}
    dropped, kept = (
        trace(FAMILIES["llama"](), Run(**options, keep_output=keep)).moments["loss backward"].total
        for keep in (False, True)
    )
    assert kept - dropped == 2 * 512 * 2 * 64  # 2 V T


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kbit_prepare": True}, "kbit_prepare.*quantize"),
        ({"double_quant": False}, "double_quant.*quantize"),
        ({"keep_output": True, "loss": "chunked"}, "keep_output"),
    ],
)
def test_what_belongs_together_is_given_together(options, match):
    with pytest.raises(UserError, match=match):
        lowmem.plan(config(), "adamw", **options)
