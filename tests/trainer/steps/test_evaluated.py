"""What is evaluated and what is saved, where a method trains beside the weights that it evaluates."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from tiny_runs import Rows, assert_equal, trainer, weights

from lowmem.optim.evaluated import evaluated


def test_a_model_is_evaluated_and_saved_at_the_average_and_a_checkpoint_is_not(tmp_path: Path) -> None:
    run = trainer(
        tmp_path, held=Rows(4), optim="schedule_free", max_steps=3, save_strategy="steps", save_steps=3,
        lr_scheduler_type="constant", warmup_steps=0,
    )  # fmt: skip
    run.train()
    trained, seen = weights(run), []
    hook = run.model.register_forward_pre_hook(lambda *_: seen.append(weights(run)))
    run.evaluate()
    hook.remove()
    assert_equal(weights(run), trained)
    run.save_model(str(tmp_path / "model"))
    with evaluated(run.lowmem_optimizer):
        averaged = weights(run)
    assert_equal(seen[0], averaged)
    assert any(not torch.equal(averaged[key], trained[key]) for key in trained)
    found = {name: load_file(tmp_path / name / "model.safetensors") for name in ("model", "checkpoint-3")}
    for key, value in found["model"].items():
        torch.testing.assert_close(value, averaged[key], rtol=0, atol=0)
        torch.testing.assert_close(found["checkpoint-3"][key], trained[key], rtol=0, atol=0)
