"""How moments are held, against plain references and against what the formats promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.oracles.dense import reference_companded, reference_int8

codecs = pytest.importorskip("lowmem.optim.codecs.blockwise")
dynamic = pytest.importorskip("lowmem.optim.codecs.dynamic")

SIZES = [1, 2, 31, 32, 33, 127, 128, 255, 256, 257, 641, 5000]
EIGHT_BIT = ["int8", "companded8"]


def padded(x: Tensor, grain: int) -> Tensor:
    return torch.cat([x, x.new_zeros(-x.numel() % grain)])


def held(states: str, x: Tensor, signed: bool) -> tuple[dict[str, Tensor], Tensor]:
    """What the codec holds of x, and what it gives back."""
    codec = codecs.codec(states, signed=signed, stream="m")
    constants = codec.shared(x)
    state = codec.encode(padded(x.reshape(-1), codec.grain), None, constants)
    return state, codec.decode(state, constants)[: x.numel()]


def sample(size: int, signed: bool, seed: int = 0) -> Tensor:
    """Values over many decades."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=g) * 10 ** (-4 * torch.rand(size, generator=g))
    return x if signed else x.square()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_maps_are_torchaos_and_the_papers(
    torchao_record: dict[str, Any], signed: bool, bits: int
) -> None:
    table = dynamic.dynamic_map(bits, signed)
    if bits == 8:
        assert torch.equal(table, reference_int8.dynamic_map(signed))
        assert torch.equal(table, torchao_record["maps"][str(signed)])
        return
    mirrored = [0.8875, 0.6625, 0.4375, 0.2125, 0.0775, 0.0325, 0.0055]
    expected = [-x for x in mirrored] + [0.0] + mirrored[::-1] + [1.0]
    expected = expected if signed else [k / 16 for k in range(1, 17)]
    torch.testing.assert_close(table, torch.tensor(expected))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_int8_codes_and_scales_are_the_references(size: int, signed: bool) -> None:
    x = sample(size, signed)
    state, _ = held("int8", x, signed)
    codes, scale = reference_int8.encode(x, reference_int8.dynamic_map(signed))
    kept = codes if signed else reference_int8.keep_above_zero(x, codes)
    assert torch.equal(state["codes"][:size], kept)
    assert torch.equal(state["scale"], scale)


@pytest.mark.parametrize("signed", [True, False])
def test_int8_finds_the_entry_next_to_every_threshold(signed: bool) -> None:
    table = reference_int8.dynamic_map(signed)
    edges = (table[:-1] + table[1:]) / 2
    steps = [torch.nextafter(edges, torch.tensor(x)) for x in (-2.0, 2.0)]
    x = torch.cat([edges, *steps, table, torch.ones(1)])
    x = torch.cat([torch.cat([part, torch.ones(1)]) for part in x.split(255)])  # every block has scale 1
    state, _ = held("int8", x, signed)
    codes, _ = reference_int8.encode(x, table)
    kept = codes if signed else reference_int8.keep_above_zero(x, codes)
    assert torch.equal(state["codes"][: x.numel()], kept)
    assert (kept != codes).sum() == (0 if signed else 1)  # just below the least threshold


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_companded_codes_are_the_references(size: int, signed: bool) -> None:
    x = sample(size, signed)
    state, back = held("companded8", x, signed)
    codes, scale = reference_companded.encode(x, signed, torch.bfloat16)
    assert torch.equal(state["scale"], scale)
    distance = (state["codes"][:size].float() - codes).abs()
    assert distance.max() <= 1  # a value between two codes may fall either way by rounding
    assert (distance > 0).sum() <= 1 + size // 500
    bound = reference_companded.worst_error(scale, signed).repeat_interleave(32)[:size]
    assert ((back - x).abs() <= bound).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_int4_keeps_its_error_bound_and_packs_two_codes_a_byte(size: int, signed: bool) -> None:
    x = sample(size, signed)
    state, back = held("int4", x, signed)
    scale = state["scale"].repeat_interleave(128)[:size]
    gap = dynamic.dynamic_map(4, signed).diff().max() / 2
    # the signed map ends at -0.8875, the unsigned one at 1/16
    worst = max(float(gap), 0.1125 if signed else 0.0625)
    assert ((back - x).abs() <= scale * (worst + 1e-6)).all()
    table = dynamic.dynamic_map(4, signed)
    codes = torch.stack((state["codes"] >> 4, state["codes"] & 15), 1).view(-1)[:size].int()
    torch.testing.assert_close(table[codes] * scale, back, rtol=1e-6, atol=0.0)
    nearest = (x / scale).unsqueeze(1).sub(table).abs().amin(1)
    torch.testing.assert_close((back / scale - x / scale).abs(), nearest, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize(
    ("decade", "signed_error", "unsigned_error"),
    [
        (0, 0.062, 0.033),
        (1, 0.110, 0.062),
        (2, 0.180, 0.110),
        (3, 0.276, 0.180),
        (4, 0.466, 0.276),
        (5, 0.711, 0.466),
    ],
)
def test_int8_error_by_decade_is_the_published_one(
    decade: int, signed_error: float, unsigned_error: float
) -> None:
    y = torch.logspace(-decade - 1, -decade, 20_001)[1:-1]
    for signed, bound in ((True, signed_error), (False, unsigned_error)):
        x = torch.cat([torch.cat([part, torch.ones(1)]) for part in y.split(255)])
        _, back = held("int8", x, signed)
        inside = x < 1.0
        error = ((back - x).abs() / x)[inside].max()
        assert float(error) <= bound + 5e-4
        assert float(error) >= bound * 0.9  # the bound is that of this very format


@pytest.mark.parametrize("states", EIGHT_BIT)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_do_not_change_with_a_power_of_two(states: str, signed: bool) -> None:
    x = sample(1000, signed)
    state, _ = held(states, x, signed)
    power = 4.0  # its root is a power of two as well
    scaled, _ = held(states, power * x, signed)
    assert torch.equal(state["codes"], scaled["codes"])
    by = power if signed or states == "int8" else power**0.5
    assert torch.equal(by * state["scale"], scaled["scale"])


@pytest.mark.parametrize("states", ["fp32", "int8", "int4", "companded8"])
@pytest.mark.parametrize("signed", [True, False])
def test_zero_blocks_stay_zero_and_finite(states: str, signed: bool) -> None:
    x = torch.zeros(512)
    x[300:] = sample(212, signed)
    _, back = held(states, x, signed)
    assert torch.isfinite(back).all()
    ceiling = 1e-13 if (states, signed) == ("int4", False) else 0.0  # that map has no zero, but a tiny scale
    assert back[:128].abs().max() <= ceiling


@pytest.mark.parametrize("states", ["int8", "int4", "companded8"])
def test_fresh_state_decodes_to_zero(states: str) -> None:
    for signed in (True, False):
        codec = codecs.codec(states, signed=signed, stream="m")
        x = torch.empty(codec.grain * 2)
        assert codec.decode(codec.init(x), codec.shared(x)).abs().max() == 0.0


@pytest.mark.parametrize("states", ["int8", "int4", "companded8"])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-38, 1e-30, 1e-12, 1e12, 1e30, 3e38])
def test_extreme_magnitudes_stay_finite(states: str, signed: bool, size: float) -> None:
    """A moment that decays under zero gradients walks through every magnitude down to the last denormal."""
    x = torch.tensor([1.0, 0.5, 0.0, 0.25]).repeat(64) * size
    _, back = held(states, x, signed)
    assert torch.isfinite(back).all()
    assert (back.abs() <= 1.01 * size + 1e-12).all()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("states", ["int8", "companded8"])
def test_encoding_again_what_was_decoded_keeps_positive_blocks(states: str, signed: bool) -> None:
    """Idempotent where the largest element is positive and fits the scale, so that it comes back exactly."""
    x = sample(1024, signed)
    x[::32] = 64.0
    state, back = held(states, x, signed)
    again, _ = held(states, back, signed)
    assert torch.equal(state["codes"], again["codes"])


def test_companded_codes_are_monotone_in_the_value() -> None:
    for signed, low in ((True, -1.0), (False, 0.0)):
        x = torch.linspace(low, 1.0, 31)
        state, _ = held("companded8", torch.cat([x, torch.ones(1)]), signed)
        codes = state["codes"].int()
        assert (codes.diff() >= 0).all()
        assert int(codes[-1]) == (127 if signed else 255)
