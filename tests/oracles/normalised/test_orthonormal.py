"""Rules that make singular values equal: known answers, their papers in double precision, invariants.

Known answers as in test_normalised: three steps from W0[i][j] = cos(1 + 2i + 3j) / 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.memory import count
from lowmem.optim.blocks import Dense
from lowmem.optim.rules.normalised.muon import Product, polar
from lowmem.optim.rules.normalised.schulz import polynomial
from lowmem.optim.rules.normalised.whitened import SWAN
from tests.oracles import drive
from tests.oracles.normalised import reference_orthonormal as reference
from tests.oracles.normalised.test_normalised import gradient_of, matrix, weight_of

ANSWERS: list[tuple[str, dict[str, Any], dict[str, float], str]] = [
    (
        "swan", {}, {"lr": 0.01},
        "0.268864 -0.293839 0.349920 -0.424199; -0.468901 0.443020 -0.444197 0.421529;"
        "0.144793 -0.064872 0.007924 0.051817",
    ),
    (
        "swan", {}, {"lr": 0.01},
        "0.272575 -0.298242 0.345948; -0.470052 0.441240 -0.441664; 0.133774 -0.058173 -0.004306;"
        "0.400658 -0.446489 0.456970",
    ),
    (
        "muon_8bit", {}, {"lr": 0.02, "weight_decay": 0.1},
        "0.265822 -0.313645 0.369451 -0.426608; -0.484374 0.466849 -0.444707 0.417127;"
        "0.155339 -0.058847 0.014389 0.074480",
    ),
    (
        "muon_8bit", {}, {"lr": 0.02, "weight_decay": 0.1},
        "0.265990 -0.313417 0.368593; -0.484833 0.465496 -0.444777; 0.154308 -0.059071 0.012917;"
        "0.382217 -0.427631 0.445625",
    ),
    (
        "ada_muon", {}, {"lr": 0.02, "weight_decay": 0.01},
        "0.268187 -0.317430 0.369786 -0.431197; -0.488466 0.470151 -0.446174 0.415313;"
        "0.150771 -0.058524 0.013567 0.078325",
    ),
    (
        "ada_muon", {}, {"lr": 0.02, "weight_decay": 0.01},
        "0.267858 -0.316271 0.371343; -0.487539 0.467450 -0.447266; 0.150946 -0.057966 0.011280;"
        "0.381940 -0.427722 0.448648",
    ),
    (
        "ada_muon", {"sign": False}, {"lr": 0.02, "weight_decay": 0.01},
        "0.267801 -0.315513 0.372140 -0.426850; -0.487221 0.467395 -0.448773 0.418996;"
        "0.151301 -0.061630 0.014982 0.075074",
    ),
    (
        "ada_muon", {"sign": False}, {"lr": 0.02, "weight_decay": 0.01},
        "0.267850 -0.314725 0.370237; -0.486963 0.466560 -0.448767; 0.151237 -0.061349 0.013852;"
        "0.383781 -0.432819 0.448423",
    ),
    (
        "auon", {"scaling": "released"}, {"lr": 0.08, "weight_decay": 0.01},
        "0.261141 -0.303871 0.365960 -0.432301; -0.481034 0.456855 -0.438384 0.421962;"
        "0.163658 -0.051026 0.021422 0.083554",
    ),
    (
        "auon", {"scaling": "released"}, {"lr": 0.08, "weight_decay": 0.01},
        "0.261135 -0.303868 0.365963; -0.481037 0.456853 -0.438379; 0.163661 -0.051025 0.021422;"
        "0.387232 -0.439118 0.447442",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "hyper", "answer"), ANSWERS)
def test_known_answers(name: str, options: dict[str, Any], hyper: dict[str, float], answer: str) -> None:
    expected = matrix(answer)
    shape = (expected.shape[0], expected.shape[1])
    grads = [gradient_of(shape, t) for t in (1, 2, 3)]
    got = drive.follow(name, weight_of(shape).float(), grads, hyper=hyper, **options)[-1]
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_swan_is_the_paper(shape: tuple[int, int]) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 3)
    truth = reference.SWAN(start, 0.1, 0.1)
    ours = drive.follow("swan", start, grads, hyper={"lr": 0.1, "weight_decay": 0.1}, iterations=14)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=2e-4)


@pytest.mark.parametrize("iterations", [10, 16])
def test_swan_makes_no_step_of_rounding_noise(iterations: int) -> None:
    """However many iterations are allowed: of a tall matrix, and of one of small rank."""
    low = drive.gradients((32, 3), 1)[0] @ drive.gradients((3, 64), 1, seed=4)[0]
    for g in (*drive.gradients((4, 3), 1), *drive.gradients((64, 48), 1), low):
        x = g.double()
        x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        rank = int((s > 1e-6 * s[0]).sum())
        exact = u[:, :rank] @ v[:rank] * (s.square().sum() / rank).sqrt()
        step = drive.follow("swan", torch.zeros(g.shape), [g], hyper={"lr": 1.0}, iterations=iterations)[0]
        assert (step.double() + exact).norm() <= 0.02 * exact.norm()


@pytest.mark.parametrize("iterations", [0, 17, 30])
def test_swan_refuses_iterations_that_make_steps_of_noise(iterations: int) -> None:
    with pytest.raises(UserError, match=f"from 1 to 16, got {iterations}; more make .* 10 are usual"):
        SWAN(iterations)


def test_swan_moves_by_one_rms_and_knows_no_size() -> None:
    g = drive.gradients((8, 30), 1)[0]
    ends = [
        drive.follow("swan", torch.zeros(8, 30), [c * g], hyper={"lr": 1.0})[0] for c in (1.0, 1e-25, 1e25)
    ]
    assert float(ends[0].square().mean().sqrt()) == pytest.approx(1.0, rel=1e-5)
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-4)


def test_swan_leaves_rows_of_equal_elements() -> None:
    g = drive.gradients((6, 9), 1)[0]
    g[2], g[4] = 0.3, 0.0
    moved = drive.follow("swan", torch.zeros(6, 9), [g], hyper={"lr": 1.0})[0]
    assert not moved[2].any()
    assert not moved[4].any()
    assert moved.isfinite().all()
    column = torch.ones(6, 1)
    assert torch.equal(drive.follow("swan", column, [g[:, :1]], hyper={"lr": 1.0})[0], column)


@pytest.mark.parametrize("shape", [(60, 70), (70, 60)])
def test_muon_8bit_is_the_paper(shape: tuple[int, int]) -> None:
    """More than one block; a code that rounding puts next door is 1 / 254 of the largest element."""
    start, grads = drive.start_of(shape), drive.gradients(shape, 5)
    truth = reference.Muon8bit(start, 0.02, 0.1, 0.95)
    ours = drive.follow("muon_8bit", start, grads, hyper={"lr": 0.02, "weight_decay": 0.1})
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=5e-5)


def test_linear_codes_are_of_8_bits() -> None:
    with pytest.raises(UserError, match="codes='linear' are of states='int8', got 'fp32'"):
        lowmem.create("muon_8bit", states="fp32")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swan", 0),
        ("muon_8bit", 3600 + 4 * 2),
        ("ada_muon", 8 * 3600 + 4),
        ("auon", 4 * 3600),
        ("dion", 4 * 3600 + 4 * 60 * 60),
        ("sumo", 4 * 60 * (60 + 60)),
    ],
)
def test_what_is_held(name: str, size: int) -> None:
    """On meta and in fact; a stack is so many matrices."""
    held: list[int] = []

    def watch(optimizer: Any, p: Tensor) -> None:
        held.append(sum(x.nbytes for x in optimizer.state[p].values()))

    for shape, many in (((60, 60), 1), ((2, 60, 60), 2)):
        drive.follow(name, torch.zeros(shape), [torch.ones(shape)], watch=watch, hyper={"lr": 0.1})
        assert lowmem.state_bytes(lowmem.create(name), shape) == held.pop() == many * size


def test_newton_and_schulz_tell_the_size_of_the_result() -> None:
    """Whether products are made at once or in panels."""
    x = torch.randn(5, 8)
    for panel in (1 << 22, 10):
        t, p, a = polynomial(x @ x.mT, x.norm(), [(1.5, -0.5, 0.0)] * 3, panel)
        torch.testing.assert_close(p @ a @ p, t @ x @ x.mT @ t.mT, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "of_sides"),
    [
        ("muon", {}, 12 * 6144**2),
        ("swan", {}, 12 * 6144**2),
        ("muon", {"products": "bf16"}, 2 * 6144 * 8192 + 6 * 6144**2),
    ],
    ids=str,
)
def test_matrices_of_the_short_side_are_all(name: str, options: dict[str, Any], of_sides: int) -> None:
    """Large enough for the rest of the workspace not to hide one more."""
    strategy, shape = lowmem.create(name, **options), (6144, 8192)
    taken = count.workspace_bytes(strategy, shape, torch.bfloat16, "matrix", False)
    assert taken <= strategy.rules["matrix"].scratch(shape) == (64 << 20) + of_sides


def of_spectrum(values: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix with these singular values, (short side,)."""
    u, _, vh = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)
    return ((u * values) @ vh).float()


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("power", [None, 0.5, 1.0, 2.0])
def test_bf16_products_are_as_near_as_those_of_torch(power: float | None, wide: bool) -> None:
    """To exact arithmetic: what bf16 costs is the distance of both (told with -s)."""
    shape = (160, 320)
    values = None if power is None else torch.arange(1, shape[0] + 1).double() ** -power
    wide_one = torch.randn(shape) if values is None else of_spectrum(values, shape)
    g = wide_one if wide else wide_one.mT.contiguous()
    exact = -0.2 * shape[1] ** 0.5 * reference.newton_schulz(g.double())
    w = nn.Parameter(torch.zeros_like(g))
    theirs = torch.optim.Muon([w], lr=1.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    w.grad = g.clone()
    theirs.step()
    hyper = {"lr": 1.0}
    ours = drive.follow("muon", torch.zeros_like(g), [g], hyper=hyper, products="bf16")[0]
    found, published = (float((x - exact).norm() / exact.norm()) for x in (ours.double(), w.detach()))
    print(f"{power}: {found:.4f} for {published:.4f}")
    assert 1e-3 < found < 1.2 * published


def test_bf16_products_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="products='bf16' has no effect on eigenvectors"):
        lowmem.create("muon", iterations=0, products="bf16")
    with pytest.raises(UserError, match="products"):
        lowmem.create("muon", products="fp16")


@pytest.mark.parametrize("sign", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_ada_muon_is_the_paper(shape: tuple[int, int], sign: bool) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = reference.AdaMuon(start, 0.02, 0.1, sign)
    ours = drive.follow("ada_muon", start, grads, hyper={"lr": 0.02, "weight_decay": 0.1}, sign=sign)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=2e-5)
    step = drive.follow("ada_muon", torch.zeros(shape), grads[:1], hyper={"lr": 1.0}, sign=sign)[0]
    assert float(step.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-5)


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_auon_is_the_paper(shape: tuple[int, int], released: bool) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    truth = reference.AuON(start, 0.1, 0.1, released)
    words = {"scaling": "released"} if released else {}
    ours = drive.follow("auon", start, grads, hyper={"lr": 0.1, "weight_decay": 0.1}, **words)
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


def follow_dion(
    start: Tensor, q: Tensor, grads: list[Tensor], **hyper: float
) -> Iterator[tuple[Any, Tensor]]:
    """The optimizer and the weight after each step, from a given Q (n, r)."""
    optimizer, params = drive.on_weights("dion", {"w": start}, hyper=hyper, rank=q.shape[1])
    optimizer.init_state()
    optimizer.param_groups[0]["step"] = 1  # the first step draws a Q
    optimizer.state[params["w"]]["basis"].copy_(q.mT)
    for g in grads:
        drive.step(optimizer, params, {"w": g})
        yield optimizer.state[params["w"]], params["w"].detach().clone()


@pytest.mark.parametrize(
    "answer",
    [
        "0.263678 -0.313925 0.378230 -0.430506; -0.498842 0.470142 -0.449456 0.416610;"
        "0.152447 -0.054450 0.007344 0.073708",
        "0.262802 -0.312659 0.383401; -0.497429 0.470001 -0.447869; 0.156470 -0.051497 0.010068;"
        "0.393503 -0.436343 0.445361",
    ],
)
def test_known_answers_of_dion(answer: str) -> None:
    expected = matrix(answer)
    shape = (expected.shape[0], expected.shape[1])
    q = torch.cos(torch.arange(shape[1])[:, None] + 2.0 * torch.arange(2))
    grads = [gradient_of(shape, t) for t in (1, 2, 3)]
    *_, (_, got) = follow_dion(weight_of(shape).float(), q, grads, lr=0.01, weight_decay=0.01)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
def test_dion_is_the_paper(shape: tuple[int, int]) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 5)
    q = drive.gradients((shape[1], 3), 1, seed=9)[0]
    truth = reference.Dion(start, 0.1, 0.1, q)
    for g, (_, w) in zip(grads, follow_dion(start, q, grads, lr=0.1, weight_decay=0.1), strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-5)


def test_dion_of_full_rank_becomes_the_polar_factor() -> None:
    """On a momentum that stays as it is, warm iterations converge; a gradient of zeros changes nothing."""
    m = drive.gradients((6, 6), 1)[0]
    grads = [m, *(0.05 * m for _ in range(300))]  # a twentieth leaves, and comes back
    before = torch.zeros(6, 6)
    for _, w in follow_dion(before, torch.randn(6, 6), grads, lr=1.0):
        step, before = before - w, w
    torch.testing.assert_close(step.double(), reference.polar(m.double()), rtol=0, atol=1e-2)
    still = drive.follow("dion", m, [torch.zeros(6, 6)], hyper={"lr": 1.0}, rank=2)[0]
    assert torch.equal(still, m)


def test_dion_takes_no_noise_for_a_direction() -> None:
    """Of a momentum of rank one, with a basis of three."""
    g = torch.outer(torch.randn(6), torch.randn(9))
    step = -drive.follow("dion", torch.zeros(6, 9), [g], hyper={"lr": 1.0}, rank=3)[0]
    torch.testing.assert_close(step, (6 / 9) ** 0.5 * g / g.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("wide", [True, False])
def test_sumo_is_the_paper(wide: bool) -> None:
    """Its basis is found again every third step; a tall matrix is a wide one on its side."""
    start, grads = drive.start_of((7, 12)), drive.gradients((7, 12), 7)
    truth, key = reference.SUMO(start, 0.05, 0.1, 3), drive.name_without_offset(3)
    seen = [g if wide else g.mT.contiguous() for g in (start, *grads)]
    hyper = {"lr": 0.05, "weight_decay": 0.1}
    options = {"rank": 3, "update_proj_gap": 3, "projector": "svd"}
    ours = drive.follow("sumo", seen[0], seen[1:], key=key, hyper=hyper, **options)
    for t, (g, w) in enumerate(zip(grads, ours, strict=True)):
        if t % 3 == 0:
            truth.refresh(g)
        torch.testing.assert_close((w if wide else w.mT).double(), truth.step(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_the_exact_factor_makes_small_singular_values_one_too(shape: tuple[int, int]) -> None:
    """Where a Gram matrix has nothing but noise, directions may mix; zeros stay zero."""
    u, _, vh = torch.linalg.svd(torch.randn(shape).double(), full_matrices=False)

    def factor(*values: float) -> Tensor:
        x = Dense((u @ torch.diag(torch.tensor(values).double()) @ vh).float())
        return Product(polar(x), x).rows(0, shape[0]).double()

    made = torch.linalg.svdvals(factor(1.0, 0.5, 1e-2, 1e-3, 1e-4, 1e-5))
    torch.testing.assert_close(made, torch.ones(6).double(), rtol=0, atol=0.03)
    torch.testing.assert_close(factor(1.0, 0.5, 0.3, 0.1, 0.03, 0.01), u @ vh, rtol=0, atol=1e-3)
    torch.testing.assert_close(factor(1.0, 0.3, 0.1, 0.0, 0.0, 0.0), u[:, :3] @ vh[:3], rtol=0, atol=1e-3)
    assert not factor(*[0.0] * 6).any()


@pytest.mark.parametrize("name", ["swan", "muon_8bit", "ada_muon", "auon", "dion", "sumo"])
def test_zeros_stand_still_and_what_is_not_finite_is_refused(name: str) -> None:
    start, g = torch.ones(6, 9), drive.gradients((6, 9), 1)[0]
    bad, worse = g.clone(), torch.full((6, 9), torch.nan)
    bad[2, 3] = torch.inf
    still = drive.follow(name, start, [torch.zeros(6, 9), bad, worse, g], hyper={"lr": 0.1})
    assert all(torch.equal(w, start) for w in still[:3])
    assert still[3].isfinite().all()
    assert not torch.equal(still[3], start)
