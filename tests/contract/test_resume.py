"""Save and resume is bit-equal to the uninterrupted run, between refreshes and on one, by every road."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowmem.errors import CheckpointError
from lowmem.training.contract import zoo
from tests.contract import runs
from tests.contract.cases import Case


def places(case: Case) -> tuple[int, ...]:
    """All for a method as it comes; one, by turns, for one with an option changed."""
    return (runs.SAVED[sum(map(ord, str(case))) % len(runs.SAVED)],) if case.varied else runs.SAVED


@pytest.mark.both
@pytest.mark.costly("each")
@pytest.mark.changed
def test_resume_through_a_file_is_exact(case: Case, dtype: torch.dtype) -> None:
    whole = runs.record(case, dtype)
    for at in places(case):
        model_file, optimizer_file = whole.saved[at]
        optimizer, model = runs.finish(case, dtype, model_file, runs.from_file(optimizer_file), at)
        assert runs.same(zoo.weights(model), whole.weights), at
        assert runs.same(runs.state_of(optimizer), whole.state), at


def holding(case: Case, dtype: torch.dtype) -> set[str]:
    """Names of the tensors of which something is held before the first step."""
    model = zoo.build(dtype)
    optimizer = case.optimizer(model)
    optimizer.init_state()
    return {name for name, p in model.named_parameters() if optimizer.state.get(p)}


@pytest.mark.kinds
def test_resume_through_distributed_checkpoint_is_exact(case: Case, dtype: torch.dtype) -> None:
    """In either form of it, by turns."""
    at, flatten = runs.SAVED[-1], sum(map(ord, case.name)) % 2 == 0
    whole = runs.record(case, dtype)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    first, model = runs.run(case, dtype, at)
    saved = get_optimizer_state_dict(model, first, options=options)
    saved = runs.from_file(runs.to_file(saved))
    model_file, _ = whole.saved[at]
    fresh = zoo.build(dtype, seed=99)
    fresh.load_state_dict(runs.from_file(model_file))
    second = case.optimizer(fresh)
    before = zoo.weights(fresh)
    idle = any(rule.idle for rule in case.create().rules.values())
    held = {name for name, p in model.named_parameters() if first.state.get(p)}
    if (flatten or idle) and held != holding(case, dtype):
        # torch takes the keys from a fresh optimizer, whose active tensors are those of the first step
        says = r"lacks .*flatten_optimizer_state_dict=False.*init_state"
        says = says if not idle else "holds no .*init_state" if flatten else "has no saved optimizer state"
        with pytest.raises((CheckpointError, RuntimeError), match=says):
            set_optimizer_state_dict(fresh, second, saved, options=options)
        second = case.optimizer(fresh)
        for group in second.param_groups:
            group |= {"step": at - 1, "decided": first.param_groups[0]["decided"]}
        second.init_state()
    set_optimizer_state_dict(fresh, second, saved, options=options)
    assert runs.same(zoo.weights(fresh), before)  # torch takes one step of nothing on the way
    for step in range(at, runs.STEPS):
        runs.advance(second, fresh, step)
    assert runs.same(zoo.weights(fresh), whole.weights)
    assert runs.same(runs.state_of(second), whole.state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.kinds
def test_resume_through_files_of_distributed_checkpoint_is_exact(case: Case, tmp_path: Path) -> None:
    """It reads into what the fresh optimizer holds: `init_state` makes that what was saved."""
    at = runs.SAVED[-1]
    whole = runs.record(case, torch.bfloat16)
    first, model = runs.run(case, torch.bfloat16, at)
    dcp.save({"optimizer": get_optimizer_state_dict(model, first)}, checkpoint_id=tmp_path)
    fresh = zoo.build(torch.bfloat16, seed=99)
    fresh.load_state_dict(runs.from_file(whole.saved[at][0]))
    second = case.optimizer(fresh)
    for group in second.param_groups:  # decides which tensors hold state, where that changes
        group |= {"step": at - 1, "decided": first.param_groups[0]["decided"]}
    second.init_state()
    found = {"optimizer": get_optimizer_state_dict(fresh, second)}
    dcp.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(fresh, second, found["optimizer"])
    for step in range(at, runs.STEPS):
        runs.advance(second, fresh, step)
    assert runs.same(zoo.weights(fresh), whole.weights)
    assert runs.same(runs.state_of(second), whole.state)


def leaves(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in leaves(part)]
    return [value]


@pytest.mark.kinds
def test_a_checkpoint_holds_plain_values_alone(case: Case, dtype: torch.dtype) -> None:
    held = runs.from_file(runs.record(case, dtype).saved[runs.SAVED[-1]][1])
    plain = (int, float, str, bool, type(None))
    assert all(type(leaf) in plain or isinstance(leaf, torch.Tensor) for leaf in leaves(held))


def test_loading_keeps_the_dtype_of_every_tensor(case: Case) -> None:
    """torch's own load would cast codes, indices and scales to the weight's bf16."""
    whole = runs.record(case, torch.bfloat16)
    at = runs.SAVED[-1]
    model = zoo.build(torch.bfloat16)
    optimizer = case.optimizer(model)
    optimizer.load_state_dict(runs.from_file(whole.saved[at][1]))
    held = {i: {k: (v.dtype, v.shape) for k, v in s.items()} for i, s in runs.state_of(optimizer).items()}
    assert held == whole.held[at - 1]


@pytest.mark.kinds
def test_loading_does_not_share_memory_with_the_checkpoint(case: Case) -> None:
    at = runs.SAVED[-1]
    model_file, optimizer_file = runs.record(case, torch.float32).saved[at]
    loaded = runs.from_file(optimizer_file)
    runs.finish(case, torch.float32, model_file, loaded, at)
    assert runs.same(loaded, runs.from_file(optimizer_file))


@pytest.mark.kinds
def test_a_checkpoint_that_lost_its_state_is_refused(case: Case) -> None:
    """A store that reads what the optimizer holds already gives a fresh one nothing, without an error."""
    at = runs.SAVED[-1]
    _, optimizer_file = runs.record(case, torch.float32).saved[at]
    saved = runs.from_file(optimizer_file)
    optimizer = case.optimizer(zoo.build(torch.float32))
    if not any(saved["state"].values()):
        optimizer.load_state_dict({**saved, "state": {}})  # nothing was held, so nothing is lost
        return
    as_text = {**saved, "state": {str(i): held for i, held in saved["state"].items()}}
    with pytest.raises(CheckpointError, match="belongs to no parameter"):
        optimizer.load_state_dict(as_text)
    with pytest.raises(CheckpointError, match=rf"of step {at} and holds no .*init_state"):
        optimizer.load_state_dict({**saved, "state": {}})


@pytest.mark.kinds
def test_a_checkpoint_that_does_not_fit_changes_nothing(case: Case) -> None:
    """The last of the tensors does not fit; those before it would have been loaded."""
    at = runs.SAVED[-1]
    saved = runs.from_file(runs.record(case, torch.float32).saved[at][1])
    last = max((i for i, held in saved["state"].items() if held), default=None)
    if last is None:
        return
    key, tensor = next(iter(saved["state"][last].items()))
    saved["state"][last][key] = torch.cat([tensor.reshape(-1), tensor.reshape(-1)[:1]])
    optimizer = case.optimizer(zoo.build(torch.float32))
    optimizer.init_state()
    before = runs.state_of(optimizer)
    with pytest.raises(CheckpointError, match="does not fit"):
        optimizer.load_state_dict(saved)
    assert runs.same(runs.state_of(optimizer), before)
    assert {group["step"] for group in optimizer.param_groups} == {0}


@pytest.mark.kinds
def test_order_of_saved_keys_does_not_matter(case: Case, dtype: torch.dtype) -> None:
    """A store may give the state tensors of a parameter back in any order."""
    whole = runs.record(case, dtype)
    at = runs.SAVED[-1]
    model_file, optimizer_file = whole.saved[at]
    saved = runs.from_file(optimizer_file)
    saved["state"] = {i: dict(reversed(held.items())) for i, held in saved["state"].items()}
    _, model = runs.finish(case, dtype, model_file, saved, at)
    assert runs.same(zoo.weights(model), whole.weights)
