"""Gradient release through the Trainer: the ordinary step, a truthful norm, no gradient left."""

import pytest
import torch
import transformers
from tiny_models import tiny
from tiny_runs import assert_equal, keep_only, logged, trainer, weights

from lowmem.errors import ConfigError

GALORE = {"optim": "galore", "optim_args": "rank=4,update_proj_gap=5"}
STRATEGIES = [{"optim": "adamw"}, GALORE]


class NoGradients(transformers.TrainerCallback):
    """Asserts that no gradient outlives the backward pass."""

    def __init__(self):
        self.seen = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(p.grad is None for p in model.parameters())
        self.seen += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s["optim"])
def test_release_is_the_ordinary_step_bit_for_bit(tmp_path, strategy, dtype):
    def run(name, **values):
        made = trainer(
            tmp_path / name, model=tiny(dtype=dtype), max_steps=7, clip="none", **strategy, **values
        )
        watch = NoGradients()
        if values:
            made.add_callback(watch)
        made.train()
        assert watch.seen == (7 if values else 0)
        return made

    ordinary, released = run("ordinary"), run("released", gradient_release=True)
    assert_equal(weights(ordinary), weights(released))
    assert logged(released, "learning_rate") == logged(ordinary, "learning_rate")
    assert logged(released, "grad_norm") == pytest.approx(logged(ordinary, "grad_norm"), rel=1e-2)
    assert len(set(logged(released, "grad_norm"))) > 5


def test_hooks_are_gone_after_training_and_after_an_error(tmp_path):
    made = trainer(tmp_path / "a", optim="adamw", gradient_release=True, max_steps=2)
    made.train()
    assert not any(p._post_accumulate_grad_hooks for p in made.model.parameters())

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            raise RuntimeError("stop")

    made = trainer(tmp_path / "b", optim="adamw", gradient_release=True, max_steps=2)
    made.add_callback(Stop())
    with pytest.raises(RuntimeError, match="stop"):
        made.train()
    assert not any(p._post_accumulate_grad_hooks for p in made.model.parameters())


def test_accumulation_in_the_subspace_is_the_ordinary_accumulation(tmp_path):
    def run(name, **values):
        made = trainer(
            tmp_path / name,
            max_steps=6,
            gradient_accumulation_steps=3,
            clip="none",
            adam_epsilon=1e-3,
            **GALORE,
            **values,
        )
        made.train()
        return made

    ordinary, released = run("ordinary"), run("released", gradient_release=True)
    for name, weight in weights(ordinary).items():
        torch.testing.assert_close(weights(released)[name], weight, rtol=0, atol=2e-5, msg=name)
    # every tensor is refreshed at the first step, so its gradient is whole; later it is the projection
    assert len(logged(ordinary, "grad_norm")) == 6
    assert len(logged(released, "grad_norm")) == 1
    assert logged(released, "grad_norm")[0] == pytest.approx(logged(ordinary, "grad_norm")[0], rel=1e-4)
    seen, whole = logged(released, "projected_grad_norm"), logged(ordinary, "grad_norm")[1:]
    assert all(0 < low < norm for low, norm in zip(seen, whole, strict=True))


@pytest.mark.parametrize("clip", ["previous", "tensor"])
def test_sums_of_projections_are_clipped(tmp_path, clip):
    """Adam's eps is large, so that a clipped step is a shorter one."""

    def moved(max_grad_norm):
        made = trainer(
            tmp_path / str(max_grad_norm), gradient_release=True, gradient_accumulation_steps=3, clip=clip,
            max_grad_norm=max_grad_norm, max_steps=3, adam_epsilon=1e3, learning_rate=1e3, weight_decay=0.0,
            **GALORE,
        )  # fmt: skip
        before = {name: w.clone() for name, w in weights(made).items()}
        made.train()
        return sum(float((w - before[name]).norm()) for name, w in weights(made).items())

    assert moved(1e-3) < 0.7 * moved(1e3)


def test_accumulation_is_refused_where_the_whole_gradient_is_needed(tmp_path):
    with pytest.raises(ConfigError, match="accumulation 1, no gradient release, or galore"):
        trainer(tmp_path, optim="adamw", gradient_release=True, gradient_accumulation_steps=2)


@pytest.mark.parametrize("clip", ["previous", "tensor"])
def test_released_run_resumes_bit_exactly_with_clipping(tmp_path, clip):
    """The norm that clips the first step after a resume comes from the checkpoint."""

    def run(resume=None):
        made = trainer(
            tmp_path,
            gradient_release=True,
            clip=clip,
            max_grad_norm=0.5,
            max_steps=12,
            save_strategy="steps",
            save_steps=6,
            **GALORE,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    keep_only(tmp_path, 6)
    resumed = run(resume=True)
    assert_equal(weights(whole), weights(resumed))
    assert logged(resumed, "grad_norm") == logged(whole, "grad_norm")
