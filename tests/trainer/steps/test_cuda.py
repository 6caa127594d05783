"""The trainers on a GPU: exact resume, release equal to the ordinary step, gradient-free training."""

import pytest
import torch
from tiny_models import tiny
from tiny_runs import assert_equal, keep_only, logged, trainer, weights

pytestmark = pytest.mark.cuda

GALORE = {"optim": "galore", "optim_args": "rank=4,update_proj_gap=3"}


def run(folder, resume=None, **values):
    made = trainer(
        folder,
        model=tiny(dtype=torch.bfloat16),
        use_cpu=False,
        max_steps=8,
        save_strategy="steps",
        save_steps=4,
        **values,
    )
    made.train(resume_from_checkpoint=resume)
    assert {p.device.type for p in made.model.parameters()} == {"cuda"}
    return made


@pytest.mark.parametrize(
    "values", [{"optim": "adamw"}, GALORE, {"optim": "mezo", "learning_rate": 1e-4}], ids=lambda v: v["optim"]
)
def test_resume_is_bit_exact(tmp_path, values):
    whole = run(tmp_path, **values)
    keep_only(tmp_path, 4)
    assert_equal(weights(whole), weights(run(tmp_path, resume=True, **values)))


@pytest.mark.parametrize("values", [{"optim": "adamw"}, GALORE], ids=lambda v: v["optim"])
def test_release_is_the_ordinary_step(tmp_path, values):
    ordinary = run(tmp_path / "a", clip="none", **values)
    released = run(tmp_path / "b", clip="none", gradient_release=True, **values)
    assert_equal(weights(ordinary), weights(released))
    assert logged(released, "grad_norm") == pytest.approx(logged(ordinary, "grad_norm"), rel=1e-2)
