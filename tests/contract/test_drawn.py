"""Compositions drawn by lot: what can be made can be planned, stepped, guarded, saved and made again.

One short run of a composition answers all of it, so that many can be drawn; a part that is new is drawn too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowmem
from lowmem.memory import count
from lowmem.optim.writers import Stochastic
from tests.contract import cases, runs, zoo
from tests.contract.cases import Case
from tests.contract.test_guards import all_finite, seen, spoiled

STEPS, SAVED = runs.GAP + 3, runs.GAP + 1
"""Names stagger the refreshes: in these steps every tensor has had one."""


def dtype_of(case: Case) -> torch.dtype:
    """Writers differ in 16 bits alone; the others take turns."""
    plain = case.create().writer == Stochastic() and sum(map(ord, str(case))) % 2
    return torch.float32 if plain else torch.bfloat16


def advance(case: Case, optimizer: Any, model: zoo.Zoo, steps: range) -> None:
    """The third gradient has bad elements, the fifth is nothing but NaN."""
    for step in steps:
        if not case.by_backward:
            runs.advance(optimizer, model, step)
            continue
        if step == 2:
            check_bad_elements(optimizer, model)
        elif step == 4:
            check_nothing_but_nan(optimizer, model)
        else:
            runs.feed(optimizer, model, step)


def check_bad_elements(optimizer: Any, model: zoo.Zoo) -> None:
    before, counted, looked_at = zoo.weights(model), optimizer.nonfinite(), seen(optimizer, model)
    where = spoiled(model, 77)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p.detach()[where[name]], before[name][where[name]]), name
    assert optimizer.nonfinite() - counted >= looked_at
    assert all_finite(optimizer, model)


def check_nothing_but_nan(optimizer: Any, model: zoo.Zoo) -> None:
    before = zoo.weights(model)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    optimizer.zero_grad()
    assert runs.same(zoo.weights(model), before)


def forms(optimizer: Any) -> dict[int, dict[str, Any]]:
    return {i: {k: (v.dtype, v.shape) for k, v in s.items()} for i, s in runs.state_of(optimizer).items()}


@pytest.mark.parametrize("drawn", cases.drawn(), ids=str)
def test_what_can_be_made_holds_together(drawn: Case) -> None:
    dtype, strategy = dtype_of(drawn), drawn.create()
    assert lowmem.create(drawn.name, **strategy.options) == strategy
    model = zoo.build(dtype)
    optimizer = drawn.optimizer(model)
    optimizer.init_state()
    first, before = forms(optimizer), zoo.weights(model)
    assert optimizer.state_bytes() == count.model_state_bytes(strategy, model)
    advance(drawn, optimizer, model, range(SAVED))
    saved = runs.to_file(model.state_dict()), runs.to_file(optimizer.state_dict())
    advance(drawn, optimizer, model, range(SAVED, STEPS))
    step = STEPS - 1  # the one that was taken last
    assert optimizer.state_bytes() == count.model_state_bytes(strategy, model, step=step)
    if not strategy.schedule.switches(runs.GAP):
        assert forms(optimizer) == first
    assert all_finite(optimizer, model)
    assert any(not torch.equal(w, before[name]) for name, w in zoo.weights(model).items())
    again = zoo.build(dtype, seed=99)
    again.load_state_dict(runs.from_file(saved[0]))
    second = drawn.optimizer(again, lr=0.5)  # the checkpoint knows better
    second.load_state_dict(runs.from_file(saved[1]))
    advance(drawn, second, again, range(SAVED, STEPS))
    assert runs.same(zoo.weights(again), zoo.weights(model))
    assert runs.same(runs.state_of(second), runs.state_of(optimizer))


def test_every_part_is_drawn() -> None:
    """Whatever is registered has its turn without being named here."""
    told = [dict(one.options) for one in cases.drawn()]
    for kind in ("projector", "rule", "residual", "writer", "schedule", "source"):
        names = {options.get(kind, cases.AXES[kind]) for options in told}
        assert names >= set(cases.parts(kind)), kind
    chosen = {name for options in told for name in str(options.get("modifiers", "")).split("+")}
    assert chosen >= set(cases.parts("modifier"))
    assert len(set(cases.drawn())) >= cases.DRAWS


@pytest.mark.parametrize("lot", range(0, 300, 3))
def test_what_cannot_be_made_says_so_in_one_line(lot: int) -> None:
    for one in (cases.draw(i) for i in range(lot, lot + 3)):
        for _, error in cases.refused([one]):
            assert len(str(error).splitlines()) == 1
            assert any(word in str(error) for word in ("take ", "choose", "leave", "give", "needs")), error
