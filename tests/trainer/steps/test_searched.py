"""A hyperparameter search over what lowmem's arguments say: every trial trains with what it asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import tiny
from tiny_runs import BASE, Rows, assert_equal, trainer, weights
from transformers.integrations import integration_utils
from transformers.trainer_utils import HPSearchBackend

from lowmem.errors import ConfigError, UserError
from lowmem.training.arguments import LowMemArguments
from lowmem.training.trainer import LowMemTrainer

RUN = {"optim": "galore", "optim_args": "rank=8", "max_steps": 3}


def searching(folder: Path, **values: Any) -> LowMemTrainer:
    args = LowMemArguments(output_dir=str(folder), **(BASE | RUN | values))
    made = LowMemTrainer(args=args, model_init=lambda: tiny(), train_dataset=Rows())
    made.remove_callback(transformers.PrinterCallback)
    made.hp_search_backend, made.hp_space = HPSearchBackend.OPTUNA, lambda trial: trial.params
    return made


class Trial(dict[str, Any]):
    """What optuna hands to the Trainer, without optuna."""

    number = 0

    @property
    def params(self) -> dict[str, Any]:
        return dict(self)


@pytest.fixture(autouse=True)
def without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that is a dict would be one of ray's."""
    monkeypatch.setattr(integration_utils, "is_ray_tune_available", lambda: True)


def tried(run: LowMemTrainer, **params: Any) -> None:
    """One trial, as the search has it."""
    run.train(trial=Trial(params))


@pytest.mark.parametrize(
    "params",
    [
        {"optim_args": "rank=2"},
        {"optim": "adamw", "optim_args": "states=int8"},
        {"clip": "none", "max_grad_norm": 0.1},
        {"clip": "tensor", "gradient_release": True, "max_grad_norm": 0.1},
    ],
)
def test_a_trial_trains_as_a_run_of_its_own_would(params: dict[str, Any], tmp_path: Path) -> None:
    run = searching(tmp_path / "search", clip="global")
    tried(run)
    as_made = weights(run)
    tried(run, **params)
    alone = trainer(tmp_path / "alone", model=run.call_model_init(), **(RUN | {"clip": "global"} | params))
    alone.train()
    assert_equal(weights(run), weights(alone))
    assert any((as_made[name] != held).any() for name, held in weights(run).items())
    assert run.lowmem_optimizer.asked == alone.args.strategy()


def test_what_a_trial_cannot_have_is_refused(tmp_path: Path) -> None:
    run = searching(tmp_path)
    with pytest.raises(ConfigError, match="rnk"):
        tried(run, optim_args="rnk=2")
    with pytest.raises(ConfigError, match=r"clip: 'tensor' is for gradient_release"):
        tried(searching(tmp_path), clip="tensor")
    with pytest.raises(
        UserError, match="optim: mezo takes no gradients, and this trainer was made for galore"
    ):
        tried(searching(tmp_path), optim="mezo", optim_args="")


def test_a_loss_that_stays_infinite_ends_a_trial_when_that_says_so(tmp_path: Path) -> None:
    run = searching(tmp_path)
    tried(run, nonfinite_limit=2)
    assert run._divergence.limit == 2


def test_arguments_changed_after_the_optimizer_was_made_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, **RUN)
    run.args.optim_args = "rank=2"
    run.train()
    assert run.lowmem_optimizer.asked == run.args.strategy()
    run.args.optim_args = "rank=4"
    with pytest.raises(UserError, match=r"optim: the optimizer was made for .*rank=2.*make another trainer"):
        run.train()
