"""LowMemSFTTrainer, and TRL's own trainers with a lowmem optimizer."""

import os
import subprocess
import sys

import pytest
import torch
import transformers
from datasets import Dataset
from tiny_folder import make_model, tokenizer
from tiny_runs import BASE, assert_equal, keep_only, logged, weights

from lowmem import hf_optimizer
from lowmem.models.computing.attention import PACKED
from lowmem.training.arguments import LowMemSFTConfig
from lowmem.training.trainer import LowMemSFTTrainer

GALORE = {"optim": "galore", "optim_args": "rank=4,update_proj_gap=3"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def rows(count=30):
    return Dataset.from_list(
        [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}" * (1 + i % 3)} for i in range(count)]
    )


def sft(place, folder, dtype=torch.float32, **values):
    settings = {**BASE, **GALORE, "bf16": False, "max_length": 48, "adam_epsilon": 1e-3, **values}
    args = LowMemSFTConfig(output_dir=str(place), **settings)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    made = LowMemSFTTrainer(model, args, train_dataset=rows(), processing_class=tokenizer())
    made.remove_callback(transformers.PrinterCallback)
    return made


@pytest.mark.parametrize("values", [{}, {"packing": True}, {"gradient_accumulation_steps": 3}], ids=str)
def test_label_loss_trains_as_trls_own_loss(tmp_path, folder, values):
    runs = {}
    for mine in (True, False):
        made = sft(tmp_path / str(mine), folder, max_steps=5, label_loss=mine, **values)
        made.train()
        assert bool(logged(made, "entropy")) is not mine  # which loss ran: only TRL's measures entropy
        runs[mine] = made
    torch.testing.assert_close(logged(runs[True], "loss"), logged(runs[False], "loss"), rtol=2e-5, atol=0)
    for name, weight in weights(runs[False]).items():
        torch.testing.assert_close(weights(runs[True])[name], weight, rtol=0, atol=2e-5, msg=name)


def test_packed_examples_attend_by_themselves(tmp_path, folder):
    losses = {}
    for masked in (False, True):
        made = sft(tmp_path / str(masked), folder, max_steps=4, packing=True)
        assert made.model.config._attn_implementation == PACKED
        if masked:
            made.model.set_attn_implementation("sdpa")
        made.train()
        losses[masked] = logged(made, "loss")
    torch.testing.assert_close(losses[False], losses[True], rtol=2e-5, atol=0)
    assert sft(tmp_path / "rows", folder, max_steps=1).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("packing", [True, False])
def test_bf16_resume_is_bit_exact(tmp_path, folder, packing):
    def run(resume=None):
        made = sft(
            tmp_path,
            folder,
            torch.bfloat16,
            max_steps=8,
            packing=packing,
            save_strategy="steps",
            save_steps=4,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    keep_only(tmp_path, 4)
    assert_equal(weights(whole), weights(run(resume=True)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8"]  # no card of TRL's


def test_large_logits_go_through_trls_tiles(tmp_path, folder, monkeypatch):
    monkeypatch.setattr("lowmem.models.computing.loss.LIMIT", 1000)
    made = sft(tmp_path, folder, max_steps=1)
    made.train()
    assert len(logged(made, "entropy")) == 1


def test_evaluation_of_the_trainer_works_with_packing(tmp_path, folder):
    made = sft(tmp_path, folder, max_steps=2, packing=True)
    metrics = made.evaluate(rows(6))
    assert 4.0 < metrics["eval_loss"] < 7.0


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # TRL reads the old name
def test_dpo_trains_with_a_lowmem_optimizer(tmp_path, folder):
    import trl

    pairs = Dataset.from_list(
        [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(8)]
    )
    args = trl.DPOConfig(
        output_dir=str(tmp_path),
        activation_checkpointing=False,
        bf16=False,
        max_steps=3,
        **{k: v for k, v in BASE.items() if k not in ("weight_decay", "warmup_steps")},
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    made = trl.DPOTrainer(
        model,
        args=args,
        train_dataset=pairs,
        processing_class=tokenizer(),
    )
    made.optimizer_cls_and_kwargs = hf_optimizer("galore", lr=1e-2, rank=4)
    made.remove_callback(transformers.PrinterCallback)
    before = weights(made)
    made.train()
    assert made.optimizer.optimizer.strategy.name == "galore"
    assert all(not torch.equal(before[n], w) for n, w in weights(made).items() if w.ndim == 2)


def test_trl_is_imported_only_for_its_trainer():
    code = (
        "import sys, lowmem; lowmem.LowMemTrainer, lowmem.LowMemArguments, lowmem.hf_optimizer; "
        "assert 'trl' not in sys.modules; lowmem.LowMemSFTTrainer, lowmem.LowMemSFTConfig; "
        "assert 'trl' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
