"""The oracles themselves, held to official packages and to closed forms."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from tests.oracles.dense import reference_companded as companded
from tests.oracles.dense import reference_int8 as int8
from tests.oracles.dense.reference_adamw import AdamW
from tests.oracles.factored.reference_adafactor import Adafactor
from tests.oracles.low_rank.reference_frugal import Frugal
from tests.oracles.low_rank.reference_galore import GaLore, svd_basis
from tests.oracles.sparse.reference_microadam import MicroAdam, stationary_gain
from tests.oracles.zeroth import reference_mezo as mezo

F64 = torch.float64


def gradients(shape: tuple[int, ...], steps: int, dtype: torch.dtype = F64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=g, dtype=dtype) for _ in range(steps)]


def run(optimizer: torch.optim.Optimizer, w: torch.nn.Parameter, grads: list[torch.Tensor]) -> torch.Tensor:
    for g in grads:
        w.grad = g.clone()
        optimizer.step()
    return w.detach()


def svd_in_fp32(g: torch.Tensor, rank: int) -> torch.Tensor:
    return svd_basis(g.float(), rank).to(g)


def test_adamw_is_torch_adamw() -> None:
    hyper: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    start, grads = torch.randn(5, 7, dtype=F64), gradients((5, 7), 20)
    ours, w = AdamW(start, **hyper), torch.nn.Parameter(start.clone())
    theirs = run(torch.optim.AdamW([w], **hyper), w, grads)
    for g in grads:
        ours.step(g)
    torch.testing.assert_close(ours.w, theirs, rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (11,)])
@pytest.mark.parametrize(
    "mode",
    [
        {"relative_step": True, "warmup_init": False, "scale_parameter": True},
        {"relative_step": True, "warmup_init": True, "scale_parameter": True},
        {"relative_step": False, "scale_parameter": False, "lr": 1e-3},
        {"relative_step": False, "scale_parameter": True, "lr": 1e-3, "clip_threshold": 0.3},
        {"relative_step": False, "scale_parameter": False, "lr": 1e-3, "beta1": 0.9, "weight_decay": 0.1},
    ],
)
def test_adafactor_is_transformers_adafactor(shape: tuple[int, ...], mode: dict[str, Any]) -> None:
    official = pytest.importorskip("transformers.optimization").Adafactor
    start, grads = torch.randn(shape), gradients(shape, 12, torch.float32)
    ours, w = Adafactor(start.double(), **mode), torch.nn.Parameter(start.clone())
    theirs = run(official([w], **{"lr": None, **mode}), w, grads)
    for g in grads:
        ours.step(g)
    torch.testing.assert_close(ours.w.float(), theirs, rtol=0, atol=1e-6)


def test_dynamic_maps_have_the_published_shape() -> None:
    signed, unsigned = int8.dynamic_map(True), int8.dynamic_map(False)
    assert len(signed) == len(unsigned) == 256
    assert (int((signed < 0).sum()), int((signed == 0).nonzero())) == (127, 127)
    assert (float(signed[-1]), round(float(signed[0]), 5)) == (1.0, -0.99297)
    assert (float(unsigned[0]), float(unsigned[-1])) == (0.0, 1.0)
    assert float(signed[128]) == pytest.approx(5.5e-7)
    assert float(unsigned[1]) == pytest.approx(3.25e-7)


def test_dynamic_maps_are_torchaos(torchao_record: dict[str, Any]) -> None:
    for signed in (True, False):
        assert torch.equal(int8.dynamic_map(signed), torchao_record["maps"][str(signed)])


def test_8bit_adamw_is_torchaos_bit_for_bit(torchao_record: dict[str, Any]) -> None:
    for record in torchao_record["runs"].values():
        ours = int8.AdamW8bit(record["start"], **torchao_record["hyper"])
        for g, expected in zip(record["gradients"], record["weights"], strict=True):
            assert torch.equal(ours.step(g), expected)
        for key in ("m", "v"):
            codes, scale = ours.state[key]
            assert torch.equal(codes, record[f"{key}.codes"])
            assert torch.equal(scale, record[f"{key}.scale"])


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_encode_finds_the_nearest_entry(signed: bool) -> None:
    table = int8.dynamic_map(signed)
    x = torch.randn(4, 256) ** 3 if signed else torch.rand(4, 256) ** 4
    codes, scale = int8.encode(x, table)
    distance = (x / scale[:, None]).unsqueeze(-1).sub(table).abs()
    assert torch.equal(distance.gather(2, codes.long().unsqueeze(-1)).squeeze(-1), distance.amin(-1))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1, 31, 32, 33, 1000])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_companded_codes_stay_within_their_bound(signed: bool, size: int, dtype: torch.dtype) -> None:
    x = torch.randn(size) if signed else torch.rand(size) ** 3
    codes, scale = companded.encode(x, signed, dtype)
    error = (companded.decode(codes, scale, signed) - x).abs()
    bound = companded.worst_error(scale, signed).repeat_interleave(companded.GROUP)[:size]
    assert (error <= bound).all()


@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_galore_is_galore_torch(galore_torch: Any, shape: tuple[int, int], scale: float) -> None:
    start, grads = torch.randn(shape, dtype=F64), gradients(shape, 11)
    w = torch.nn.Parameter(start.clone())
    group = {"params": [w], "rank": 3, "update_proj_gap": 4, "scale": scale, "proj_type": "std"}
    hyper: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-3, "weight_decay": 0.1}
    theirs = run(galore_torch.AdamW([group], **hyper, no_deprecation_warning=True), w, grads)
    ours = GaLore(
        start, rank=3, gap=4, scale=scale, **hyper, official_eps=True, decay_after=True, basis=svd_in_fp32
    )
    for g in grads:
        ours.step(g)
    torch.testing.assert_close(ours.w, theirs, rtol=0, atol=1e-12)


def test_galore_of_full_rank_is_adam_in_a_rotated_basis() -> None:
    start, grads = torch.randn(4, 6, dtype=F64), gradients((4, 6), 9)
    galore = GaLore(start, rank=4, gap=100, lr=1e-2)
    galore.step(grads[0])
    p = galore.p
    assert p is not None
    adam = AdamW(torch.zeros(4, 6, dtype=F64), lr=1e-2)
    for g in grads:
        adam.step(p.mT @ g)
    for g in grads[1:]:
        galore.step(g)
    torch.testing.assert_close(galore.w, start + p @ adam.w, rtol=0, atol=1e-14)


def test_galore_with_aligned_signs_is_transpose_equivariant() -> None:
    start, grads = torch.randn(5, 8, dtype=F64), gradients((5, 8), 9)
    flip = torch.tensor([1.0, -1.0, 1.0], dtype=F64)
    one = GaLore(start, rank=3, gap=4, align=True)
    other = GaLore(start, rank=3, gap=4, align=True, basis=lambda g, r: svd_basis(g, r) * flip)
    for g in grads:
        one.step(g)
        other.step(g)
    torch.testing.assert_close(one.w, other.w, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("density", "residual"), list(product([1.0, 0.0], ["sign", "sgd"])))
def test_frugal_ends_are_adamw_and_sign_descent(density: float, residual: str) -> None:
    start, grads = torch.randn(6, 4, dtype=F64), gradients((6, 4), 6)
    ours = Frugal(start, lr=1e-2, weight_decay=0.1, residual=residual, residual_scale=0.5)
    ours.refresh(mask=torch.full((6, 4), density == 1.0))
    truth = AdamW(start, lr=1e-2, weight_decay=0.1)
    w = start
    for g in grads:
        ours.step(g)
        truth.step(g)
        w = w * (1 - 1e-3) - 1e-2 * 0.5 * (g.sign() if residual == "sign" else g)
    torch.testing.assert_close(ours.w, truth.w if density else w, rtol=0, atol=1e-14)


def test_frugal_with_sgd_on_both_parts_ignores_the_split() -> None:
    p, _ = torch.linalg.qr(torch.randn(4, 2, dtype=F64))
    g = torch.randn(4, 6, dtype=F64)
    ours = Frugal(torch.zeros(4, 6, dtype=F64), residual="sgd")
    ours.refresh(basis=p)
    torch.testing.assert_close(ours.up(ours.down(g)) + ours.rest(g), g, rtol=0, atol=1e-14)


def test_microadam_that_keeps_everything_is_adam() -> None:
    start, grads = torch.randn(4096), gradients((4096,), 8, torch.float32)
    ours = MicroAdam(start, density=1.0, value_dtype=torch.float32, exact_feedback=True)
    truth = AdamW(start)
    for g in grads:
        torch.testing.assert_close(ours.step(g), truth.step(g), rtol=0, atol=1e-6)


def test_microadam_loses_nothing_with_exact_feedback() -> None:
    grads = gradients((5000,), 15, torch.float32)
    ours = MicroAdam(torch.zeros(5000), exact_feedback=True, value_dtype=torch.float32, window=100)
    for g in grads:
        ours.step(g)
    taken = sum(ours.scatter(row, 1) for row in ours.rows) + ours.error
    torch.testing.assert_close(taken.view(-1)[:5000], sum(grads), rtol=0, atol=1e-4)


@pytest.mark.parametrize("t", [10, 100])
def test_microadam_step_grows_with_time_as_published(t: int) -> None:
    ours = MicroAdam(torch.zeros(4096), lr=1.0, density=1 / 4096)
    g = torch.zeros(4096)
    g[5] = 1.0
    for _ in range(t):
        before = ours.w.clone()
        ours.step(g)
    moved = float((before - ours.w)[5])
    assert moved == pytest.approx(stationary_gain(t, 10, (0.9, 0.999)), rel=1e-5)
    assert moved == pytest.approx({10: 1.0, 100: 2.01}[t], abs=5e-3)


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
def test_spsa_is_unbiased_and_has_the_known_energy(noise: str) -> None:
    size, draws = 24, 20_000
    problem, w = mezo.quadratic(size), torch.zeros(size, dtype=F64)
    z = torch.randn(draws, size, dtype=F64)
    z = z if noise == "gaussian" else z.sign()
    g = problem.gradient(w)
    c = torch.tensor([mezo.slope(problem, w, row, 1e-3) for row in z[:50]], dtype=F64)
    torch.testing.assert_close(c, z[:50] @ g, rtol=0, atol=1e-10)
    estimates = (z @ g)[:, None] * z
    error = (estimates.mean(0) - g) / mezo.standard_error(estimates)
    assert error.abs().max() < 4.5
    energy = estimates.square().sum(1).mean() / g.square().sum()
    assert float(energy) == pytest.approx(size + 2 if noise == "gaussian" else size, rel=0.05)
