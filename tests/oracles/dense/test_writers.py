"""What rounding may and may not do to a weight: writers and the random bits they use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

noise = pytest.importorskip("lowmem.optim.engine.noise")
writers = pytest.importorskip("lowmem.optim.writers")
rule = pytest.importorskip("lowmem.optim.contract")
WRITERS = {
    "nearest": writers.Nearest(),
    "stochastic": writers.Stochastic(),
    "kahan": writers.Kahan(),
    "split": writers.Halves(),
}

HALF = [torch.bfloat16, torch.float16]
BF16_ULP_AT_ONE = 2.0**-7


def hyper(size: int, step: int = 0, lr: float = 1.0, decay: float = 1.0, start: int = 0) -> object:
    cpu = torch.device("cpu")
    return rule.ChunkHyper(
        scalars=torch.zeros(1),
        lr=torch.tensor(lr),
        decay=torch.tensor(decay),
        ok=torch.ones((), dtype=torch.bool),
        finite=torch.ones(size, dtype=torch.bool),
        position=noise.positions(start, size, cpu),
        keys=noise.key_tensor([(0, step, "w", "weight")], cpu),
        streams=("weight",),
    )


def write(
    name: str, w: Tensor, d: Tensor, steps: int, lr: float = 1.0, decay: float = 1.0
) -> tuple[Tensor, dict]:
    writer = writers.select(WRITERS[name], w.dtype)
    state = writer.init(w)
    for step in range(steps):
        hp = hyper(w.numel(), step, lr, decay)
        w, state = writer.write(w, d, state, hp, hp.decay)
    return w, state


def word(size: int, *name: int | str) -> Tensor:
    cpu = torch.device("cpu")
    return noise.bits(noise.positions(0, size, cpu), noise.key_tensor([name], cpu)[0])


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("value", [1.0 + 2.0**-11, -0.3, 3e-6, -1234.567, 2.0**-15 * 1.3])
def test_stochastic_rounding_is_unbiased_and_stays_next_to_the_value(
    dtype: torch.dtype, value: float
) -> None:
    x = torch.full((200_000,), value)
    rounded = noise.round_stochastic(x, dtype, word(x.numel(), "test")).float()
    assert len(rounded.unique()) <= 2
    gap = rounded.max() - rounded.min()
    error = float((rounded.double() - x.double()).mean())
    standard_error = float(gap) / 2 / x.numel() ** 0.5
    assert abs(error) <= 4 * standard_error + float(gap) * 2.0**-13
    if gap > 0:
        below, above = rounded.min(), rounded.max()
        assert below <= x[0] <= above
        assert torch.nextafter(below.to(dtype), above.to(dtype)) == above.to(dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_stochastic_rounding_leaves_what_fits_alone(dtype: torch.dtype) -> None:
    finite = torch.randn(10_000).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.finfo(dtype).max, 6e-8, -1e-5]).to(dtype)
    for x in (finite, special):
        assert torch.equal(noise.round_stochastic(x.float(), dtype, word(x.numel(), "fits")), x)
    nan = torch.full((64,), torch.nan)
    assert noise.round_stochastic(nan, dtype, word(64, "nan")).isnan().all()


def test_random_bits_depend_on_the_name_and_the_index_alone() -> None:
    cpu = torch.device("cpu")
    key = noise.key_tensor([(0, 3, "w", "weight")], cpu)[0]
    whole = noise.bits(noise.positions(0, 1000, cpu), key)
    parts = [noise.bits(noise.positions(i, 250, cpu), key) for i in range(0, 1000, 250)]
    assert torch.equal(whole, torch.cat(parts))
    others = [(1, 3, "w", "weight"), (0, 4, "w", "weight"), (0, 3, "v", "weight"), (0, 3, "w", "moment")]
    for other in others:
        again = noise.bits(noise.positions(0, 1000, cpu), noise.key_tensor([other], cpu)[0])
        assert (again == whole).sum() <= 1


def test_random_bits_are_fair_and_steps_are_independent() -> None:
    size = 1 << 17
    streams = [word(size, 0, step, "w", "weight") for step in range(4)]
    planes = torch.stack([(s >> bit) & 1 for s in streams for bit in range(32)]).double() * 2 - 1
    correlation = planes @ planes.mT / size
    assert planes.mean(1).abs().max() < 5 / size**0.5
    assert correlation.fill_diagonal_(0.0).abs().max() < 5.5 / size**0.5


def test_normal_noise_has_the_moments_of_a_normal() -> None:
    x = noise.gaussian((512, 256), torch.device("cpu"), 0, "basis").double().flatten()
    n = x.numel()
    assert abs(float(x.mean())) < 4 / n**0.5
    assert abs(float(x.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert abs(float(x.pow(4).mean()) - 3) < 4 * (96 / n) ** 0.5


@pytest.mark.parametrize("dtype", HALF)
def test_kahan_adds_up_what_nearest_loses(dtype: torch.dtype) -> None:
    """A thousand additions of 1e-4 to 1."""
    one, step = torch.ones(8, dtype=dtype), torch.full((8,), -1e-4)
    lost, _ = write("nearest", one, step, 1000)
    kept, _ = write("kahan", one, step, 1000)
    ulp = torch.finfo(dtype).eps
    assert torch.equal(lost, one) or dtype == torch.float16
    assert (kept.float() - 1.1).abs().max() <= ulp


def test_split_resolves_eight_more_bits() -> None:
    one, step = torch.ones(8, dtype=torch.bfloat16), torch.full((8,), -1e-4)
    kept, _ = write("split", one, step, 1000)
    assert (kept.float() - 1.1).abs().max() <= BF16_ULP_AT_ONE


@pytest.mark.parametrize("name", ["kahan", "split"])
def test_weight_and_correction_hold_the_step_to_a_hundredth_of_an_ulp(name: str) -> None:
    w = torch.randn(4096).bfloat16()
    d = 0.3 * torch.randn(4096)
    exact = w.float() * 0.999 - 0.01 * d
    new, state = write(name, w, d, 1, lr=0.01, decay=0.999)
    assert torch.equal(new, exact.bfloat16())
    half = 2.0 ** (new.float().abs().log2().floor() - 8)
    rest = state["compensation"].float() if name == "kahan" else state["correction"].float() * half / 128
    assert ((new.float() + rest - exact).abs() / half).max() <= 1 / 100


def test_a_step_of_nothing_leaves_the_bits() -> None:
    w = torch.randn(4096)
    for dtype in [*HALF, torch.float32]:
        for name in ("nearest", "stochastic", "kahan", "split"):
            if (name, dtype) == ("split", torch.float16):
                continue
            new, _ = write(name, w.to(dtype), torch.randn(4096), 3, lr=0.0)
            assert torch.equal(new, w.to(dtype))


def test_a_tiny_step_in_bf16_is_realised_by_stochastic_rounding_alone() -> None:
    """5e-7 on weights of standard deviation 0.02, a million elements: MeZO's own setting."""
    size = 1 << 20
    g = torch.Generator().manual_seed(0)
    w = (0.02 * torch.randn(size, generator=g)).bfloat16()
    z = torch.randn(size, generator=g)
    gain = {}
    for name in ("stochastic", "nearest"):
        new, _ = write(name, w, z, 1, lr=5e-7)
        moved = (w.double() - new.double()) @ z.double()
        gain[name] = float(moved / (5e-7 * z.double().square().sum()))
    assert 0.97 <= gain["stochastic"] <= 1.03
    assert gain["nearest"] < 0.05


def test_decay_in_bf16_is_not_lost() -> None:
    """1 - 1e-4 rounds to 1 in bf16; a thousand such steps are worth a tenth of the weight."""
    w = torch.ones(4096, dtype=torch.bfloat16)
    for name in ("stochastic", "kahan", "split"):
        new, _ = write(name, w, torch.zeros(4096), 1000, decay=1 - 1e-4)
        assert abs(float(new.float().mean()) - 0.9048) < 2e-3
    new, _ = write("nearest", w, torch.zeros(4096), 10, decay=1 - 1e-4)
    assert torch.equal(new, w)
