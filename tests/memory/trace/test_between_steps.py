"""Evaluations, saves and rows of unequal length: as planned, so measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import lowmem
from lowmem.memory import plan as planning
from lowmem.memory.advice.search import search
from lowmem.memory.device.gpus import Budget
from lowmem.memory.lengths import lengths
from lowmem.memory.plan import Plan
from lowmem.memory.trace.tracker import Tracker, storages
from lowmem.optim.evaluated import evaluated
from lowmem.strategies import optimizer
from tests.memory.families import FAMILIES, batch, model

SMALL = {"batch_size": 2, "seq_len": 48, "dtype": "float32", "device": "cpu", "advise": False}


class Here(Tracker):
    """What takes memory: not what a state dict makes on `meta`, to learn how its tensors are cut."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        found = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and not t.is_meta]
        for storage in (storage for t in found for storage in storages(t)):
            self._see(storage)
        return out


def tracked(made: torch.nn.Module, stepper: lowmem.LowMemOptimizer) -> Tracker:
    """A tracker that knows what lives between steps."""
    tracker = Here()
    tracker.register([*made.parameters(), *made.buffers()], "weights")
    tracker.register([t for s in stepper.state.values() for t in s.values()], "optimizer_state")
    tracker.register(stepper._constants.values(), "optimizer_state")
    return tracker


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "adamw", {}),
        ("gemma2", "adamw", {}),
        ("llama", "schedule_free", {}),  # it evaluates other weights than it trains
        ("llama", "galore", {"modifiers": "lookahead"}),
    ],
)
def test_an_evaluation_takes_what_was_planned(family: str, name: str, options: dict[str, str]) -> None:
    made = model(family)
    stepper = optimizer(made, name, **options)
    stepper.init_state()
    tracker, inputs = tracked(made, stepper), batch()
    tracker.register(inputs.values(), "activations")
    made.eval()
    with tracker, torch.no_grad():
        tracker.enter("evaluation")
        with evaluated(stepper):
            made(**inputs, use_cache=False, num_items_in_batch=torch.ones((), dtype=torch.long))
    tracker.stop()
    planned = lowmem.plan(FAMILIES[family](), name, options=options, **SMALL).plans[0]
    assert planned.events["evaluation"] == pytest.approx(tracker.peak().total, rel=0.005)


def test_a_deep_model_evaluates_like_a_shallow_one() -> None:
    from lowmem.memory.run import Run
    from lowmem.memory.trace.extrapolate import evaluated
    from lowmem.memory.trace.replica import evaluation

    config = FAMILIES["llama"]()
    config.num_hidden_layers = 8
    run = Run(batch_size=2, seq_len=48)
    assert evaluated(config, run).total == evaluation(config, run).peak().total


@pytest.mark.parametrize("name", ["adamw_8bit", "galore", "microadam"])  # the last fills tensors up
def test_a_save_takes_what_was_planned(name: str, tmp_path: Path) -> None:
    made = model("llama")
    stepper = optimizer(made, name, compile="off")
    stepper.init_state()
    tracker = tracked(made, stepper)
    with tracker:
        tracker.enter("save")
        made.save_pretrained(tmp_path)
        torch.save(stepper.state_dict(), tmp_path / "optimizer.pt")
    tracker.stop()
    planned = lowmem.plan(FAMILIES["llama"](), name, **SMALL).plans[0]
    assert planned.events["save"] == tracker.peak().total
    assert planned.certainty["save"] == "exact"


def test_a_larger_evaluation_batch_can_bind() -> None:
    few = lowmem.plan(FAMILIES["llama"](), "mezo", budget="1GiB", **SMALL | {"device": "cuda"}).plans[0]
    many = lowmem.plan(
        FAMILIES["llama"](), "mezo", budget="1GiB", eval_batch_size=4096, **SMALL | {"device": "cuda"}
    ).plans[0]
    assert (few.verdict, many.verdict, many.event) == ("fits", "out of memory", "evaluation")
    assert many.headroom_bytes < 0 < few.headroom_bytes
    none = lowmem.plan(FAMILIES["llama"](), "mezo", eval_batch_size=0, **SMALL).plans[0]
    assert "evaluation" not in none.events


MANY = {**SMALL, "device": "cuda", "eval_batch_size": 256}


@pytest.fixture(scope="module")
def evaluating() -> Plan:
    """A plan whose evaluation binds, at a budget between the two."""
    return lowmem.plan(FAMILIES["llama"](), "adamw", budget="2GiB", **MANY | {"advise": True})


def test_levers_go_by_an_evaluation_that_binds(evaluating: Plan) -> None:
    row = evaluating.plans[0]
    levers = {lever.name: lever for lever in row.levers}
    assert (row.event, levers["gradient checkpointing"].event) == ("evaluation", "evaluation")
    assert levers["gradient checkpointing"].peak == row.peak["allocated"]
    few = lowmem.plan(FAMILIES["llama"](), "adamw", **SMALL | {"device": "cuda"}).plans[0]
    assert levers["evaluation of the training's batch"].peak == few.peak["allocated"]


def test_an_evaluation_that_binds_is_reserved_for(evaluating: Plan) -> None:
    row = evaluating.plans[0]
    reserved = row.peak["reserved"]
    assert reserved is not None
    assert reserved >= row.peak["allocated"] > 2 * row.events["loss backward"]
    tensors = Budget(row.peak["allocated"], (0, 0), 0)  # which leaves nothing for segments
    tight = planning.row(evaluating.config, evaluating.run, evaluating.made[0], tensors, advise=False)
    assert (row.fits, tight.fits) == (True, False)


def test_a_search_goes_by_an_evaluation_that_binds(evaluating: Plan) -> None:
    room = evaluating.plans[0].peak["allocated"] - 1
    card, wish = (
        Budget(room, (0, 0), evaluating.run.library),
        {"batch_size": 2, "seq_len": 48, "dtype": "float32"},
    )
    (row,) = search(
        evaluating.config, card, {**wish, "eval_batch_size": 256, "lora_rank": 0}, among=["adamw"], top=0
    )
    assert (row.verdict, row.peak.event) == ("out of memory", "evaluation")


def test_a_typical_batch_is_a_shorter_one() -> None:
    config = FAMILIES["llama"]()
    both = lowmem.plan(config, "adamw", **SMALL, rows="padded", typical=16).plans[0]
    alone = lowmem.plan(config, "adamw", **SMALL | {"seq_len": 16}, rows="padded").plans[0]
    assert both.events["step of a typical batch"] == alone.peak["allocated"] < both.peak["allocated"]


def test_lengths_are_those_of_the_tokens() -> None:
    found = lengths([5, 9, 7, 1000], 64)
    assert found.to_dict() == {"rows": 4, "typical": 9, "longest": 64, "cut": 1}
    assert found.options(rows="padded") == {"seq_len": 64, "typical": 9}
    assert found.options(rows="packed") == {"longest": 64}
