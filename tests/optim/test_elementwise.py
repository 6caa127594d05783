"""What is made of a rule that a paper writes: precisions, ages, blocks that share a number, the weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Dense
from lowmem.optim.elementwise import Beside, Elementwise, Moment, Moments, coded
from lowmem.optim.engine.ages import numbers_of, table
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.engine.cutting import policy
from lowmem.optim.held import pooled, spread
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.moments import Momentum
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.terms.changes import Rotation
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import made
from lowmem.optim.writers import NEAREST


@dataclass(frozen=True)
class Shared(Elementwise):
    """Adam whose second moment is one number for each block."""

    block: int = 64
    moments: ClassVar[Mapping[str, Moment]] = {
        "exp_avg": Moment(),
        "exp_avg_sq": Moment(signed=False, each=64),
    }

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        return Adam().numbers(t, hp)

    def move(self, g: Tensor, m: Moments, x: Beside) -> dict[str, Tensor]:
        rate1, rate2 = x.numbers[:2]
        square = pooled(g * g, self.block)
        return {
            "exp_avg": torch.lerp(m["exp_avg"], g, rate1),
            "exp_avg_sq": torch.lerp(m["exp_avg_sq"], square, rate2),
        }

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        _, _, eps, correction1, correction2 = x.numbers
        return m["exp_avg"] * correction1 / (spread(m.root("exp_avg_sq"), self.block) * correction2 + eps)


@dataclass(frozen=True)
class Trusting(Elementwise):
    """Steps that are longer where the weight is larger."""

    reads_weight: ClassVar[bool] = True
    ages: ClassVar[bool] = False

    def direction(self, g: Tensor, m: Moments, old: Moments, x: Beside) -> Tensor:
        assert x.weight is not None
        return g * x.weight.abs()


@dataclass(frozen=True)
class Slow(Elementwise):
    """A slow average, which does not move in 8 bits."""

    moments: ClassVar[Mapping[str, Moment]] = {"fast": Moment(), "slow": Moment(states="bf16")}


@dataclass(frozen=True)
class Variance(Elementwise):
    """An unsigned moment, and nothing said of a change of basis."""

    moments: ClassVar[Mapping[str, Moment]] = {"exp_avg_sq": Moment(signed=False)}


def hyper(w: Tensor, chunks: Chunks, step: int = 0) -> Hyper:
    return Hyper(step, "w", 0, 0.1, (0.9, 0.99), 1e-8, 0.0, Dense(w), chunks.advance_)


def follow(rule: Any, shape: tuple[int, ...], gradients: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    chunks, w = Chunks(), torch.ones(shape)
    state = rule.init(w) | made(rule.constants(shape), w.device)
    for step, g in enumerate(gradients):
        chunks.apply_(rule, NEAREST, w, Dense(g), state, {}, hyper(w, chunks, step))
    return w, state


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_equal_rules_are_one_object() -> None:
    assert coded(Adam(), "int8") is coded(Adam(), {"exp_avg": "int8", "exp_avg_sq": "int8"})
    assert coded(SGD(2.0)) is coded(SGD(2.0), "int8")
    assert coded(SGD(2.0)) is not coded(SGD(3.0))


def test_a_moment_is_held_as_precisely_as_it_needs() -> None:
    held = {key: value.dtype for key, value in coded(Slow(), "int8").init(torch.zeros(512)).items()}
    assert held["slow"] == torch.bfloat16
    assert held["fast.codes"] == torch.uint8
    assert coded(Slow(), "fp32").init(torch.zeros(4))["slow"].dtype == torch.float32
    with pytest.raises(UserError, match="slow needs bf16 at least, got 'int4'; take slow_states=bf16"):
        coded(Slow(), {"slow": "int4"})
    with pytest.raises(UserError, match="no moment 'exp_avg'"):
        coded(Slow(), {"exp_avg": "int4"})
    with pytest.raises(UserError, match="unknown states 'int7'"):
        coded(Slow(), "int7")


@pytest.mark.parametrize("shape", [(3, 64), (5, 41), (1,)])
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_blocks_share_a_number(shape: tuple[int, ...], states: str) -> None:
    """Against the plain arithmetic; the last block is filled up with zeros."""
    rule = coded(Shared(), states)
    gradients = [normal(*shape, seed=t) for t in range(4)]
    w, state = follow(rule, shape, gradients)
    d = math.prod(shape)
    assert state["exp_avg_sq"].shape == (-(-d // 64),)
    whole, m, v = torch.ones(d), torch.zeros(d), torch.zeros(-(-d // 64))
    for t, g in enumerate(gradients, 1):
        flat = torch.nn.functional.pad(g.view(-1), (0, -d % 64))
        m = m.lerp(g.view(-1), 0.1)
        v = v.lerp(flat.square().view(-1, 64).mean(1), 0.01)
        root = (v / (1 - 0.99**t)).sqrt().repeat_interleave(64)[:d]
        whole -= 0.1 * (m / (1 - 0.9**t)) / (root + 1e-8)
    close = 1e-6 if states == "fp32" else 0.01
    torch.testing.assert_close(w.view(-1), whole, rtol=0, atol=close)


def test_a_shared_number_counts_a_bad_element_as_zero_and_stays_finite() -> None:
    g = normal(2, 64)
    g[0, 5] = math.nan
    w, state = follow(coded(Shared()), (2, 64), [g])
    assert w[0, 5] == 1.0
    assert w.isfinite().all()
    assert state["exp_avg_sq"].isfinite().all()
    assert (state["exp_avg_sq"] > 0).all()


def test_the_weight_reaches_a_rule_that_reads_it() -> None:
    w, chunks = normal(3, 5), Chunks()
    before, g = w.clone(), normal(3, 5, seed=1)
    chunks.apply_(coded(Trusting()), NEAREST, w, Dense(g), {}, {}, hyper(w, chunks))
    torch.testing.assert_close(w, before - 0.1 * g * before.abs())


def test_moments_without_a_sign_do_not_turn_by_themselves() -> None:
    coded(Momentum(0.9)).check_rebase("rotate")
    coded(SGD()).check_rebase("rotate")
    coded(Adam()).check_rebase("rotate")
    with pytest.raises(UserError, match="'rotate' is not defined for the moments of variance"):
        coded(Variance()).check_rebase("rotate")
    with pytest.raises(UserError, match="needs states='fp32'"):
        coded(Momentum(0.9), "int8").check_rebase("rotate")


def test_a_linear_moment_turns_with_the_basis() -> None:
    rule, c = coded(Momentum(0.9)), normal(3, 4)
    for axis, shape in ((0, (4, 7)), (1, (7, 4))):
        m = normal(*shape, seed=1)
        state = {"momentum": m.clone(), "age": torch.tensor(3)}
        wide = torch.empty(shape)
        wide[:] = m
        rule.rebase_(
            {**state, "momentum": wide},
            Rotation(torch.tensor(True), c.new_ones(4, 4), axis),
            shape,
            hyper(m, Chunks()),
        )
        torch.testing.assert_close(wide, (m.sum(axis, keepdim=True)).expand(shape))


@pytest.mark.parametrize("step", [0, 5, 1022, 1023, 2500])
def test_a_table_of_ages_holds_what_python_computes(step: int) -> None:
    """The table of a device, made here, against the numbers of the CPU."""
    w = torch.zeros(2, 2)
    hp = hyper(w, Chunks(), step)
    rows = table(Adam(), hp, torch.device("cpu"))
    assert rows.shape == (max(1024, 1 << (step + 1).bit_length()), 5)
    for age in {0, 1, step, step + 1}:
        held = torch.tensor(age, dtype=torch.int32)
        assert torch.equal(rows[age], numbers_of(Adam(), held, hp))
        with policy("cuda"):
            assert torch.equal(rows[age], numbers_of(Adam(), held, hp))
    assert table(Adam(), hp, torch.device("cpu")) is rows


def test_each_column_may_have_its_own_age() -> None:
    w = torch.zeros(2, 3, device="meta")
    hp = hyper(torch.zeros(2, 3), Chunks(), 9)
    ages = torch.tensor([1, 7, 1], dtype=torch.int32)
    columns = numbers_of(Adam(), ages, hp)
    assert columns.shape == (5, 3)
    for i, age in enumerate(ages):
        assert torch.equal(columns[:, i], numbers_of(Adam(), age, hp))
    assert numbers_of(Adam(), ages.to("meta"), hyper(w, Chunks())).shape == (5, 3)
    with policy("cuda"):
        assert torch.equal(numbers_of(Adam(), ages, hp), columns)
