"""Modifiers around rules of both kinds: sums, subspaces, refusals, bytes, resume, bad elements, compiling."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Dense, Direction, Projected
from lowmem.optim.contract import AnyRule, Rule, is_pointwise
from lowmem.optim.elementwise import coded
from lowmem.optim.engine import cutting
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.engine.kernels import body
from lowmem.optim.modifiers.masks import Cautious, Grams
from lowmem.optim.modifiers.modified import modified
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.modifiers.norms import Limit, TrustRatio
from lowmem.optim.modifiers.spikes import SpikeClip
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.coordinate import Columns
from lowmem.optim.projectors.dense import Orthonormal, power_iteration
from lowmem.optim.residuals.rest import Rest, Stateless
from lowmem.optim.rules.compact.adafactor import Adafactor
from lowmem.optim.rules.compact.microadam import MicroAdam
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.rules.normalised.muon import Muon
from lowmem.optim.strategy import Strategy
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import made
from lowmem.optim.writers import NEAREST
from lowmem.sources import Backprop

ALL: list[Modifier] = [SpikeClip(guard=2), Cautious(), Grams(), Limit(), TrustRatio()]
INSIDE: list[Modifier] = [SpikeClip(guard=2), Cautious("norm"), Limit()]
BASIS = Orthonormal(Frame(3, "std"), power_iteration, 4)


def subspace(rule: AnyRule, **options: Any) -> Subspace:
    return Subspace(BASIS, rule, **options)


RULES: dict[str, AnyRule] = {
    "adam": modified(coded(Adam()), ALL),
    "adam in 8 bits": modified(coded(Adam(), "int8"), [Cautious(), Limit()]),
    "adam in 4 bits": modified(coded(Adam(), "int4"), [SpikeClip(guard=2), TrustRatio()]),
    "sgd": modified(coded(SGD()), [Limit()]),
    "microadam": modified(MicroAdam(window=3), [Grams(), Limit()]),
    "inside a subspace": subspace(modified(coded(Adam(), "int8"), INSIDE)),
    "inside, rotating": subspace(modified(coded(Adam()), INSIDE), on_refresh="rotate"),
    "inside, columns reset": Subspace(
        Columns(0.3, 4), modified(coded(Adam(), "bf16"), INSIDE), Stateless(), on_refresh="reset"
    ),
    "around a subspace": modified(subspace(coded(Adam()), scale=0.25), [Cautious(), Limit(), TrustRatio()]),
    "adafactor": modified(Adafactor.of("fp32"), [Grams(), Limit()]),
    "adafactor with momentum": modified(Adafactor.of("int8", beta1=0.9), [Cautious(), Limit()]),
    "adafactor inside": subspace(modified(Adafactor.of("fp32", floor=1e-8), [Cautious(), Limit()])),
    "momentum inside": subspace(modified(Adafactor.of("fp32", beta1=0.9, floor=1e-8), [Cautious()])),
    "muon": modified(Muon.of("int8"), [Cautious(), TrustRatio()]),
}
SHAPES = {"a": (9, 14), "b": (14, 9), "c": (5, 7)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def optimizer_of(rule: AnyRule, dtype: torch.dtype = torch.float32, compile: str = "off") -> Any:
    starts = {name: 0.1 * normal(*shape, seed=i) for i, (name, shape) in enumerate(SHAPES.items())}
    weights = [(name, nn.Parameter(start.to(dtype))) for name, start in starts.items()]
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    group = {"params": weights, "role": "matrix"}
    return LowMemOptimizer([group], strategy, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, compile=compile)


def step(optimizer: Any, t: int, bad: float = 0.0, scale: float = 1.0) -> None:
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = (scale * normal(*p.shape, seed=100 * t + i)).to(p.dtype)
        if bad:
            p.grad.view(-1)[3] = bad
    optimizer.step()


def tensors(optimizer: Any) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [*(p.detach() for p in params), *(v for p in params for v in optimizer.state[p].values())]


def hyper(w: Tensor, chunks: Chunks, step: int, weight_decay: float = 0.0) -> Hyper:
    return Hyper(step, "w", 0, 1.0, (0.9, 0.99), 1e-8, weight_decay, Dense(w), chunks.advance_)


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], **tolerance: float) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0.0, "atol": 0.0}))


each_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@each_rule
@both
def test_planned_bytes_are_held_bytes_and_keys_stay(rule: AnyRule, dtype: torch.dtype) -> None:
    optimizer = optimizer_of(rule, dtype)
    for t in range(6):
        step(optimizer, t)
        for p in optimizer.param_groups[0]["params"]:
            planned = optimizer.strategy.init("matrix", torch.empty_like(p, device="meta"))
            held = optimizer.state[p]
            assert {k: (v.shape, v.dtype) for k, v in planned.items()} == {
                k: (v.shape, v.dtype) for k, v in held.items()
            }


@each_rule
@both
@pytest.mark.parametrize("at", [1, 4])
def test_a_run_resumes_exactly(rule: AnyRule, dtype: torch.dtype, at: int) -> None:
    whole, first = optimizer_of(rule, dtype), optimizer_of(rule, dtype)
    for t in range(7):
        step(whole, t)
        if t < at:
            step(first, t)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = optimizer_of(rule, dtype)
    with torch.no_grad():
        for p, q in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
            p.copy_(q)
    second.load_state_dict(torch.load(file, weights_only=True))
    for t in range(at, 7):
        step(second, t)
    close(tensors(second), tensors(whole))


@each_rule
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_element_keeps_its_weight_and_spoils_nothing(rule: AnyRule, bad: float) -> None:
    optimizer = optimizer_of(rule)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    step(optimizer, 0)
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    norms = [float(optimizer.state[p].get("modified.limit.norm", 0.0)) for p in params]
    step(optimizer, 1, bad)
    for p, old, norm in zip(params, before, norms, strict=True):
        assert p.detach().view(-1)[3] == old.view(-1)[3]
        if torch.equal(p.detach(), old):  # refused as a whole
            assert float(optimizer.state[p].get("modified.limit.norm", 0.0)) == norm
    assert optimizer.nonfinite() >= len(params)
    for t in range(2, 6):
        step(optimizer, t)
    assert all(x.isfinite().all() for x in tensors(optimizer) if x.is_floating_point())


@each_rule
def test_nothing_but_nan_moves_neither_weights_nor_what_modifiers_hold(rule: AnyRule) -> None:
    optimizer = optimizer_of(rule)
    step(optimizer, 0)
    params = optimizer.param_groups[0]["params"]
    before = [p.detach().clone() for p in params]
    norms = {key: float(v) for key, v in optimizer.state[params[0]].items() if key.endswith("norm")}
    for p in params:
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    close([p.detach() for p in params], before)
    assert norms == {key: float(v) for key, v in optimizer.state[params[0]].items() if key in norms}
    assert optimizer.nonfinite() == sum(p.numel() for p in params)


@each_rule
def test_zero_huge_and_tiny_gradients_are_ordinary_ones(rule: AnyRule) -> None:
    optimizer = optimizer_of(rule)
    for t, scale in enumerate((0.0, 1e-30, 1e16, 0.0, 1.0, 0.0)):
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            p.grad = scale * normal(*p.shape, seed=10 * t + i)
        optimizer.step()
    assert all(x.isfinite().all() for x in tensors(optimizer) if x.is_floating_point())
    assert optimizer.nonfinite() == 0


@pytest.mark.parametrize("name", ["adam", "microadam", "inside a subspace", "adafactor with momentum"])
def test_the_cutting_does_not_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over many chunks, the last one padded, are those over one."""
    shapes = {"a": (70, 300)}
    monkeypatch.setitem(globals(), "SHAPES", shapes)
    one, many = optimizer_of(RULES[name]), optimizer_of(RULES[name])
    for t in range(5):
        step(one, t)
    monkeypatch.setattr(Chunks, "spans", lambda self, rule, count, *_, **__: tuple(cutting.spans(count)))
    for t in range(5):
        step(many, t)
    close(tensors(many), tensors(one), rtol=1e-6, atol=1e-9)


def test_the_padding_of_a_block_is_not_measured() -> None:
    """MicroAdam owes something to elements that are not there, and then takes a step of them."""
    rule, w = modified(MicroAdam(window=2, density=0.15), [Limit()]), torch.zeros(5000)
    assert is_pointwise(rule)
    chunks, state, inside = Chunks(), rule.init(w), rule.init(w)
    for t in range(6):
        hp, before, g = hyper(w, chunks, t), w.clone(), 0.1**t * normal(5000, seed=t)
        chunks.apply_(rule, NEAREST, w, Dense(g), state, {}, hp)
        torch.testing.assert_close((w - before).norm(), state["modified.limit.norm"], rtol=1e-5, atol=0)
        chunks.advance_(rule, g, inside, hp)
        torch.testing.assert_close(g.norm(), inside["modified.limit.norm"], rtol=1e-5, atol=0)


def test_a_bad_element_is_not_measured() -> None:
    """Its moments would make a step, which is not taken."""
    chunks, w, rule = Chunks(), torch.zeros(3, 5), modified(coded(Adam()), [Limit()])
    state = rule.init(w)
    for t in range(3):
        before, g = w.clone(), normal(3, 5, seed=t)
        if t == 2:
            g[1, :3] = math.nan
        chunks.apply_(cast("Any", rule), NEAREST, w, Dense(g), state, {}, hyper(w, chunks, t))
        torch.testing.assert_close((w - before).norm(), state["modified.limit.norm"], rtol=1e-5, atol=0)


@dataclass(frozen=True)
class Plain(Rule):
    """The gradient as a step, refused as a whole or judged by nobody."""

    refused: bool = False

    def update(self, g: Blocks, s: dict[str, Tensor], hp: Hyper) -> Direction:
        return Direction(g, ok=torch.tensor(False) if self.refused else None)


def test_a_refused_step_has_no_length() -> None:
    chunks, w, rule = Chunks(), torch.ones(3, 5), modified(Plain(refused=True), [Limit()])
    state, hp = rule.init(w), hyper(w, chunks, 0)
    chunks.write_(NEAREST, w, cast("Rule", rule).update(Dense(normal(3, 5)), state, hp), {}, hp)
    assert torch.equal(w, torch.ones(3, 5))
    assert state["modified.limit.norm"] == 0.0


def test_a_bad_element_of_a_whole_step_is_refused_alone() -> None:
    """What a modifier would turn into zero stays bad, so that the frame sees it."""
    chunks, w, rule = Chunks(), torch.ones(3, 5), modified(Plain(), [Cautious("norm"), Limit()])
    state, g = rule.init(w), normal(3, 5)
    g[1, 2] = math.nan
    hp = hyper(w, chunks, 0, weight_decay=0.5)
    chunks.write_(NEAREST, w, cast("Rule", rule).update(Dense(g), state, hp), {}, hp)
    assert w[1, 2] == 1.0
    assert chunks.skipped.total() == 1
    torch.testing.assert_close(state["modified.limit.norm"], g.nan_to_num(0.0).norm())
    torch.testing.assert_close(w, torch.where(g.isnan(), 1.0, 0.5 - g))


@pytest.mark.parametrize("rule", [coded(Adam(), s) for s in ("fp32", "int8", "bf16")] + [MicroAdam(window=3)])
def test_looking_first_leaves_everything_as_it_was(rule: Any) -> None:
    """The step is that of the unmodified rule where the factor is 1: what is held moves once."""
    chunks, watched = Chunks(), cast("Any", modified(rule, [Limit(1e9)]))
    plain, seen = 0.1 * normal(3, 700), 0.1 * normal(3, 700)
    one, two = (r.init(plain) | made(r.constants((3, 700)), plain.device) for r in (rule, watched))
    for t in range(4):
        g = normal(3, 700, seed=t)
        kept = g.clone()
        for r, w, s in ((rule, plain, one), (watched, seen, two)):
            chunks.apply_(r, NEAREST, w, Dense(g), s, {}, hyper(w, chunks, t))
        assert torch.equal(g, kept)
    assert torch.equal(plain, seen)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_columns_with_ages_of_their_own_are_clipped_by_them() -> None:
    chunks, low = Chunks(), torch.full((4, 3), 1000.0)
    rule = cast("Any", modified(coded(Adam()), [SpikeClip(guard=20)]))
    state = {**rule.init(low), "stride": torch.tensor(1, dtype=torch.int32)}
    state["age"] = torch.tensor([0, 30, 30], dtype=torch.int32)
    state["exp_avg_sq"].fill_(1.0)
    chunks.advance_(rule, low, state, hyper(low, chunks, 31))
    moved = 0.99 + 0.01 * torch.tensor([1e6, 5000.0, 5000.0])
    torch.testing.assert_close(state["exp_avg_sq"], moved.expand(4, 3))


def test_a_kernel_that_looks_up_numbers_of_an_age_judges_by_the_same_age() -> None:
    """A card moves the age after the step; a spike in the first that is judged, or in the one before."""
    rule = cast("Any", modified(coded(Adam()), [SpikeClip(threshold=4.0, guard=2)]))
    kernel = None
    for spiked in (1, 2):
        chunks, plain, looked = Chunks(), torch.zeros(1, 64), torch.zeros(1, 64)
        one, two = rule.init(plain), rule.init(looked)
        kernel = kernel or body(rule, NEAREST, tuple(two), (), "elements", counts=True)
        for t in range(4):
            g, hp = normal(1, 64, seed=t), hyper(plain, chunks, t)
            g[0, 5] = 1e3 if t == spiked else 1.0
            chunks.apply_(rule, NEAREST, plain, Dense(g), one, {}, hp)
            true, none = torch.tensor(True), torch.empty(0, 2, dtype=torch.int32)
            counter, table = torch.zeros((), dtype=torch.int64), rule.table(two, hp)
            kernel(looked, g, hp.rates(), true, counter, table, None, None, None, none, *two.values())
            assert int(two["age"]) == t  # moved by the caller
            two["age"].add_(1)
            assert torch.equal(plain, looked), (spiked, t)


def test_a_limited_step_is_at_most_so_much_longer() -> None:
    """Also that of a subspace, seen from outside."""
    rule = modified(subspace(coded(SGD()), scale=0.25), [Cautious(), Limit()])
    optimizer = optimizer_of(rule)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    p, lengths = optimizer.param_groups[0]["params"][0], []
    for t in range(8):
        before = p.detach().clone()
        step(optimizer, t, scale=1.5**t)
        lengths.append(float((p.detach() - before).norm()) / 1e-2)
        assert float(optimizer.state[p]["modified.limit.norm"]) == pytest.approx(lengths[-1], rel=1e-4)
    growth = [b / a for a, b in itertools.pairwise(lengths)]
    assert max(growth) == pytest.approx(1.01, rel=1e-4)


def test_a_cautious_step_never_goes_against_the_gradient() -> None:
    for name in ("adam in 8 bits", "around a subspace", "adafactor with momentum", "muon"):
        optimizer = optimizer_of(RULES[name])
        optimizer.param_groups[0]["weight_decay"] = 0.0
        for t in range(5):
            before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
            step(optimizer, t)
            for p, old in zip(optimizer.param_groups[0]["params"], before, strict=True):
                assert ((p.detach() - old) * p.grad <= 0).all(), name


@pytest.mark.parametrize("size", [1e-30, 1e-40, 1e-45])
@pytest.mark.parametrize("modifiers", [[TrustRatio()], [Cautious(), TrustRatio()]])
def test_a_step_without_length_to_speak_of_is_lengthened_by_a_finite_factor(
    modifiers: list[Modifier], size: float
) -> None:
    chunks, w, g = Chunks(), torch.ones(4, 6), torch.full((4, 6), size)
    rule = cast("Any", modified(coded(SGD()), modifiers))
    chunks.apply_(rule, NEAREST, w, Dense(g), rule.init(w), {}, hyper(w, chunks, 0))
    assert (w.abs() <= 1.0).all()


def test_rows_without_gradient_do_not_lengthen_the_others() -> None:
    """An embedding of which a batch touches two rows: the mean is over those."""
    chunks, w = Chunks(), torch.zeros(1000, 4)
    g = torch.zeros(1000, 4)
    g[:2] = normal(2, 4)
    rule = modified(coded(SGD()), [Cautious()])
    chunks.apply_(cast("Any", rule), NEAREST, w, Dense(g), rule.init(w), {}, hyper(w, chunks, 0))
    assert torch.equal(w, -g)


REFUSED: list[tuple[Any, list[Modifier], str]] = [
    (coded(SGD()), [SpikeClip()], "spike_clip reads exp_avg_sq.*take rule=adam, or leave it out"),
    (MicroAdam(), [SpikeClip()], "spike_clip reads exp_avg_sq"),
    (Adafactor.of("fp32"), [SpikeClip(), Limit()], "spike_clip reads exp_avg_sq"),
    (coded(Adam()), [Limit(), Cautious(), Limit(1.1)], "limit is given twice; once is enough"),
    (Rest(), [Grams()], "takes no step"),
]


@pytest.mark.parametrize(("rule", "modifiers", "says"), REFUSED)
def test_what_cannot_be_is_refused_when_it_is_written(
    rule: Any, modifiers: list[Modifier], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        modified(rule, modifiers)


def test_the_weight_cannot_be_read_inside_a_subspace() -> None:
    with pytest.raises(UserError, match="reads the weight"):
        subspace(modified(coded(Adam()), [TrustRatio()]))
    with pytest.raises(UserError, match="reads the weight"):
        subspace(modified(Adafactor.of("fp32"), [TrustRatio()]))


def test_numbers_outside_their_range_are_refused() -> None:
    with pytest.raises(UserError, match=r"growth must be at least 1, got 0\.9"):
        Limit(0.9)
    with pytest.raises(UserError, match="unknown rescale 'median'"):
        Cautious("median")
    for threshold, guard in ((0.0, 20), (1.0, 0)):
        with pytest.raises(UserError, match="threshold must be above 0 and guard at least 1"):
            SpikeClip(threshold, guard)


def test_equal_ones_are_one_object_and_none_is_the_rule_itself() -> None:
    assert modified(coded(Adam()), [Limit()]) is modified(coded(Adam()), (Limit(),))
    assert modified(coded(Adam()), []) is coded(Adam())
    one_by_one = modified(modified(coded(Adam()), [Cautious()]), [Limit()])
    assert one_by_one is modified(coded(Adam()), [Cautious(), Limit()])
    assert modified(modified(Muon(), [Cautious()]), [Limit()]) == modified(Muon(), [Cautious(), Limit()])


def test_a_sum_of_projected_gradients_serves_where_nobody_looks_at_the_gradient() -> None:
    inner = subspace(coded(Adam()))
    assert inner.keeps_sum
    assert modified(inner, [Limit()]).keeps_sum
    assert not modified(inner, [Limit(), Cautious()]).keeps_sum


def test_a_step_of_a_projected_gradient_is_that_of_the_whole() -> None:
    rule, found = modified(subspace(coded(Adam())), [Limit()]), []
    assert not is_pointwise(rule)
    for projects in (False, True):
        chunks, w = Chunks(), 0.1 * normal(9, 14)
        state = rule.init(w)
        for t in range(4):
            hp = Hyper(t, "w", 0, 0.1, (0.9, 0.99), 1e-8, 0.01, Dense(w), chunks.advance_)
            g: Blocks = Dense(1.5**t * normal(9, 14, seed=t))
            rule.prepare(g, state, hp)
            if projects:
                g = Projected((9, 14), cast("Rule", rule).project(g, state, hp), torch.float32)
            chunks.write_(NEAREST, w, cast("Rule", rule).update(g, state, hp), {}, hp)
        found.append(w)
    assert torch.equal(*found)


def test_each_matrix_of_a_stack_has_sums_of_its_own() -> None:
    rule = modified(coded(Adam(), "int8"), [Cautious(), Limit()])
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    whole = nn.Parameter(0.1 * normal(3, 8, 12))
    single = [nn.Parameter(x.clone()) for x in whole.detach()]
    stack = LowMemOptimizer([{"params": [("w", whole)], "role": "matrix"}], strategy, lr=1e-2)
    apart = LowMemOptimizer([{"params": list(zip("abc", single, strict=True))}], strategy, lr=1e-2)
    for t in range(5):
        whole.grad = normal(3, 8, 12, seed=t) * 1.5**t
        for p, g in zip(single, whole.grad, strict=True):
            p.grad = g.clone()
        stack.step()
        apart.step()
    assert stack.state[whole]["modified.sums"].shape == (3, 3)
    assert torch.equal(whole.detach(), torch.stack([p.detach() for p in single]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("name", ["adam", "adam in 8 bits", "inside a subspace", "adafactor with momentum"])
def test_compiled_kernels_do_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "SHAPES", {"a": (70, 300), "b": (40, 300)})
    eager, live = optimizer_of(RULES[name]), optimizer_of(RULES[name], compile="on")
    for t in range(4):
        step(eager, t, math.nan if t == 2 else 0.0)
        step(live, t, math.nan if t == 2 else 0.0)
    weights = [[p.detach() for p in o.param_groups[0]["params"]] for o in (live, eager)]
    close(*weights, rtol=0, atol=2e-6 if name == "adam" else 1e-4)
    assert live.nonfinite() == eager.nonfinite()
