"""What must be true of every method that sees a part of the gradient, whatever its paper says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.optim.blocks import Dense
from lowmem.optim.contract import AnyRule, Projector, Residual
from lowmem.optim.elementwise import coded
from lowmem.optim.projectors.bases import Frame
from lowmem.optim.projectors.dct import DCT, cosines
from lowmem.optim.projectors.dense import Orthonormal, power_iteration
from lowmem.optim.projectors.grassmann import Track, Walk, tangent
from lowmem.optim.projectors.online import Online
from lowmem.optim.projectors.random import Drawn, Gaussian
from lowmem.optim.residuals.rest import Drop, ScaledGradient, ScaledRest, Stateless
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sgd import SGD
from lowmem.optim.rules.elementwise.sign import Lion
from lowmem.optim.subspace import Subspace
from lowmem.optim.terms.changes import Rotation
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import made
from tests.oracles.low_rank.test_subspaces import LR, normal, optimizer_of, steps

ADAM, RANK, GAP = coded(Adam()), 3, 3
FULL_RANK = ("fira", "subtrack", "apollo", "apollo_mini", "grass_walk", "grass_jump", "subspace_momentum")
IN_WINDOW = ("galore", "golore", "q_galore", "dct", "lotus", "online_subspace")


def method(name: str, **options: Any) -> AnyRule:
    """A method's rule for matrices, small."""
    own = lowmem.available()[name].options
    small = {"rank": RANK, "update_proj_gap": GAP}
    told = {key: value for key, value in small.items() if key in own and own["rank"].default != 1}
    return lowmem.create(name, **{**told, **options}).rules["matrix"]


def run(rule: AnyRule, start: Tensor, gradients: list[Tensor], **hyper: Any) -> Tensor:
    optimizer, p = optimizer_of(rule, start, **hyper)
    for g in gradients:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


def hyper_of(shape: tuple[int, int], name: str = "w", step: int = 0) -> Hyper:
    optimizer, p = optimizer_of(ADAM, torch.zeros(shape))
    return replace(optimizer.hyper(p, first=step == 0), name=name, step=step)


def basis_of(projector: Projector, shape: tuple[int, int], name: str) -> Tensor:
    """The basis of a first step."""
    w, hp = torch.zeros(shape), hyper_of(shape, name)
    state = projector.init(w) | made(projector.constants(shape), w.device)
    projector.refresh(state, Dense(normal(*shape)), hp, {}, say=False)
    return projector.opened(state, hp)["basis"]


@pytest.mark.parametrize("name", sorted({*FULL_RANK, *IN_WINDOW, "ldadam"}))
def test_the_transposed_problem_has_the_transposed_solution(name: str) -> None:
    rule, start = method(name), normal(7, 12)
    gradients = steps((7, 12), 7)
    one = run(rule, start, gradients)
    other = run(rule, start.mT.contiguous(), [g.mT.contiguous() for g in gradients])
    torch.testing.assert_close(other.mT, one, rtol=0, atol=2e-4 if name == "q_galore" else 5e-6)


SCALES: dict[str, tuple[AnyRule, Residual, bool]] = {
    "adam": (ADAM, Drop(), True),
    "lion": (coded(Lion()), Drop(), True),
    "sign of the rest": (ADAM, Stateless(sign=True), True),
    "scaled rest": (ADAM, ScaledRest(), False),
    "rest": (ADAM, Stateless(sign=False), False),
}


@pytest.mark.parametrize("name", SCALES)
def test_the_size_of_gradients_matters_only_where_a_step_is_one(name: str) -> None:
    """A scaled rest is phi times the rest, which has no size: |N| / |R| has that of its inverse."""
    inner, residual, steady = SCALES[name]
    rule = Subspace(Orthonormal(Frame(RANK), update_proj_gap=GAP), inner, residual)
    start, gradients = normal(6, 12), steps((6, 12), 5)
    one, other = (run(rule, start, [g * c for g in gradients], eps=1e-16) for c in (1.0, 2.0**8))
    same = torch.allclose(one, other, rtol=0, atol=2e-5)
    assert same == (steady or name == "scaled rest")


@pytest.mark.parametrize("name", sorted({*FULL_RANK, *IN_WINDOW} - {"online_subspace"}))
def test_the_rank_of_what_was_moved(name: str) -> None:
    """What drops the rest moves within r directions in a window; what keeps it moves in all."""
    rule = method(name, **{} if name == "apollo_mini" else {"update_proj_gap": 1000})
    moved = run(rule, torch.zeros(8, 12), steps((8, 12), 4))
    spectrum = torch.linalg.svdvals(moved.double())
    rank = int((spectrum > 1e-3 * spectrum[0]).sum())
    assert rank == (8 if name in FULL_RANK else RANK)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_with_the_identity_for_a_basis_it_is_adamw(shape: tuple[int, int]) -> None:
    """And the gradient scaled by Adam's statistics of all of it is as long as Adam's step."""

    def identity(frame: Frame, basis: Tensor, g: object, hp: Hyper) -> tuple[Tensor, Tensor]:
        return torch.eye(*basis.shape), torch.ones((), dtype=torch.bool)

    whole = Orthonormal(Frame(6), identity)  # type: ignore[arg-type]
    start, gradients = normal(*shape), steps(shape, 4)
    adamw = run(ADAM, start, gradients, weight_decay=0.1)
    ours = run(Subspace(whole, ADAM), start, gradients, weight_decay=0.1)
    torch.testing.assert_close(ours, adamw, rtol=0, atol=1e-7)
    scaled = Subspace(whole, ADAM, ScaledGradient(limit=0.0, per="tensor"))
    one, other = (run(rule, start, gradients[:1]) - start for rule in (scaled, ADAM))
    torch.testing.assert_close(one.norm(), other.norm(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_the_cosines_are_orthonormal_and_find_their_own(n: int) -> None:
    """A gradient that is one cosine chooses it; the best r of n miss at most 1 - r / n."""
    c = cosines(n, torch.device("cpu")).double()
    torch.testing.assert_close(c @ c.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-6)
    k, rank = n // 2, max(1, n // 3)
    one, most = DCT(Frame(1, "right")), DCT(Frame(rank, "right"), norm=2)
    for projector, g in ((one, torch.outer(normal(9, 1)[:, 0], c[k].float())), (most, normal(70, n))):
        state = projector.init(torch.zeros(g.shape)) | made(projector.constants(g.shape), g.device)  # type: ignore[arg-type]
        projector.refresh(state, Dense(g), hyper_of((9, n)), {}, say=True)
        if projector is one:
            assert state["index"].tolist() == [k]
        basis = projector.opened(state, hyper_of((9, n)))["basis"]
        missed = (g - g @ basis @ basis.mT).square().sum() / g.square().sum()
        assert float(missed) <= 1 - basis.shape[1] / n + 1e-6


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("norm", [1, 2])
def test_the_size_of_a_gradient_chooses_no_other_cosines(norm: int, side: str) -> None:
    chosen = []
    for size in (1.0, 1e-37, 1e-24, 1e20, 1e36):
        projector, g = DCT(Frame(3, side), norm=norm), normal(9, 14) * size
        state = projector.init(g) | made(projector.constants((9, 14)), g.device)  # type: ignore[arg-type]
        projector.refresh(state, Dense(g), hyper_of((9, 14)), {}, say=True)
        chosen.append(state["index"].tolist())
    assert chosen[0] != [0, 1, 2]  # those before the first choice
    assert chosen == chosen[:1] * 5


def test_a_tangent_lies_beside_the_basis_and_a_small_turn_is_none() -> None:
    g, hp = Dense(normal(9, 20)), hyper_of((9, 20), step=1)
    basis = basis_of(Orthonormal(Frame(RANK)), (9, 20), "w")
    other = torch.linalg.qr(normal(9, RANK, seed=5))[0]
    t, _ = tangent(Frame(RANK), other, g, hp)
    assert float(t.norm()) > 0.1
    torch.testing.assert_close(other.mT @ t, torch.zeros(RANK, RANK), rtol=0, atol=1e-6)
    for find in (Track(1e-9), Walk(1e-9)):
        torch.testing.assert_close(find(Frame(RANK), basis, g, hp)[0], basis, rtol=0, atol=1e-6)


def test_a_gradient_that_a_basis_sees_whole_does_not_turn_it() -> None:
    basis = torch.linalg.qr(normal(9, RANK, seed=5))[0]
    g = Dense(basis @ normal(RANK, 20))
    new, _ = Track(1.0)(Frame(RANK), basis, g, hyper_of((9, 20), step=1))
    torch.testing.assert_close(new, basis, rtol=0, atol=1e-5)


def test_an_online_basis_rests_at_the_leading_subspace_and_the_penalty_holds_its_length() -> None:
    g = normal(6, 2, seed=1) @ normal(2, 12, seed=2) + 0.05 * normal(6, 12)
    u = torch.linalg.svd(g)[0][:, :2]
    lengths = []
    for basis, penalty in ((u, 0.1), (1.3 * u, 10.0)):
        rule = Subspace(Online(Frame(2), 5.0, penalty), ADAM)
        optimizer, p = optimizer_of(rule, torch.zeros(6, 12), lr=1e-3)
        for t in range(60):
            p.grad = g.clone()
            if t == 1:
                optimizer.state[p]["projector.basis"].copy_(basis)
            optimizer.step()
        lengths.append(torch.linalg.svdvals(optimizer.state[p]["projector.basis"]))
        found = optimizer.state[p]["projector.basis"]
        torch.testing.assert_close(torch.linalg.qr(found)[0].abs(), u.abs(), rtol=0, atol=1e-3)
    for one in lengths:
        torch.testing.assert_close(one, torch.ones(2), rtol=0, atol=1e-2)


RANDOM = {
    "walk": Orthonormal(Frame(RANK), Walk(), GAP),
    "power": Orthonormal(Frame(RANK), power_iteration, GAP),
    "jump": Drawn(Frame(RANK), GAP),
    "gaussian": Gaussian(Frame(RANK), GAP),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_name_is_a_basis(name: str) -> None:
    """The same for the same parameter, and another for another one (that of a power iteration hardly)."""
    one, again, other = (basis_of(RANDOM[name], (9, 20), key) for key in ("a", "a", "b"))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_a_sketch_keeps_norms_on_average() -> None:
    """E P P' = I: over many names, by which a parameter has its own."""
    g = normal(24, 40)
    sketches = [basis_of(Gaussian(Frame(8)), (24, 40), f"w{i}") for i in range(60)]
    kept = torch.stack([(p.mT @ g).square().sum() / g.square().sum() for p in sketches])
    assert float(kept.mean()) == pytest.approx(1.0, abs=4 * float(kept.std()) / 60**0.5)


def test_moments_turn_with_their_basis() -> None:
    """The same basis changes nothing; one beside it finds nothing; a second moment is never negative."""
    old = torch.linalg.qr(normal(9, 9, seed=4))[0]
    m, v = normal(RANK, 20, seed=1), normal(RANK, 20, seed=2).square() + normal(RANK, 20, seed=1).square()
    age, hp, ok = torch.tensor(5), hyper_of((9, 20), step=5), torch.ones((), dtype=torch.bool)
    for new, seen in ((old[:, :RANK], True), (old[:, RANK : 2 * RANK], False), (old[:, 1 : 1 + RANK], None)):
        turn = Rotation(ok, new.mT @ old[:, :RANK], 0)
        turned = Adam().rotated({"exp_avg": m, "exp_avg_sq": v}, turn, age, hp)
        assert (turned["exp_avg_sq"] >= 0.0).all()
        if seen is not None:
            for got, before in zip(turned.values(), (m, v), strict=True):
                torch.testing.assert_close(got, before if seen else torch.zeros_like(m), rtol=0, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
def test_apollo_steps_along_the_channels_of_its_gradient(shape: tuple[int, int]) -> None:
    """A channel keeps its direction; for the tensor, all of it does."""
    g = normal(*shape, seed=1)
    for name in ("apollo", "apollo_mini"):
        moved = run(method(name), torch.zeros(shape), [g])
        ratio = moved / g
        spread = (ratio.amax() - ratio.amin()) if name == "apollo_mini" else (
            ratio.amax(min_dim(shape)) - ratio.amin(min_dim(shape))
        ).amax()  # fmt: skip
        assert float(spread) <= 1e-5 * float(ratio.abs().amax())


def min_dim(shape: tuple[int, int]) -> int:
    return 0 if shape[0] < shape[1] else 1


@pytest.mark.parametrize("residual", [ScaledRest(), ScaledGradient()])
def test_a_first_step_has_the_length_of_adams_signs(residual: Residual) -> None:
    """|N_j| is the root of r then, so that phi_j = sqrt(r) / |R_j|."""
    projector = Gaussian(Frame(RANK)) if isinstance(residual, ScaledGradient) else Orthonormal(Frame(RANK))
    g = normal(6, 12, seed=1)
    moved = run(Subspace(projector, ADAM, residual), torch.zeros(6, 12), [g], eps=1e-16)
    basis = basis_of_first(Subspace(projector, ADAM, residual), g)
    low = basis.mT @ g
    part = g if isinstance(residual, ScaledGradient) else g - basis @ low
    lifted = 0.0 if isinstance(residual, ScaledGradient) else basis @ low.sign()
    expected = -LR * (lifted + part * (RANK**0.5 / low.norm(dim=0)))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-6)


def basis_of_first(rule: Subspace, g: Tensor) -> Tensor:
    optimizer, p = optimizer_of(rule, torch.zeros(g.shape))
    hp = optimizer.hyper(p, first=True)
    p.grad = g.clone()
    optimizer.step()
    held = {k.removeprefix("projector."): x for k, x in optimizer.state[p].items()}
    return rule.projector.opened(held, hp)["basis"]


def test_growth_is_limited_from_the_second_step_on() -> None:
    """The first step is as it is; what grows by less is left alone; what grows by more is cut back to 1 %."""
    projector = Orthonormal(Frame(RANK), update_proj_gap=1000)
    free, limited = (Subspace(projector, ADAM, ScaledRest(limit=limit)) for limit in (0.0, 1.01))
    seen, other = normal(6, RANK, seed=1) @ normal(RANK, 12, seed=2), normal(6, 12, seed=3)
    for gradients, same in (([other], True), ([other] * 3, True), ([seen + 0.01 * other, other], False)):
        one, two = (run(rule, torch.zeros(6, 12), gradients) for rule in (free, limited))
        assert torch.allclose(one, two, rtol=0, atol=1e-7) == same
    norms = []
    optimizer, p = optimizer_of(limited, torch.zeros(6, 12))
    for t in range(4):
        p.grad = seen + 0.01 * 10.0**t * other
        optimizer.step()
        norms.append(float(optimizer.state[p]["residual.norm"]))
    assert norms == pytest.approx([norms[0] * 1.01**t for t in range(4)], rel=1e-5)


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
@pytest.mark.parametrize("spike", [1e18, 1e19, 1e20, 1e25, 1e37])
@pytest.mark.parametrize("at", [0, 2])
def test_a_sum_of_squares_without_fp32_is_no_step(at: int, spike: float, shape: tuple[int, int]) -> None:
    """Nor are those after it: the momentum has seen the spike too."""
    gradients = steps(shape, 6)
    gradients[at][1, 3] = spike
    rule = method("subspace_momentum", update_proj_gap=100)
    optimizer, p = optimizer_of(rule, torch.zeros(shape))
    for g in gradients:
        before = p.detach().clone()
        p.grad = g
        optimizer.step()
        assert (p.detach() - before).abs().max() <= 20.0 * LR
    assert optimizer.state[p]["residual.exp_avg_sq"].isfinite().all()
    assert p.abs().max() > LR


LIMITED = ("fira", "subtrack", "grass_walk", "grass_jump", "apollo", "apollo_mini")


@pytest.mark.parametrize("name", LIMITED)
def test_a_step_of_nothing_does_not_loosen_the_limit(name: str) -> None:
    optimizer, p = optimizer_of(method(name, **({} if name == "apollo_mini" else {"rank": 3})), normal(6, 12))
    norms = []
    for g in (normal(6, 12, seed=1), torch.zeros(6, 12), 100.0 * normal(6, 12, seed=2)):
        p.grad = g
        optimizer.step()
        norms.append(float(optimizer.state[p]["residual.norm"]))
    assert norms[1] == norms[0] > 0.0
    assert norms[2] <= norms[0] * 1.0101


@pytest.mark.parametrize("name", ["fira", "subtrack", "grass_walk"])
def test_a_gradient_that_a_basis_sees_nothing_of_is_no_step_of_thousands(name: str) -> None:
    """The first ones lie in the basis: their rest is 0, and the rest of the last is all of it.

    It comes at a step at which nobody looks for a basis again, which one of so few numbers asks for.
    """
    one, other = (torch.eye(6)[i][:, None].expand(6, 12) for i in (0, 1))
    w = run(method(name, rank=1, update_proj_gap=1000), torch.zeros(6, 12), [one, one, one, other])
    assert LR < w.abs().max() < 10.0 * 6**0.5 * LR  # ten times as long as a step in all directions


@pytest.mark.parametrize("shape", [(6, 12), (12, 6)])
@pytest.mark.parametrize("factor", [1e20, 1e30, 1e37])
@pytest.mark.parametrize("name", LIMITED)
def test_channels_whose_squares_have_no_fp32_are_as_long_as_others(
    name: str, factor: float, shape: tuple[int, int]
) -> None:
    g = normal(*shape, seed=1).clamp(-3.0, 3.0)
    one, other = (run(method(name), torch.zeros(shape), [g * by]) for by in (1.0, factor))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_fira_of_full_rank_is_galore() -> None:
    """The released code scales what it takes off: its residual is not zero there."""
    fira, galore = (method(name, rank=6, update_proj_gap=1000) for name in ("fira", "galore"))
    start, gradients = normal(6, 12), steps((6, 12), 4)
    assert torch.equal(run(fira, start, gradients), run(galore, start, gradients))


@pytest.mark.parametrize("name", sorted({*FULL_RANK, *IN_WINDOW, "ldadam", "frugal"}))
def test_a_zero_gradient_moves_no_basis(name: str) -> None:
    """Not even at a refresh; moments of zero stay zero, and nothing turns into NaN."""
    optimizer, p = optimizer_of(
        method(name, rank=3) if name != "apollo_mini" else method(name), normal(6, 12)
    )
    p.grad = normal(6, 12, seed=1)
    optimizer.step()
    before = {k: x.clone() for k, x in optimizer.state[p].items() if k.endswith(("basis", "codes", "index"))}
    for _ in range(GAP + 1):
        p.grad = torch.zeros(6, 12)
        optimizer.step()
    held = optimizer.state[p]
    if name not in ("ldadam", "frugal", "grass_walk", "online_subspace"):  # owed, random, random, penalty
        assert all(torch.equal(held[k], x) for k, x in before.items() if k.startswith("projector"))
    assert all(x.isfinite().all() for x in (*held.values(), p.detach()))


def test_a_basis_of_bf16_weights_is_fp32() -> None:
    """In bf16 it would be orthonormal to 4e-3 alone."""
    optimizer, p = optimizer_of(Subspace(Orthonormal(Frame(RANK)), ADAM), normal(48, 64).bfloat16())
    p.grad = normal(48, 64, seed=1).bfloat16()
    optimizer.step()
    basis = optimizer.state[p]["projector.basis"]
    assert basis.dtype == torch.float32
    torch.testing.assert_close(basis.mT @ basis, torch.eye(RANK), rtol=0, atol=1e-6)


def test_a_random_refresh_of_descent_with_its_rest_is_descent() -> None:
    """Whatever is drawn: the two parts add up to the gradient."""
    rule = Subspace(Drawn(Frame(RANK), 2), coded(SGD()), Stateless(sign=False))
    start, gradients = normal(6, 12), steps((6, 12), 6)
    torch.testing.assert_close(run(rule, start, gradients), start - LR * sum(gradients), rtol=0, atol=2e-6)
