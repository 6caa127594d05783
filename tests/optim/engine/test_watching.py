"""Schedules that go by gradients: what is drawn, what is frozen, and that a run resumes with it."""

from __future__ import annotations

import copy
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory import count
from lowmem.optim.schedules.watching import Converged, Important
from tests.optim.test_resting import GAP, Net, backward, net, optimizer_of

NAMES = tuple(f"layers.{i}.weight" for i in range(4))


def step(optimizer: Any, model: nn.Module, at: int) -> set[str]:
    made = backward(model, at)
    optimizer.step()
    optimizer.zero_grad()
    return made


def feed(optimizer: Any, model: nn.Module, sizes: dict[str, float]) -> None:
    """Gradients of known size for the tensors that want one."""
    for name, p in model.named_parameters():
        p.grad = torch.full_like(p, sizes.get(name, 1.0)) if p.requires_grad else None
    optimizer.step()
    optimizer.zero_grad()


def test_every_matrix_has_a_first_turn_before_gradients_count() -> None:
    model = net()
    optimizer = optimizer_of(model, "misa", share=0.34)
    turns = [frozenset(step(optimizer, model, at)) for at in range(3 * GAP)]
    assert [len(turn) for turn in turns] == [1] * 3 * GAP
    assert turns[0] == turns[1]
    assert len(set(turns)) == 3


def test_large_gradients_have_more_turns() -> None:
    """With chances 54.6 to 1 for each of the others."""
    schedule, mean = Important(gap=1, share=0.25), dict.fromkeys(NAMES, 0.02)
    mean[NAMES[2]], times = 0.4, dict.fromkeys(NAMES, 1)  # 0.2 of a first norm, uncorrected
    turns = Counter(next(iter(schedule.turn(mean, times, NAMES, at, 0))) for at in range(400))
    assert turns[NAMES[2]] == pytest.approx(400 * 54.6 / (54.6 + 3 * 1.01), abs=20)
    even = Counter(next(iter(Important(1, 0.25, 0.0).turn(mean, times, NAMES, at, 0))) for at in range(400))
    assert max(even.values()) < 140


def test_a_constant_norm_has_that_mean() -> None:
    """The published average grows without end: 1, 2.8, 5.0, 7.1, ..."""
    schedule, decided = Important(gap=1, share=1.0), ""
    for at in range(4):
        decided = schedule.decide(decided, dict.fromkeys(NAMES, 1.0), NAMES, at + 1, 0)
        found = json.loads(decided)
        assert found["mean"][NAMES[0]] / (1 - 0.8 ** found["times"][NAMES[0]]) == pytest.approx(1.0)


def test_what_is_drawn_again_keeps_its_moments() -> None:
    model = net()
    optimizer = optimizer_of(model, "misa", share=1.0)
    for at in range(3 * GAP):
        step(optimizer, model, at)
    assert int(optimizer.state[model.layers[0].weight]["age"]) == 3 * GAP
    assert not optimizer.state.get(model.embed.weight)


@pytest.mark.parametrize("name", ["misa", "grades"])
def test_a_run_resumes_with_what_was_decided(name: str) -> None:
    """Also at the switch itself, where the next roles are known and the old states are still held."""
    options: dict[str, Any] = {"share": 0.34} if name == "misa" else {"threshold": 2e-3, "grace": 0}
    for at in (GAP + 1, 2 * GAP):
        model = net()
        optimizer = optimizer_of(model, name, **options)
        whole = []
        for k in range(4 * GAP):
            if k == at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            whole.append(step(optimizer, model, k))
        other = net()
        other.load_state_dict(saved[0])
        second = optimizer_of(other, name, **options)
        second.load_state_dict(saved[1])
        assert [step(second, other, k) for k in range(at, 4 * GAP)] == whole[at:]
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)
        assert second.param_groups[0]["decided"] == optimizer.param_groups[0]["decided"] != ""


def test_a_settled_matrix_frees_its_state_and_gets_no_gradient() -> None:
    model = net()
    optimizer = optimizer_of(model, "grades", threshold=0.1, grace=2 * GAP)
    for at in range(4 * GAP):
        sizes = {f"layers.{i}.weight": 1.0 + at * i for i in range(3)}  # the first stands still
        feed(optimizer, model, sizes)
        frozen = not model.layers[0].weight.requires_grad
        assert frozen == (at + 1 >= 2 * GAP)
    assert "layers.0.weight" not in backward(model, 0)
    assert not optimizer.state.get(model.layers[0].weight)
    assert int(optimizer.state[model.layers[1].weight]["age"]) == 4 * GAP
    decided = optimizer.param_groups[0]["decided"]
    held = count.model_state_bytes(optimizer.strategy, model, step=4 * GAP - 1, decided=decided)
    assert optimizer.state_bytes() == held


def test_by_size_a_small_gradient_is_enough_and_the_last_matrix_stays() -> None:
    schedule = Converged(gap=1, threshold=0.1, grace=0, by="size")
    decided = schedule.decide("", {NAMES[0]: 0.05, NAMES[1]: 0.2}, NAMES[:2], 1, 0)
    assert schedule.role(NAMES[0], "matrix", NAMES, 1, 0, decided) == "inactive"
    assert schedule.role(NAMES[0], "matrix", NAMES, 0, 0, decided) == "matrix"
    decided = schedule.decide(decided, {NAMES[1]: 0.01}, NAMES[:2], 2, 0)
    assert schedule.role(NAMES[1], "matrix", NAMES, 2, 0, decided) == "matrix"
    both = schedule.decide("", {NAMES[0]: 0.05, NAMES[1]: 0.02}, NAMES[:2], 1, 0)
    assert list(json.loads(both)["frozen"]) == [NAMES[1]]


def test_sizes_are_means_over_elements_and_windows() -> None:
    model, seen = Net(1), []
    optimizer = lowmem.optimizer(model, "grades", lr=0.0, switch_gap=2)
    for size in (1.0, 3.0, torch.nan, 4.0):
        feed(optimizer, model, {"layers.0.weight": size})
        if optimizer.param_groups[0]["decided"]:
            seen.append(json.loads(optimizer.param_groups[0]["decided"])["size"]["layers.0.weight"])
    assert seen == [2.0, 2.0, 4.0]


def test_numbers_outside_their_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"share must be in \(0, 1\]"):
        Important(share=0.0)
    with pytest.raises(UserError, match="threshold must be above 0"):
        Converged(threshold=0.0)
    with pytest.raises(UserError, match="unknown by 'norm'"):
        Converged(by="norm")
    with pytest.raises(UserError, match="switch_gap must be at least 1"):
        Important(gap=0)
