"""An ordinary optimizer: it learns, and lr, betas, eps, weight decay and decay groups reach it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lowmem.training.contract import zoo
from tests.contract import runs
from tests.contract.cases import Case

STEPS = 40
RATES = (1e-2, 1e-3, 0.3)
"""Rules step on different scales; one of these must do."""


def test_the_loss_falls(case: Case, dtype: torch.dtype) -> None:
    wanted = (0.75 if case.by_backward else 0.97) * zoo.evaluate(zoo.build(dtype))
    assert any(falls_to(wanted, case, dtype, lr) for lr in RATES)


def falls_to(wanted: float, case: Case, dtype: torch.dtype, lr: float) -> bool:
    """Within so many steps; looked at now and then, as most are there soon."""
    model = zoo.build(dtype)
    optimizer = case.optimizer(model, lr=lr)
    for step in range(STEPS):
        runs.advance(optimizer, model, step, size=32)
        if step % 5 == 4 and zoo.evaluate(model) < wanted:
            return True
    return False


def first_move(case: Case, **hyper: object) -> dict[str, torch.Tensor]:
    """How far the tensors go that the first step moves."""
    model = zoo.build()
    before = zoo.weights(model)
    optimizer = case.optimizer(model, **{"weight_decay": 0.0, **hyper})
    moving = runs.stepping(optimizer, model)
    runs.advance(optimizer, model, 0)
    after = zoo.weights(model)
    return {name: after[name].double() - before[name].double() for name in moving}


def test_the_first_step_is_proportional_to_lr(case: Case) -> None:
    one, two = first_move(case, lr=0.1), first_move(case, lr=0.2)
    for name, move in one.items():
        assert move.abs().max() > 0, name
        torch.testing.assert_close(two[name], 2 * move, rtol=1e-3, atol=1e-6)


@pytest.mark.kinds
def test_lr_zero_leaves_every_bit(case: Case, dtype: torch.dtype) -> None:
    _, model = runs.run(case, dtype, 3, lr=0.0, weight_decay=0.5)
    assert runs.same(zoo.weights(model), zoo.weights(zoo.build(dtype)))


@pytest.mark.kinds
def test_a_scheduler_is_followed(case: Case) -> None:
    """Halving lr by the group is the same as having been given half."""
    model, other = zoo.build(), zoo.build()
    scheduled, constant = case.optimizer(model, lr=1e-2), case.optimizer(other, lr=5e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 0.5)
    for step in range(3):
        runs.advance(scheduled, model, step)
        schedule.step()
        runs.advance(constant, other, step)
    assert runs.same(zoo.weights(model), zoo.weights(other))


OWN_RATES = {"square", "momentum"}
"""What Adafactor holds: its averages go by options of its own."""
NO_MOMENTS = {"age", "projector", "residual", "writer", "schedule", *OWN_RATES}


def averages(held: dict[str, torch.Tensor]) -> bool:
    """Whether a state has to do with betas and eps; unknown states count as such."""
    return any(key.removeprefix("inner.").split(".")[0] not in NO_MOMENTS for key in held)


@pytest.mark.parametrize(
    ("changed", "values"), [("betas", [(0.5, 0.99), (0.9, 0.5)]), ("eps", [1e-2])], ids=["betas", "eps"]
)
def test_betas_and_eps_reach_every_rule_that_has_moments(case: Case, changed: str, values: list) -> None:
    """One of two averages is enough, and one tensor of a rule: signs may not turn in every one."""
    if not any(averages(held) for held in runs.record(case, torch.float32).state.values()):
        pytest.skip("it holds no average that goes by betas and eps")
    if not case.reads(changed):
        pytest.skip(f"no rule reads {changed}")
    optimizer, model = runs.run(case, torch.float32, 4)
    before = zoo.weights(model)
    others = [zoo.weights(runs.run(case, torch.float32, 4, **{changed: value})[1]) for value in values]
    moments = {i for i, held in runs.state_of(optimizer).items() if averages(held)}
    names = [name for i, name in enumerate(order_of(case)) if i in moments]
    by_rule: dict[str, list[bool]] = {}
    for name, p in model.named_parameters():
        rule_name = optimizer.rule_name(p)
        if name in names and changed in optimizer.strategy.rules[rule_name].uses:
            moved = any(not torch.equal(before[name], other[name]) for other in others)
            by_rule.setdefault(rule_name, []).append(moved)
    assert all(any(moved) for moved in by_rule.values()), by_rule


def order_of(case: Case) -> list[str]:
    model = zoo.build()
    by_id = {id(p): name for name, p in model.named_parameters()}
    return [by_id[id(p)] for group in case.optimizer(model).param_groups for p in group["params"]]


def test_decay_is_decoupled_and_keeps_to_its_group(case: Case) -> None:
    """With a loss that does not depend on the weights, decay is all there is."""
    if any(rule.own_decay for rule in case.create().rules.values()):
        pytest.skip("its decay goes with its own step: see its oracle")
    model = zoo.build()
    before = zoo.weights(model)
    decay_names = {name for name in before if "norm" not in name and "bias" not in name}
    optimizer = case.optimizer(model, lr=0.1, weight_decay=0.5, decay_names=decay_names)
    moving = runs.stepping(optimizer, model)
    optimizer.backward(lambda: sum((0.0 * p).sum() for p in model.parameters()), model)
    runs.tell(optimizer, lambda: 0.0 * next(model.parameters()).flatten()[None])
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name in decay_names & moving else 1.0
        assert torch.allclose(p.detach(), factor * before[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("writer", ["stochastic", "kahan", "split"])
@pytest.mark.plain
def test_small_decay_reaches_bf16_weights(case: Case, writer: str) -> None:
    """1 - 1e-3 rounds to 1 in bf16; the writer may not lose it."""
    if any(rule.own_decay for rule in case.create().rules.values()):
        pytest.skip("its decay goes with its own step: see its oracle")
    options = {**dict(case.options), "writer": writer}
    model = nn.ParameterList([torch.ones(64, 64, dtype=torch.bfloat16)])
    optimizer = Case(case.name, tuple(options.items())).optimizer(model, lr=1e-2, weight_decay=0.1)
    for _ in range(30):
        optimizer.backward(lambda: (0.0 * model[0]).sum(), model)
        runs.tell(optimizer, lambda: 0.0 * model[0])
        optimizer.step()
        optimizer.zero_grad()
    assert float(model[0].detach().float().mean()) == pytest.approx(0.999**30, abs=4e-3)


@pytest.mark.kinds
def test_groups_of_ones_own_keep_their_numbers(case: Case) -> None:
    """A group with lr 0 stays; its neighbour moves."""
    model = zoo.build()
    optimizer = case.optimizer(
        model, decay_names={name for name, p in model.named_parameters() if p.dim() > 1}
    )
    assert len(optimizer.param_groups) == 2
    optimizer.param_groups[0]["lr"] = 0.0
    before, active = zoo.weights(model), runs.stepping(optimizer, model)
    moving = active & set(optimizer.param_groups[1]["param_names"])
    runs.advance(optimizer, model, 0)
    for name, p in model.named_parameters():
        assert torch.equal(p.detach(), before[name]) != (name in moving), name


@pytest.mark.kinds
def test_group_values_are_plain(case: Case) -> None:
    optimizer, _ = runs.run(case, torch.float32, 1)
    for group in optimizer.param_groups:
        assert isinstance(group["step"], int)
        for key, value in group.items():
            flat = value if isinstance(value, list | tuple) else [value]
            if key != "params":
                assert all(type(x) in (int, float, str, bool, type(None)) for x in flat), key
