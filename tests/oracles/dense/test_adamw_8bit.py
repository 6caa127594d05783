"""8-bit and 4-bit states: torchao's eager code is the truth, bit for bit where its format applies.

With 8 bits it does not where torchao makes a second moment zero that is not: see reference_int8.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.oracles import drive
from tests.oracles.dense.reference_adamw import AdamW
from tests.oracles.dense.reference_int8 import AdamW8bit, decode, dynamic_map

FP32_CORRECTION = 2e-5
"""torchao takes 1 - beta2^t in fp32, off by 1.3e-5 at t = 1 for beta2 = 0.999; we take it in fp64."""


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("adamw_8bit")


def moments(optimizer: Any, p: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        key: value for key, value in optimizer.state[p].items() if key.split(".")[-1] in ("codes", "scale")
    }


def beside(
    record: dict[str, Any], hyper: dict[str, Any], name: str, **options: Any
) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after each step of a record of torchao's, and the moments after the last."""
    held: dict[str, torch.Tensor] = {}
    weights = drive.follow(
        name,
        record["start"],
        record["gradients"],
        watch=lambda o, p: held.update(moments(o, p)),
        hyper=hyper,
        writer="nearest",
        **options,
    )
    return weights, held


def close_to(
    ours: list[torch.Tensor], theirs: list[torch.Tensor], start: torch.Tensor, hyper: dict[str, Any]
) -> None:
    """Equal but for the correction in fp32, and values between two bf16 numbers, falling either way."""
    slack, half = len(ours) * hyper["lr"] * FP32_CORRECTION, start.dtype == torch.bfloat16
    for w, truth in zip(ours, theirs, strict=True):
        off = (w.float() - truth.float()).abs()
        assert int((off > slack).sum()) <= (w.numel() // 100 if half else 0)
        assert off.max() <= (2.0**-8 * truth.abs().max() if half else slack)


def test_codes_scales_and_weights_are_torchaos(torchao_record: dict[str, Any]) -> None:
    """Codes and scales of every block; weights but for its own fp32 bias correction.

    All elements but those of which torchao has made a second moment zero, which the reference finds
    and follows: no scale depends on them, and none of the others.
    """
    hyper = torchao_record["hyper"]
    for label, record in torchao_record["runs"].items():
        ours, held = beside(record, hyper, "adamw_8bit", states="int8")
        reference = AdamW8bit(record["start"], **hyper, keeps=True)
        followed = [reference.step(g) for g in record["gradients"]]
        same = ~reference.lost.view(-1)
        assert 0.99 < same.float().mean() < 1.0
        for key, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            codes, scale = held[f"{name}.codes"].view(-1), held[f"{name}.scale"].view(-1)
            assert torch.equal(codes[same], record[f"{key}.codes"].view(-1)[same]), (label, name)
            assert torch.equal(codes, reference.state[key][0].view(-1)), (label, name)
            assert torch.equal(scale, record[f"{key}.scale"].view(-1)), (label, name)
        both = zip(record["weights"], followed, strict=True)
        close_to(ours, [torch.where(reference.lost, kept, w) for w, kept in both], record["start"], hyper)


def test_4bit_codes_scales_and_weights_are_torchaos(torchao_record: dict[str, Any]) -> None:
    """Blocks of 128, two codes a byte; weights but for its own fp32 bias correction."""
    hyper = torchao_record["hyper"]
    for label, record in torchao_record["runs_4bit"].items():
        ours, held = beside(record, hyper, "adamw_4bit")
        for key, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
            for part in ("codes", "scale"):
                assert torch.equal(held[f"{name}.{part}"].view(-1), record[f"{key}.{part}"].view(-1)), label
        close_to(ours, record["weights"], record["start"], hyper)


@pytest.mark.parametrize("shape", [(4097,), (4351,), (64, 65), (67, 71), (5, 7, 11, 13)])
def test_sizes_that_torchao_does_not_quantize(shape: tuple[int, ...]) -> None:
    """Small and odd tensors are padded inside the codec; nothing changes dtype."""
    start, grads = drive.start_of(shape), drive.gradients(shape, 6)
    truth = AdamW8bit(start, lr=1e-2, keeps=True)
    held: dict[str, torch.Tensor] = {}
    ours = drive.follow(
        "adamw_8bit",
        start,
        grads,
        watch=lambda o, p: held.update(moments(o, p)),
        hyper={"lr": 1e-2},
        states="int8",
    )
    for g, w in zip(grads, ours, strict=True):
        torch.testing.assert_close(w, truth.step(g), rtol=0, atol=len(grads) * 1e-2 * FP32_CORRECTION)
    size = start.numel()
    for key, name in (("m", "exp_avg"), ("v", "exp_avg_sq")):
        codes, scale = truth.state[key]
        assert torch.equal(held[f"{name}.codes"].view(-1)[:size], codes.view(-1))
        assert torch.equal(held[f"{name}.scale"].view(-1), scale)
        assert held[f"{name}.codes"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("states", "bound"), [("int8", 0.03), ("companded8", 0.03), ("bf16", 0.03), ("int4", 0.3)]
)
def test_trajectory_stays_near_fp32(states: str, bound: float) -> None:
    """Pure noise as gradients, the worst case: about 1.3 % of the distance with 8 bits, 18 % with 4."""
    start, grads = drive.start_of((64, 64)), drive.gradients((64, 64), 10)
    truth = AdamW(start.double(), lr=1e-3)
    for g in grads:
        truth.step(g)
    ours = drive.follow(
        "adamw" if states == "bf16" else "adamw_8bit", start, grads, hyper={"lr": 1e-3}, states=states
    )
    moved = truth.w - start.double()
    error = float((ours[-1].double() - truth.w).norm() / moved.norm())
    assert 0 < error < bound


def test_decoded_moments_follow_the_gradients() -> None:
    start, grads = drive.start_of((64, 64)), drive.gradients((64, 64), 10)
    held: dict[str, torch.Tensor] = {}
    drive.follow(
        "adamw_8bit",
        start,
        grads,
        watch=lambda o, p: held.update(moments(o, p)),
        hyper={"lr": 1e-3},
        states="int8",
    )
    truth = AdamW(start)
    for g in grads:
        truth.step(g)
    m = decode(held["exp_avg.codes"].view(-1), held["exp_avg.scale"], dynamic_map(True))
    assert float((m - truth.m.view(-1)).norm() / truth.m.norm()) < 0.03


@pytest.mark.parametrize("states", ["int8", "companded8", "int4"])
@pytest.mark.parametrize("shape", [(1,), (4095,), (63, 65)])
def test_small_tensors_keep_fp32_moments_as_documented(shape: tuple[int, ...], states: str) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 4)
    plain = drive.follow("adamw", start, grads, hyper={"lr": 1e-2})
    ours = drive.follow("adamw_8bit", start, grads, hyper={"lr": 1e-2}, states=states)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
