"""Products in fp32 where a processor has no instructions for 16 bits, on any that the tests run on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lowmem.memory.trace.tracker import Tracker
from lowmem.models.computing import wide as module
from lowmem.models.computing.wide import Wide, wide
from lowmem.optim.blocks import Dense
from lowmem.optim.engine.cutting import policy
from lowmem.optim.terms import products

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor without instructions for products of 16 bits."""
    for place in (products, module):
        monkeypatch.setattr(place, "native", lambda dtype: dtype not in HALF)


def made(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


CASES: dict[str, tuple[tuple[tuple[int, ...], ...], Callable[..., Tensor]]] = {
    "mm": (((7, 5), (5, 11)), torch.mm),
    "turned": (((11, 5), (7, 5)), lambda a, b: torch.mm(b, a.t())),
    "bmm": (((3, 7, 5), (3, 5, 4)), torch.bmm),
    "addmm": (((4,), (7, 5), (5, 4)), lambda c, a, b: torch.addmm(c, a, b, beta=0.5, alpha=2.0)),
    "without its base": (((4,), (7, 5), (5, 4)), lambda c, a, b: torch.addmm(c / 0, a, b, beta=0)),
    "baddbmm": (((3, 7, 4), (3, 7, 5), (3, 5, 4)), lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5)),
    "no rows": (((0, 5), (5, 4)), torch.mm),
    "nothing to add up": (((3, 0), (0, 4)), torch.mm),
    "no batch": (((0, 3, 5), (0, 5, 4)), torch.bmm),
}


@pytest.mark.parametrize("strip", [1, 12, 1 << 20])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("case", CASES)
def test_product_is_that_of_double_precision_rounded_once(
    monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype, strip: int
) -> None:
    monkeypatch.setattr(products, "STRIP", strip)
    shapes, product = CASES[case]
    given = made(dtype, *shapes)
    exact = product(*(x.double() for x in given))
    with Wide():
        found = product(*given)
    # sums of a few fp32 numbers: only where the exact result is nearly between two may they round otherwise
    step = torch.finfo(dtype).eps * exact.abs().float() / 2 + 1e-6
    assert (found.dtype, found.shape, found.is_contiguous()) == (dtype, exact.shape, True)
    assert bool(((found.double() - exact).abs() <= 1.01 * step).all())


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("dtype", HALF)
def test_gradients_of_a_model_are_those_of_fp32_but_for_rounding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False))
    half = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).to(dtype)
    half.load_state_dict(model.state_dict())
    (x,) = made(torch.float32, (2, 6, 24))
    model(x).square().mean().backward()
    with wide(half) as mode:
        half(x.to(dtype)).float().square().mean().backward()
    assert isinstance(mode, Wide)
    for p, q in zip(half.parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert p.grad.dtype == dtype
        assert float((p.grad.float() - q.grad).norm() / q.grad.norm()) < 16 * torch.finfo(dtype).eps


@pytest.mark.usefixtures("without")
def test_it_is_entered_once_and_only_for_models_that_need_it() -> None:
    half, single = nn.Linear(2, 2, dtype=torch.bfloat16), nn.Linear(2, 2)
    with wide(half) as outer, wide(half) as inner:
        assert isinstance(outer, Wide)
        assert inner is None
    with wide(half) as again:
        assert isinstance(again, Wide)
    with wide(single) as nothing, wide(nn.Linear(2, 2, device="meta", dtype=torch.bfloat16)) as absent:
        assert nothing is None
        assert absent is None
    with wide(single, torch.bfloat16) as cast:  # under autocast
        assert isinstance(cast, Wide)


def test_where_there_are_instructions_it_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "native", lambda dtype: True)
    with wide(nn.Linear(2, 2, dtype=torch.bfloat16)) as nothing:
        assert nothing is None


def test_no_more_than_a_strip_of_the_larger_factor_is_cast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "STRIP", 64 * 16)
    a, b = made(torch.bfloat16, (1024, 16), (16, 16))
    tracker = Tracker()
    tracker.register([a, b], "weights")
    before = tracker.live
    with tracker, Wide():
        tracker.enter("product")
        torch.mm(a, b)
    tracker.stop()
    strip = 4 * 64 * 16
    assert tracker.peak().total - before <= 2 * 1024 * 16 + 4 * b.numel() + 2 * 2 * strip  # two are between


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("turned", [False, True])
def test_an_optimizer_multiplies_gradients_so(monkeypatch: pytest.MonkeyPatch, turned: bool) -> None:
    asked: list[torch.Size] = []
    multiply = products.in_fp32
    monkeypatch.setattr(products, "in_fp32", lambda a, b: asked.append(a.shape) or multiply(a, b))
    g, q = made(torch.bfloat16, (48, 32), (48, 5) if turned else (32, 5))
    seen, wanted = Dense(g), q.double().t() @ g.double() if turned else g.double() @ q.double()
    found = seen.left(q.float()) if turned else seen.right(q.float())
    assert bool(((found.double() - wanted).abs() <= wanted.abs() * 2**-8 + 1e-6).all())
    with policy("cuda"):  # of the sizes of a card, but here; planned for one
        (seen.left if turned else seen.right)(q.float())
        stand_in = Dense(g.to("meta"))
        (stand_in.left if turned else stand_in.right)(q.float().to("meta"))
    assert len(asked) == 2


def test_this_processor_is_asked_once_and_its_answer_is_torchs() -> None:
    assert products.native(torch.float32)
    assert products.native(torch.float64)
    assert products.native(torch.bfloat16) == bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
