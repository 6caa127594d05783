"""A model object is planned as it is: what the optimizer will hold of it, and what a real step takes."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.strategies import optimizer
from tests.memory import families
from tests.memory.test_quantized import measured, real

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
PLAIN = lowmem.create("adamw", writer="nearest")  # keeps nothing from step to step
SMALL = {"batch_size": 2, "seq_len": 48, "device": "cpu", "max_grad_norm": 0.0, "advise": False}


def whole(family: str = "llama") -> nn.Module:
    return families.model(family)


def frozen() -> nn.Module:
    made = whole()
    for p in made.model.embed_tokens.parameters():
        p.requires_grad = False
    for p in made.model.layers[0].parameters():
        p.requires_grad = False
    return made


def tied() -> nn.Module:
    made = whole()
    made.lm_head.weight = made.model.embed_tokens.weight
    return made


def cut() -> nn.Module:
    made = whole()
    del made.model.layers[2:]
    return made


def widened() -> nn.Module:
    made = whole()
    made.resize_token_embeddings(640)
    return made


def adapted(**options: object) -> nn.Module:
    import peft

    lora = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng(devices=[]):
        return peft.get_peft_model(families.model("llama", torch.bfloat16), lora)


def with_a_trained_head() -> nn.Module:
    return adapted(modules_to_save=["lm_head"])


def recomputing() -> nn.Module:
    return families.model("llama", checkpointing=True)


MADE: list[Callable[[], nn.Module]] = [
    whole, frozen, tied, cut, widened, adapted, with_a_trained_head, recomputing,
]  # fmt: skip


@pytest.mark.parametrize("strategy", ["adamw", "galore", "frugal"])
@pytest.mark.parametrize("make", MADE)
def test_state_is_what_the_optimizer_holds(make, strategy):
    made = make()
    held = optimizer(made, strategy)
    held.init_state()
    found = lowmem.plan(made, strategy, **SMALL)
    assert found.plans[0].state_bytes == held.state_bytes()
    assert found.model.parameters == sum(p.numel() for p in made.parameters())
    assert found.model.trainable == sum(p.numel() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("make", [make for make in MADE if make is not recomputing])
def test_peak_is_that_of_a_real_step(make):
    made = make()
    row = lowmem.plan(made, PLAIN, **SMALL).plans[0]
    expected = measured(made)
    phases = {"loss backward", "first layer backward", "last layer backward"} & set(expected)
    assert len(phases) >= 2  # no backward reaches a frozen bottom
    for phase in phases:
        assert row.events[phase] - row.at_peak["optimizer_state"] == sum(expected[phase].values()), phase


def test_a_model_in_4_bits_is_planned_with_its_packed_weights(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = real(tmp_path, "llama", double=True, kbit=True, dtype=torch.bfloat16)
    row = lowmem.plan(made, PLAIN, **SMALL).plans[0]
    expected = measured(made)
    for phase in ("loss backward", "first layer backward"):
        total = row.events[phase] - row.at_peak["optimizer_state"]
        assert total == pytest.approx(sum(expected[phase].values()), rel=0.002)


def test_the_object_stays_as_it_was():
    made = adapted()
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in made.named_parameters()}
    config = copy.deepcopy(made.config.to_dict())
    lowmem.plan(made, "adamw", batch_size=2, seq_len=48, gradient_checkpointing=True, rows="packed")
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in made.named_parameters()} == before
    assert made.config.to_dict() == config
    assert not any(getattr(m, "gradient_checkpointing", False) for m in made.modules())


def test_what_the_object_says_is_taken_over():
    assert lowmem.plan(recomputing(), "adamw", **SMALL).run.gradient_checkpointing
    assert lowmem.plan(adapted(), "adamw", **SMALL).run.dtype == "bfloat16"


def untrained() -> nn.Module:
    made = whole()
    made.requires_grad_(False)
    return made


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (untrained, {}, "nothing is trained"),
        (whole, {"lora_rank": 4}, "lora_rank.*as it is"),
        (whole, {"quantize": "nf4", "lora_rank": 4}, "as it is"),
        (whole, {"dtype": "bfloat16"}, "dtype 'bfloat16'.*'float32'"),
        (whole, {"attention": "eager"}, "attention"),
        (lambda: nn.Linear(2, 2), {}, "cannot plan Linear"),
    ],
)
def test_what_it_is_not_is_refused(make, options, match):
    with pytest.raises(UserError, match=match):
        lowmem.plan(make(), "adamw", **SMALL, **options)
