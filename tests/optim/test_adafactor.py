"""Adafactor against transformers' where that is defined, and the promises that transformers does not make."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.blocks import Dense, Direction
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.dense import Orthonormal, power_iteration
from lowmem.optim.rules.compact.adafactor import Adafactor
from lowmem.optim.shards import Shard, matrix
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.changes import Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import made
from tests.oracles.factored.reference_adafactor import Adafactor as Reference

STATES = ["fp32", "bf16", "int8", "int4", "companded8"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(start: Tensor, strategy: Any = None, **options: Any) -> tuple[Any, nn.Parameter]:
    numbers = {key: options.pop(key) for key in ("lr", "weight_decay", "compile") if key in options}
    p = nn.Parameter(start.clone())
    strategy = strategy or lowmem.create("adafactor", **options)
    return lowmem.LowMemOptimizer([("w", p)], strategy, **{"lr": 1e-2, **numbers}), p


def drive(start: Tensor, grads: list[Tensor], **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    optimizer, p = optimizer_of(start, **options)
    weights = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        weights.append(p.detach().clone())
    return weights, optimizer.state[p]


def official(start: Tensor, grads: list[Tensor], **options: Any) -> list[Tensor]:
    from transformers.optimization import Adafactor as Official

    p = nn.Parameter(start.clone())
    fixed = {"lr": 1e-2, "relative_step": False, "scale_parameter": False, **options}
    optimizer = Official([p], **fixed)
    weights = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        weights.append(p.detach().clone())
    return weights


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(230, 5003), (3, 1 << 19)])
def test_blocks_of_rows_give_what_the_whole_gives(shape: tuple[int, int], beta1: float) -> None:
    """In double precision: over a million elements transformers itself is off by 2e-4 of a step."""
    start, grads = normal(*shape), [normal(*shape, seed=t) for t in range(1, 4)]
    for g in grads:
        g[0] *= 100.0  # so that the step is clipped
    ours, _ = drive(start, grads, beta1=beta1, scale_parameter=True)
    truth = Reference(start.double(), lr=1e-2, relative_step=False, beta1=beta1 or None)
    for g, w in zip(grads, ours, strict=True):
        before = truth.w
        step = (truth.step(g.double()) - before).abs().max()
        assert (w - truth.w).abs().max() <= 2e-4 * step


def test_a_kernel_is_the_matrix_of_its_first_dimension_by_the_rest() -> None:
    start, grads = normal(8, 3, 2, 2), [normal(8, 3, 2, 2, seed=t) for t in range(4)]
    ours, state = drive(start, grads)
    theirs = official(start.flatten(1), [g.flatten(1) for g in grads])
    torch.testing.assert_close(ours[-1].flatten(1), theirs[-1], rtol=1e-5, atol=1e-6)
    assert tuple(state["square.row"].shape) == (8,)
    assert tuple(state["square.col"].shape) == (12,)


def test_bf16_weights_see_fp32_arithmetic() -> None:
    start, grads = normal(40, 50).bfloat16(), [normal(40, 50, seed=t).bfloat16() for t in range(5)]
    ours, _ = drive(start, grads, writer="nearest")
    theirs = official(start, grads)
    off = (ours[-1] != theirs[-1]).float().mean()
    assert float(off) < 5e-3  # where the last bit of fp32 decides how a tie in bf16 falls
    torch.testing.assert_close(ours[-1], theirs[-1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("beta1", [0.0, 0.8])
def test_inside_a_subspace_it_is_adafactor_of_the_projection(beta1: float) -> None:
    inner = Adafactor.of("fp32", beta1=beta1)
    rule = Subspace(Orthonormal(Frame(4, "std"), power_iteration, 1000), inner, scale=0.5)
    strategy = dataclasses.replace(lowmem.create("galore"), rules={"matrix": rule, "other": rule})
    start, grads = normal(12, 20), [normal(12, 20, seed=t) for t in range(5)]
    optimizer, p = optimizer_of(start, strategy)
    weights = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        weights.append(p.detach().clone())
    basis = optimizer.state[p]["projector.basis"]
    assert tuple(basis.shape) == (12, 4)
    lows = official(torch.zeros(4, 20), [basis.t() @ g for g in grads], beta1=beta1 or None)
    for w, low in zip(weights, lows, strict=True):
        torch.testing.assert_close(w, start + 0.5 * basis @ low, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("states", STATES)
@pytest.mark.parametrize("shape", [(37, 41), (300,)])
def test_a_codec_holds_what_is_not_factored(states: str, shape: tuple[int, ...]) -> None:
    start, grads = torch.zeros(shape), [normal(*shape, seed=t) for t in range(10)]
    exact, whole = drive(start, grads, beta1=0.9)
    ours, state = drive(start, grads, beta1=0.9, states=states)
    torch.testing.assert_close(ours[0], exact[0])  # the step is taken before anything is encoded
    allowed = {"fp32": 0.0, "bf16": 0.01, "companded8": 0.02, "int8": 0.03, "int4": 0.3}[states]
    assert (ours[-1] - exact[-1]).norm() <= allowed * exact[-1].norm()
    held = sum(t.nbytes for t in state.values())
    assert states == "fp32" or held < 0.65 * sum(t.nbytes for t in whole.values())


def test_bytes_are_the_closed_form() -> None:
    def count(shape: tuple[int, ...], **options: Any) -> int:
        return lowmem.state_bytes(lowmem.create("adafactor", **options), shape)

    assert count((4096, 11008)) == 4 * (4096 + 11008) + 4
    assert count((61, 67), beta1=0.9) == 4 * (61 + 67) + 4 * 61 * 67 + 4
    assert count((61, 67), beta1=0.9, states="companded8") == 4 * 128 + 61 * 67 + 2 * -(-61 * 67 // 32) + 4
    assert count((5,)) == 4 * 5 + 4
    assert count((300,), states="int8") == 300 + 4 * 2 + 4


@pytest.mark.parametrize("factor", [1e-10, 1e18])
def test_sums_of_squares_beyond_fp32_are_no_trouble(factor: float) -> None:
    """A row of 5000 squares of 1e18 has the sum 5e39; its mean is an fp32 number."""
    g = normal(300, 5000)
    ordinary, _ = drive(torch.zeros(300, 5000), [g])
    scaled, _ = drive(torch.zeros(300, 5000), [factor * g])
    torch.testing.assert_close(scaled[0], ordinary[0], rtol=1e-5, atol=1e-8)


def test_a_row_without_gradient_stays() -> None:
    g = normal(6, 9) * 1e18
    g[2], g[:, 3] = 0.0, 0.0
    weights, state = drive(torch.ones(6, 9), [g, g], eps1=0.0)
    assert (weights[-1][2] == 1.0).all()
    assert (weights[-1][:, 3] == 1.0).all()
    assert (weights[-1][3] != 1.0).sum() == 8
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
@pytest.mark.parametrize("shape", [(6, 9), (11,)])
def test_a_gradient_that_cannot_be_squared_changes_nothing(shape: tuple[int, ...], bad: float) -> None:
    optimizer, p = optimizer_of(normal(*shape), beta1=0.5, scale_parameter=True, weight_decay=0.1)
    for bad_now in (True, False, True):  # also before the first ordinary step
        before = p.detach().clone()
        held = {key: value.clone() for key, value in optimizer.state[p].items()}
        p.grad = normal(*shape)
        p.grad.view(-1)[5] = bad if bad_now else 1.0
        optimizer.step()
        assert torch.equal(p, before) == bad_now
        same = all(torch.equal(optimizer.state[p][key], value) for key, value in held.items())
        assert same == bad_now or not held
    assert int(optimizer.state[p]["age"]) == 1
    assert optimizer.nonfinite() == 2 * p.numel()


@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_padding_is_not_counted(states: str) -> None:
    """Codecs step whole blocks of 256 elements; 54 of them are the weight's."""
    optimizer, p = optimizer_of(normal(6, 9), beta1=0.5, states=states)
    p.grad = torch.full((6, 9), torch.nan)
    optimizer.step()
    assert optimizer.nonfinite() == 54


def test_a_subspace_hears_when_its_inner_rule_refuses() -> None:
    optimizer, p = optimizer_of(normal(12, 20), lowmem.create("galore", rank=4, rule="adafactor"))
    p.grad = normal(12, 20)
    optimizer.step()
    before = p.detach().clone()
    p.grad = 1e25 * normal(12, 20)  # finite, and so is its projection; its square is not
    optimizer.step()
    assert torch.equal(p, before)
    assert optimizer.nonfinite() == p.numel()


def test_a_direction_the_gradient_does_not_have_is_not_made_up() -> None:
    """Of a gradient of rank one, rank 4 holds three directions of rounding noise."""
    g = torch.outer(normal(12), normal(20, seed=1))
    optimizer, p = optimizer_of(torch.zeros(12, 20), lowmem.create("galore", rank=4, rule="adafactor"))
    p.grad = g
    optimizer.step()
    left = g[:, :1] / g[:, :1].norm()
    along = left @ (left.t() @ p.detach())
    assert float(along.norm()) > 1e-2 * 0.25  # lr scale, at least
    assert (p.detach() - along).norm() <= 0.01 * along.norm()


def test_the_step_is_no_larger_than_the_threshold() -> None:
    for shape in ((8, 8), (64,)):
        steady = [normal(*shape, seed=t) for t in range(3)]
        shock = torch.zeros(shape)
        shock.view(-1)[:2] = 1e3
        weights, _ = drive(torch.zeros(shape), [*steady, shock], clip_threshold=0.2)
        step = weights[-1] - weights[-2]
        assert 0.19e-2 < float(step.square().mean().sqrt()) <= 0.2e-2 * (1 + 1e-5)


def test_lr_is_the_largest_relative_step() -> None:
    g = torch.ones(7)
    weights, _ = drive(torch.zeros(7), [g] * 9, relative_step=True, lr=0.4)
    steps = torch.stack([torch.zeros(7), *weights]).diff(dim=0)[:, 0].neg()
    expected = [min(0.4, t**-0.5) for t in range(1, 10)]
    torch.testing.assert_close(steps, torch.tensor(expected), rtol=1e-5, atol=0.0)


def test_warmup_is_linear_and_reaches_lr() -> None:
    weights, _ = drive(torch.zeros(7), [torch.ones(7)] * 6, relative_step=True, warmup=4, lr=0.1)
    steps = torch.stack([torch.zeros(7), *weights]).diff(dim=0)[:, 0].neg()
    torch.testing.assert_close(steps, torch.tensor([0.025, 0.05, 0.075, 0.1, 0.1, 0.1]), rtol=1e-5, atol=0.0)


class Shards:
    """Where the threads that hold the shards of one tensor meet to reduce."""

    def __init__(self, count: int) -> None:
        self.barrier = threading.Barrier(count, timeout=30)
        self.slots: list[Tensor | None] = [None] * count

    def total(self, rank: int, x: Tensor, op: str) -> Tensor:
        self.slots[rank] = x
        self.barrier.wait()
        stacked = torch.stack([slot for slot in self.slots if slot is not None])
        self.barrier.wait()
        return stacked.sum(0) if op == "sum" else stacked.amax(0)


@dataclasses.dataclass(frozen=True)
class Threads(Shard):
    """Rows whose other ranks are threads; `group` is where they meet."""

    def total(self, x: Tensor, op: str = "sum") -> Tensor:
        return self.group.total(self.rank, x, op)


def hyper(w: Tensor, shard: Shard | None = None) -> Hyper:
    weight, advance = Dense(w, shape=matrix(shard) if shard else None), Chunks().advance_
    return Hyper(0, "w", 0, 0.1, (0.9, 0.999), 1e-8, 0.0, weight, advance, shard=shard)


@pytest.mark.parametrize("shape", [(11, 9), (11, 3, 2)])
def test_shards_of_unequal_size_take_the_step_of_the_whole(shape: tuple[int, ...]) -> None:
    rule = Adafactor.of("fp32", scale_parameter=True, clip_threshold=0.5)
    w, g = normal(*shape), normal(*shape, seed=1)
    g[0] *= 30.0
    whole = rule.update(Dense(g), rule.init(w), hyper(w))
    shards, found = Shards(2), [None, None]

    def work(rank: int) -> None:
        shard = matrix(Threads(shape, 8, 2, rank, shards)).shard
        gradient = Dense(shard.own(g), shape=matrix(shard))
        found[rank] = rule.update(gradient, rule.init(shard.own(w)), hyper(shard.own(w), shard))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    directions: list[Direction] = [d for d in found if d is not None]
    steps = [d.lr * d.blocks.rows(0, d.blocks.shape[0]) for d in directions]
    expected = whole.lr * whole.blocks.rows(0, whole.blocks.shape[0])
    got = torch.cat([s.view(-1) for s in steps])
    torch.testing.assert_close(got, expected.view(-1), rtol=1e-5, atol=1e-7)


def test_a_vector_is_stepped_as_a_whole_on_every_rank() -> None:
    strategy = lowmem.create("adafactor", scale_parameter=True)
    for shape, way in (((50,), "whole"), ((50, 3), "rows")):
        rule_name = strategy.rule_name("other", shape, Shard.of(shape, 2, 0))
        assert strategy.way(rule_name, "other", Shard.of(shape, 2, 0)) == way


def test_a_reset_forgets_and_a_failed_refresh_does_not() -> None:
    rule = Adafactor.of("int8", beta1=0.9)
    w = normal(6, 9)
    state = rule.init(w) | made(rule.constants(tuple(w.shape)), w.device)
    rule.update(Dense(normal(6, 9)), state, hyper(w))
    held = {key: value.clone() for key, value in state.items()}
    own = {key: state[key] for key in rule.init(w)}
    rule.rebase_(own, Unrelated(torch.tensor(False)), (6, 9), hyper(w))
    assert all(torch.equal(state[key], value) for key, value in held.items())
    rule.rebase_(own, Unrelated(torch.tensor(True)), (6, 9), hyper(w))
    assert all(torch.equal(own[key], value) for key, value in rule.init(w).items())


def test_means_do_not_turn_with_the_basis() -> None:
    with pytest.raises(UserError, match="reset"):
        lowmem.create("galore", rule="adafactor", on_refresh="rotate")
    lowmem.create("galore", rule="adafactor", on_refresh="reset")


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"warmup": 10}, "relative_step"),
        ({"eps2": 1e-2}, "scale_parameter"),
        ({"beta1": 1.0}, "beta1"),
        ({"decay_rate": 0.8}, "decay_rate"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
        ({"eps1": float("nan")}, "eps1"),
    ],
)
def test_numbers_that_are_wrong_or_unread_are_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        lowmem.create("adafactor", **options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("options", [{}, {"beta1": 0.9, "states": "int8"}])
def test_compiled_is_eager_up_to_rounding(options: dict[str, Any]) -> None:
    start, grads = normal(70, 300), [normal(70, 300, seed=t) for t in range(3)]
    eager, _ = drive(start, grads, compile="off", **options)
    compiled, _ = drive(start, grads, compile="on", **options)
    allowed = 1e-6 if not options else 1e-4  # a code may fall the other way by the last bit
    torch.testing.assert_close(compiled[-1], eager[-1], rtol=1e-5, atol=allowed)
