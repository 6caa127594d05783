"""Adaptive vector freezing: which vectors stand still, against a slow transcription of the paper's rule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import tiny
from tiny_runs import assert_equal, keep_only, trainer, weights

from lowmem.errors import UserError
from lowmem.memory.run import Run
from lowmem.models.peft_methods import adapter_config

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
WHEN = {"freeze_warmup": 2, "freeze_every": 3}
ARGS = ",".join(f"{name}={value}" for name, value in WHEN.items())
ADAMW: dict[str, Any] = {"optim": "adamw", "max_steps": 9, "max_grad_norm": 0.0, "save_strategy": "no"}


def adapted(freeze: float = 3) -> Any:
    import peft

    config = adapter_config(Run(adapter="vectorfit", adapter_args=f"{ARGS},freeze={freeze}"))
    return peft.get_peft_model(tiny("opt"), config)


class Watch(transformers.TrainerCallback):  # type: ignore[misc]
    """The vectors after each step, as lists."""

    def __init__(self) -> None:
        self.seen: list[dict[str, list[float]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen.append({name: p.detach().tolist() for name, p in trained.items()})


def oracle(seen: list[dict[str, list[float]]], freeze: int, beta: float = 0.9) -> list[set[str]]:
    """Who stands still in each step after the one seen: the rule in plain numbers."""
    strength = dict.fromkeys(seen[0], 0.0)
    still: set[str] = set()
    found = []
    for step, vectors in enumerate(seen, start=1):
        for name, values in vectors.items():
            moved = sum(abs(value) for value in values) / len(values)
            strength[name] = beta * strength[name] + (1 - beta) * moved
        if step >= WHEN["freeze_warmup"] and (step - WHEN["freeze_warmup"]) % WHEN["freeze_every"] == 0:
            still = set(sorted(strength, key=lambda name: -strength[name])[:freeze])
        found.append(set(still))
    return found


def test_the_strongest_stand_still_and_go_on_after(tmp_path: Path) -> None:
    made, watch = trainer(tmp_path, model=adapted(), **ADAMW), Watch()
    made.add_callback(watch)
    made.train()
    expected = oracle(watch.seen, freeze=3)
    for still, before, after in zip(expected, watch.seen, watch.seen[1:], strict=False):
        assert {name for name in before if before[name] == after[name]} == still
    assert [len(still) for still in expected[:3]] == [0, 3, 3]
    assert len({frozenset(still) for still in expected}) > 2  # others take their turn
    assert not any(layer.frozen for layer in made.model.modules() if hasattr(layer, "vectorfit_delta"))


def test_a_resumed_run_freezes_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    values = ADAMW | {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path, model=adapted(), **values)
    whole.train()
    keep_only(tmp_path, 4)
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert len(state["stateful_callbacks"]["VectorFreezing"]["attributes"]["frozen"]) == 3
    again = trainer(tmp_path, model=adapted(), **values)
    again.train(resume_from_checkpoint=True)
    assert_equal(weights(whole), weights(again))


def test_gradients_that_are_released_step_the_same_vectors(tmp_path: Path) -> None:
    runs = [trainer(tmp_path, model=adapted(), **ADAMW, gradient_release=way) for way in (False, True)]
    for run in runs:
        run.train()
    assert_equal(*map(weights, runs))


@pytest.mark.parametrize(
    ("freeze", "optim", "match"),
    [
        (3, "mezo", "this method takes none; give --adapter-args freeze=0"),
        (24, "adamw", "there are 24 vectors"),
    ],
)
def test_what_cannot_be_frozen_is_refused(tmp_path: Path, freeze: int, optim: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        trainer(tmp_path, model=adapted(freeze), **ADAMW | {"optim": optim}).train()
