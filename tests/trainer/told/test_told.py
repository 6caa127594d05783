"""Rules that go by more than gradients through the Trainer: it tells the loss, and makes the probes."""

import pytest
import torch
from tiny_models import tiny
from tiny_runs import Rows, assert_equal, keep_only, logged, trainer, weights

from lowmem.errors import UserError


def state_of(made):
    optimizer = made.lowmem_optimizer
    return [optimizer.state[p] for _, p in optimizer.named_parameters()]


@pytest.mark.parametrize("micro", [1, 2])
def test_the_loss_that_is_told_is_the_one_that_is_logged(tmp_path, micro):
    made = trainer(tmp_path, optim="momo", learning_rate=1e-3, gradient_accumulation_steps=micro, max_steps=1)
    made.train()
    (loss,) = logged(made, "loss")
    assert {round(float(held["loss"]), 4) for held in state_of(made)} == {round(loss, 4)}


@pytest.mark.parametrize(("optim", "text"), [("sophia", "every=3"), ("momo_adam", "states=int8")])
def test_resume_is_bit_exact(tmp_path, optim, text):
    def run(resume=None, seed=0):
        made = trainer(
            tmp_path,
            model=tiny(dtype=torch.bfloat16, seed=seed),
            rows=Rows(36),
            optim=optim,
            optim_args=text,
            learning_rate=1e-3,
            max_steps=6,
            save_strategy="steps",
            save_steps=2,
        )
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run()
    keep_only(tmp_path, 4)
    assert_equal(weights(whole), weights(run(resume=True, seed=99)))
    if optim == "sophia":
        assert all(float(held["hessian"].abs().sum()) > 0.0 for held in state_of(whole))


def test_a_batch_without_labels_is_refused(tmp_path):
    class Unlabelled(Rows):
        def __getitem__(self, index):
            return {"input_ids": super().__getitem__(index)["input_ids"]}

    made = trainer(tmp_path, rows=Unlabelled(), optim="sophia", max_steps=1)
    with pytest.raises(UserError, match="labels in its batches"):
        made.train()
