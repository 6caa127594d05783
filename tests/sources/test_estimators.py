"""What is made of the values of the loss: the right number along each direction, and the right mean."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem
from lowmem.errors import UserError
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.sources import SPSA, Curved, Free, LowRank, OneSided, Scales, Sparse, TwoSided
from lowmem.sources.estimators import Estimator, curvature
from tests.sources.tiny import Vector, direction, drawn, estimate, evaluated

STRUCTURES = [Free(), LowRank(rank=2, gap=3)]


def quadratic(size: int) -> tuple[Tensor, Tensor]:
    root = drawn(size, size, seed=1) / size**0.5
    return root @ root.T, drawn(size, seed=2)


@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_linear_slope_is_exact_and_quadratic_bias_is_half_eps_curvature(eps: float) -> None:
    """Invariant 1: two-sided has no bias on a quadratic, one-sided exactly eps z'Hz / 2."""
    model, (h, b) = Vector(24), quadratic(24)

    def loss() -> Tensor:
        w = model()
        return 0.5 * w @ h @ w + b @ w

    w = model.weight.detach()
    for estimator in (TwoSided(), OneSided()):
        source = SPSA(eps=eps, estimator=estimator)
        z = direction(source, model)
        (slope,) = evaluated(source, model, loss)[1]
        bias = 0.5 * eps * float(z @ h @ z) if isinstance(estimator, OneSided) else 0.0
        assert slope.c == pytest.approx(float(z @ (h @ w + b)) + bias, rel=1e-6)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: type(s).__name__)
def test_expectation_is_the_gradient(structure: Any, noise: str) -> None:
    """Invariant 2: the mean of c z over draws is g within its standard error, for a matrix too."""
    model, g, draws = Vector(6, 5), drawn(6, 5, seed=3), 600
    source = SPSA(noise=noise, structure=structure)
    sample = torch.stack([estimate(source, model, lambda: (model() * g).sum(), t) for t in range(draws)])
    error = (sample.mean(0) - g) / (sample.std(0) / draws**0.5 + 1e-12)
    # directions that share V for some steps are correlated, and err by more than independent ones
    assert float(error.square().mean()) < (1.6 if isinstance(structure, Free) else 1.6 * 3)


@pytest.mark.parametrize(("noise", "extra"), [("gaussian", 2), ("rademacher", 0)])
def test_energy_is_d_plus_two_or_d_times_the_gradients(noise: str, extra: int) -> None:
    """Invariant 3."""
    model, g, d = Vector(40), drawn(40, seed=3), 40
    source = SPSA(noise=noise)
    draws = [estimate(source, model, lambda: model() @ g, t) for t in range(500)]
    energy = float(torch.stack(draws).square().sum(1).mean() / g.square().sum())
    assert energy == pytest.approx(d + extra, rel=0.12)


def test_spread_estimate_ignores_scale_and_offset_of_the_loss() -> None:
    """Invariant 5: FZOO takes the same step for L and 1000 L + 7; MeZO's grows with the loss."""
    model, g = Vector(16), drawn(16, seed=3)
    found = {}
    for name, source in (
        ("fzoo", SPSA(noise="rademacher", queries=8, estimator=OneSided(spread=True))),
        ("mezo", SPSA(queries=8)),
    ):
        a = estimate(source, model, lambda: (model() * g).tanh().sum())
        b = estimate(source, model, lambda: 1000 * (model() * g).tanh().sum() + 7)
        found[name] = float(b.norm() / a.norm())
    assert found["fzoo"] == pytest.approx(1.0, rel=1e-6)
    assert found["mezo"] == pytest.approx(1000.0, rel=1e-6)


def test_spread_estimate_is_the_papers() -> None:
    """Sum of (l_i - l_0) / (N std) z_i, and no step where all losses are the same."""
    model, g = Vector(16), drawn(16, seed=3)
    source = SPSA(eps=1e-2, queries=5, noise="rademacher", estimator=OneSided(spread=True))
    z = [direction(source, model, 0, k) for k in range(5)]
    w = model.weight.detach()
    at = torch.stack([((w + 1e-2 * one) * g).tanh().sum() for one in z])
    weights = (at - (w * g).tanh().sum()) / (5 * at.std())
    found = estimate(source, model, lambda: (model() * g).tanh().sum())
    torch.testing.assert_close(found, (weights.view(-1, 1) * torch.stack(z)).sum(0), rtol=1e-5, atol=1e-7)
    assert not estimate(source, model, lambda: 0.0 * model().sum() + 3.0).any()


def test_a_batch_in_parts_takes_a_step_of_the_same_length() -> None:
    """FZOO's slopes do not see that each loss was divided: eight parts stepped eight times as far."""
    g, found = drawn(4, seed=3), {}
    for parts in (1, 8):
        model = Vector(4)
        before = model.weight.detach().clone()
        optimizer = lowmem.optimizer(model, "fzoo", lr=1e-2, queries=64)
        for _ in range(parts):
            optimizer.backward(lambda model=model, parts=parts: (model() @ g) / parts, model)
        optimizer.step()
        found[parts] = float((before - model.weight.detach()) @ g / g.norm())
    assert found[8] == pytest.approx(found[1], rel=0.2)
    assert found[1] > 5e-3


def test_curvature_along_a_direction_is_exact_on_a_quadratic() -> None:
    """Invariant 6: k = z'Hz, and it shortens the step where it is large."""
    model, (h, b) = Vector(24), quadratic(24)
    h = 40 * h

    def loss(w: Tensor) -> Tensor:
        return 0.5 * w @ h @ w + b @ w

    w, source = model.weight.detach(), SPSA(eps=1e-2, estimator=Curved(power=0.5))
    z = direction(source, model)
    base, plus, minus = (float(loss(w + side * 1e-2 * z)) for side in (0, 1, -1))
    truth = float(z @ h @ z)
    assert curvature(base, plus, minus, 1e-2) == pytest.approx(truth, rel=1e-6)
    (slope,) = evaluated(source, model, lambda: loss(model()))[1]
    assert slope.c == pytest.approx(float(z @ (h @ w + b)) / truth**0.5, rel=1e-6)


def test_evaluations_are_counted_and_the_base_is_the_loss_that_is_told() -> None:
    model = Vector(8)
    for estimator, queries, wanted in ((TwoSided(), 3, 6), (OneSided(), 3, 4), (Curved(), 2, 5)):
        count: list[int] = []
        source = SPSA(eps=0.3, queries=queries, estimator=estimator)

        def loss(count: list[int] = count) -> Tensor:
            count.append(1)
            return model().square().sum()

        told, evidence = evaluated(source, model, loss)
        assert (len(count), len(evidence)) == (wanted, queries)
        if estimator.base:
            assert float(told) == pytest.approx(float(model.weight.detach().square().sum()))


def test_a_slope_ends_at_the_clip_and_keeps_its_sign() -> None:
    """Invariant 24: |c| <= C for every direction, before the mean is taken; NaN stays NaN."""
    model, g = Vector(16), 100 * drawn(16, seed=3)
    free, held = (evaluated(SPSA(queries=6, clip=c), model, lambda: model() @ g)[1] for c in (0.0, 20.0))
    assert any(abs(s.c) > 20 / 6 for s in free)
    for a, b in zip(free, held, strict=True):
        assert b.c == pytest.approx(max(-20 / 6, min(20 / 6, a.c)))
    (lost, *_) = evaluated(SPSA(clip=1.0), model, lambda: model().sum() * torch.nan)[1]
    assert lost.c != lost.c


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("estimator", [TwoSided(), OneSided(), OneSided(spread=True), Curved()], ids=str)
def test_a_loss_that_is_not_finite_makes_no_slope_wherever_it_is(estimator: Estimator, bad: float) -> None:
    """A clip would make its bound of an infinite one, a weight by curvature 1 of one that is no number."""
    model, source = Vector(16), SPSA(queries=2, clip=0.7, estimator=estimator)
    count = int(estimator.base) + 2 * len(estimator.sides)
    for place in range(count):
        losses = iter([bad if i == place else 1.0 + 0.01 * i for i in range(count)])
        found = evaluated(source, model, lambda losses=losses: torch.tensor(next(losses)))[1]
        assert all(math.isnan(slope.c) for slope in found)


def test_eps_changes_the_slope_by_its_square_and_lr_zero_changes_nothing() -> None:
    """Invariant 14."""
    model, g = Vector(16), drawn(16, seed=3)
    loss = lambda: (model() * g).tanh().sum()  # noqa: E731
    c = [evaluated(SPSA(eps=e), model, loss)[1][0].c for e in (1e-4, 1e-2, 2e-2)]
    assert (c[2] - c[0]) / (c[1] - c[0]) == pytest.approx(4.0, rel=0.05)
    still = Vector(1 << 12, dtype=torch.bfloat16)
    before = still.weight.detach().clone()
    optimizer = lowmem.optimizer(still, "mezo", lr=0.0, weight_decay=0.1)
    optimizer.step(lambda: still().float().square().sum())
    assert torch.equal(still.weight, before)


# ---- structured directions ----


@pytest.mark.parametrize("structure", [LowRank(2, 3), Sparse(0.3), Scales()], ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_structured_noise_is_the_same_in_probe_and_update_whatever_the_cutting(
    structure: Any, dtype: torch.dtype
) -> None:
    """Invariant 10: pieces, layout and order change nothing."""
    w = drawn(300, 517, seed=4).to(dtype)
    z = structure.direction("gaussian", _query(5), 1)
    whole = z.draw("w", w, 0, w.numel())
    for start, stop in [(0, 1), (5, 4097), (65_530, 70_000), (150_000, w.numel())]:
        assert torch.equal(z.draw("w", w, start, stop), whole[start:stop])
    moved = z.displaced("w", w, 0.25)
    assert torch.equal(z.displaced("w", w.t().contiguous().t(), 0.25), moved)
    if dtype == torch.float32:
        step = 0.25 * whole.view(w.shape)
        truth = w * step.exp() if isinstance(structure, Scales) else w + step
        torch.testing.assert_close(moved, truth, rtol=1e-5, atol=1e-6)


def _query(step: int) -> Any:
    from lowmem.optim.source import Query

    return Query(0, step)


def test_low_rank_directions_share_one_side_for_a_window() -> None:
    model, source = Vector(40, 30, dtype=torch.float32), SPSA(structure=LowRank(rank=2, gap=4))
    drawn_ = [direction(source, model, t) for t in range(6)]
    assert [int(torch.linalg.matrix_rank(z, rtol=1e-5)) for z in drawn_] == [2] * 6
    ranks = {
        pair: int(torch.linalg.matrix_rank(torch.cat([drawn_[i] for i in pair]), rtol=1e-5))
        for pair in ((0, 3), (3, 4), (4, 5))
    }
    assert ranks == {(0, 3): 2, (3, 4): 4, (4, 5): 2}
    assert float(torch.stack(drawn_).var()) == pytest.approx(1.0, abs=0.25)
    vector = direction(source, Vector(1000, dtype=torch.float32))
    assert vector.unique().numel() > 990  # vectors are free


def test_a_mask_is_that_of_the_weights_as_they_are_and_its_share_holds() -> None:
    """Masked weights keep every bit through probe and step; the bound is read off undisplaced weights."""
    model = Vector(200, 100, dtype=torch.bfloat16)
    before = model.weight.detach().clone()
    source = SPSA(structure=Sparse(0.3))
    free = direction(source, model) == 0
    free_sizes, masked_sizes = before[free].abs(), before[~free].abs()
    assert masked_sizes.max() < free_sizes.min()
    assert float((~free).float().mean()) == pytest.approx(0.3, abs=0.02)
    strategy = replace(lowmem.create("mezo"), source=source)
    optimizer = LowMemOptimizer(list(model.named_parameters()), strategy, lr=1.0, model=model)
    seen: list[Tensor] = []

    def loss() -> Tensor:
        seen.append(model())
        return seen[-1].float().square().mean()

    optimizer.step(loss)
    for w in (*seen, model.weight):
        assert torch.equal(w[free], before[free])
        assert float((w != before)[~free].float().mean()) > 0.02


def test_relative_displacement_keeps_the_sign_and_scales_with_the_number() -> None:
    """Exp of the step: the slope is the one of log w, and eta = 0 leaves every bit."""
    model, g = Vector(64), drawn(64, seed=3)
    source = SPSA(eps=1e-3, structure=Scales())
    z = direction(source, model)
    (slope,) = evaluated(source, model, lambda: model() @ g)[1]
    assert slope.c == pytest.approx(float(z @ (g * model.weight.detach())), rel=1e-4)
    far = source.structure.direction("gaussian", _query(0), 0)
    w = model.weight.detach()
    assert torch.equal(far.displaced("weight", w, 3.0).sign(), w.sign())
    assert torch.equal(far.displaced("weight", w, 0.0), w)


# ---- several points in one forward ----


class Little(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.norm, self.up, self.head = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 11, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.gelu(self.up(self.norm(self.embed(ids)))))


def little() -> Little:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Little()


@pytest.mark.parametrize("at_once", [2, 3, 16])
def test_points_at_once_are_the_points_one_by_one(at_once: int) -> None:
    model, ids = little(), torch.arange(20).view(4, 5) % 11
    loss = lambda: F.cross_entropy(model(ids).flatten(0, 1), ids.flatten().roll(1))  # noqa: E731
    owners = dict(model.named_parameters())
    for step in range(2):
        slopes = [
            [s.c for s in evaluated(SPSA(queries=5, estimator=OneSided(), at_once=n), model, loss, step)[1]]
            for n in (1, at_once)
        ]
        assert slopes[1] == pytest.approx(slopes[0], abs=2e-3)
        assert max(map(abs, slopes[0])) > 0.01
    assert dict(model.named_parameters()) == owners
    count: list[int] = []
    model.up.register_forward_hook(lambda *_: count.append(1))
    evaluated(SPSA(queries=8, estimator=OneSided(), at_once=8), model, loss, 2)
    assert len(count) == 2  # the base, and all displaced points


def test_points_at_once_restore_after_an_exception_and_refuse_what_they_cannot_run() -> None:
    model, ids = little(), torch.arange(20).view(4, 5) % 11
    loss = lambda: model(ids).square().mean()  # noqa: E731
    source = SPSA(queries=4, at_once=4)
    evaluated(source, model, loss)
    before, owners = [p.detach().clone() for p in model.parameters()], dict(model.named_parameters())

    def branching() -> Tensor:
        value = model(ids).square().mean()
        return value if value > 0 else -value

    with pytest.raises(UserError, match="vmap cannot run"):
        evaluated(source, model, branching)
    assert all(dict(model.named_parameters())[n] is p for n, p in owners.items())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    outside = lambda: model(ids).square().mean() + model.head.weight.sum()  # noqa: E731
    with pytest.raises(UserError, match="read outside"):
        evaluated(source, little_reading(model), outside)


def little_reading(model: nn.Module) -> nn.Module:
    """The same model, of which it is not yet known how it is read."""
    from lowmem.sources import probe

    probe._KNOWN.pop(model, None)
    return model


@pytest.mark.parametrize("method", ["mezo", "fzoo", "forward_gradient"])
@pytest.mark.parametrize("score", [3.0, (torch.ones(()),)], ids=str)
def test_a_score_that_is_no_tensor_is_refused_with_the_remedy(method: str, score: Any) -> None:
    """An objective need not be differentiable, so that it is easily a Python number."""
    with pytest.raises(UserError, match=rf"got {type(score).__name__}.*torch\.tensor"):
        lowmem.optimizer(Vector(4), method, lr=0.1).backward(lambda: score)


def test_nothing_to_train_is_refused_with_the_remedy() -> None:
    with pytest.raises(UserError, match="set requires_grad"):
        lowmem.optimizer(Vector(4).requires_grad_(False), "mezo")


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(UserError, match="8"):
        SPSA(estimator=OneSided(spread=True))
    for bad in ({"at_once": 0}, {"clip": -1.0}):
        with pytest.raises(UserError):
            SPSA(**bad)
    for make in (lambda: LowRank(rank=0), lambda: LowRank(gap=0), lambda: Sparse(0.0), lambda: Sparse(1.5)):
        with pytest.raises(UserError):
            make()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_points_at_once_run_a_language_model() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
    ids = torch.arange(12).view(2, 6)
    loss = lambda: model(input_ids=ids, labels=ids).loss  # noqa: E731
    one, many = (
        [s.c for s in evaluated(SPSA(queries=4, estimator=OneSided(), at_once=n), model, loss)[1]]
        for n in (1, 4)
    )
    assert many == pytest.approx(one, abs=5e-3)


# ---- the strategies made of them ----


@pytest.mark.parametrize(
    ("name", "options", "rank"),
    [
        ("lozo", {"rank": 1, "update_gap": 3}, 1),
        ("lozo", {"rank": 3, "update_gap": 3}, 3),
        ("fzoo", {"queries": 4, "eps_perturb": 1e-2}, 4),
    ],
)
def test_a_step_is_the_papers_along_the_directions_that_were_probed(
    name: str, options: dict[str, Any], rank: int
) -> None:
    """W - lr sum of weights times Z, the losses evaluated on copies."""
    model, g = Vector(12, 9), drawn(12, 9, seed=3)
    optimizer = lowmem.optimizer(model, name, lr=0.1, **options)
    source, w = optimizer.strategy.source, model.weight.detach().clone()

    def at(x: Tensor) -> Tensor:
        return (x * g).tanh().sum()

    queries, eps = source.queries, source.eps
    z = [direction(source, model, 0, k) for k in range(queries)]
    if name == "fzoo":
        losses = torch.stack([at(w + eps * one) for one in z])
        weights = (losses - at(w)) / (queries * losses.std())
    else:
        weights = torch.stack([(at(w + eps * one) - at(w - eps * one)) / (2 * eps) for one in z])
    optimizer.step(lambda: at(model()))
    wanted = w - 0.1 * sum(c * one for c, one in zip(weights, z, strict=True))
    torch.testing.assert_close(model.weight.detach(), wanted, rtol=1e-6, atol=1e-7)
    if name == "lozo":
        assert int(torch.linalg.matrix_rank(w - model.weight.detach(), rtol=1e-4)) == rank


def test_adam_over_the_estimates_is_torchs_adam() -> None:
    """An independent optimizer, given the same estimates as gradients."""
    model, other, g = Vector(20), Vector(20), drawn(20, seed=3)
    optimizer = lowmem.optimizer(model, "mezo", lr=1e-2, rule="adam", betas=(0.9, 0.99))
    torchs = torch.optim.Adam(other.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for step in range(4):
        loss = lambda: (model() * g).tanh().sum()  # noqa: E731
        other.weight.grad = estimate(optimizer.strategy.source, model, loss, step)
        torchs.step()
        optimizer.step(loss)
    torch.testing.assert_close(model.weight.detach(), other.weight.detach(), rtol=1e-4, atol=1e-5)
