"""Adapters by name: planned as peft makes them, and refused where the plan does not know."""

from __future__ import annotations

import pytest
import torch

import lowmem
from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.models.peft_methods import adapter_config
from tests.memory import families
from tests.memory.test_quantized import measured

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SMALL = {"batch_size": 2, "seq_len": 48, "device": "cpu", "max_grad_norm": 0.0, "advise": False}
KINDS = {
    "targets": {"lora_rank": 4, "lora_targets": "q_proj,v_proj", "lora_alpha": 3.0},
    "dropout": {"lora_rank": 4, "lora_dropout": 0.1},
    "dora": {"lora_rank": 4, "adapter_args": "use_dora=true"},
    "ia3": {"adapter": "ia3"},
    "vera": {"adapter": "vera", "adapter_args": "r=8"},
    "vectorfit": {"adapter": "vectorfit", "adapter_args": "rank=0.5"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_is_a_real_step(kind: str) -> None:
    import peft

    with torch.random.fork_rng(devices=[]):
        made = peft.get_peft_model(families.model("llama"), adapter_config(Run(**KINDS[kind])))
    expected = measured(made)
    plain = lowmem.create("adamw", writer="nearest")
    found = lowmem.plan(families.FAMILIES["llama"](), plain, dtype="float32", **SMALL, **KINDS[kind])
    assert found.model.trainable == sum(p.numel() for p in made.parameters() if p.requires_grad)
    row = found.plans[0]
    for phase in ("loss backward", "first layer backward"):
        total = row.events[phase] - row.at_peak["optimizer_state"]
        assert total == pytest.approx(sum(expected[phase].values()), rel=0.005), phase


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "answer"}, "generates.*finetune --objective accuracy"),
        ({"task": "grpo"}, "8 answers per prompt do not divide"),
        ({"task": "dop"}, "did you mean 'dpo'"),
        ({"adapter": "iaa3"}, "did you mean 'ia3'"),
        ({"adapter": "ia3", "lora_rank": 4}, "give one of them"),
        ({"lora_alpha": 2.0}, "give lora_rank"),
        ({"adapter_args": "use_dora=true"}, "give lora_rank or adapter"),
        ({"lora_rank": 4, "adapter_args": "use_dra=true"}, "use_dora"),
        ({"adapter": "ia3", "quantize": "nf4"}, "planned under LoRA"),
        ({"adapter": "vectorfit", "adapter_args": "rank=-1"}, "a share below 1, got -1"),
        ({"adapter": "vectorfit", "ranks": 2}, "not sharded; take shard none"),
        (
            {"adapter": "loha", "adapter_args": "r=2,target_modules=q_proj+v_proj"},
            "does not run without data",
        ),
    ],
)
def test_what_is_not_planned_is_refused_by_name(options: dict[str, object], match: str) -> None:
    with pytest.raises(UserError, match=match) as refused:
        lowmem.plan(families.FAMILIES["llama"](), "adamw", **SMALL, **options)
    assert "\n" not in str(refused.value)
