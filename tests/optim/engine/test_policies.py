"""The policy of a card, named on a CPU: the same bits as the CPU's own, in few launches and one upload."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.memory.count import workspace_bytes
from lowmem.memory.footprint import _compiled, footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.replica import Parameter
from lowmem.optim.blocks import Dense
from lowmem.optim.engine import chunks, cutting, passes
from lowmem.optim.engine.cutting import policy

VECTORS = {"bias": (77,), "norm.weight": (512,), "one": (1,), "long": (5003,)}
SHAPES: dict[str, tuple[int, ...]] = {"odd.weight": (1030, 1030), "wide.weight": (96, 512), **VECTORS}
BF16, FP32 = torch.bfloat16, torch.float32
CASES: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("adamw", {}, FP32),
    ("adamw", {"states": "int8", "modifiers": "cautious"}, BF16),
    ("adamw", {"writer": "kahan"}, BF16),
    ("galore", {"rank": 8, "update_proj_gap": 2}, FP32),
    ("galore", {"rank": 8, "update_proj_gap": 2, "states": "int8"}, BF16),
    ("galore", {"rank": 8, "update_proj_gap": 2, "projector": "dct", "on_refresh": "rotate"}, BF16),
    ("fira", {"rank": 8, "update_proj_gap": 2}, BF16),
    ("adafactor", {"beta1": 0.9}, BF16),
    ("microadam", {}, BF16),
    ("dion", {"rank": 8, "states": "int8"}, BF16),
]

COMPILED: list[tuple[str, dict[str, Any], torch.dtype]] = [
    ("adamw", {"states": "int8"}, BF16),
    ("galore", {"rank": 8, "update_proj_gap": 2}, BF16),
]


def draw(shape: tuple[int, ...], *seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(hash(seed) % 2**31))


def start(
    name: str, options: dict[str, Any], dtype: torch.dtype, **more: Any
) -> tuple[Any, list[nn.Parameter]]:
    params = [nn.Parameter(draw(shape, 1, i).to(dtype)) for i, shape in enumerate(SHAPES.values())]
    named = list(zip(SHAPES, params, strict=True))
    groups = [
        {"params": [(n, p) for n, p in named if p.dim() == dim], "role": role, "weight_decay": 0.1 * dim}
        for dim, role in ((2, "matrix"), (1, "vector"))
    ]
    return lowmem.LowMemOptimizer(groups, lowmem.create(name, **options), lr=1e-2, **more), params


def advance(optimizer: Any, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (step + 1)
        for i, p in enumerate(params):
            p.grad = draw(tuple(p.shape), 2 + step, i).to(p.dtype)
            if step == 1 and i in (1, 2):
                p.grad.view(-1)[5] = float("nan")
        optimizer.step()


def left(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    held = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [*(p.detach() for p in params), *held, torch.tensor(optimizer.nonfinite())]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


@pytest.mark.parametrize(("name", "options", "dtype"), CASES, ids=str)
def test_eager_steps_are_the_same_bits_and_resume_across(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Three steps by one policy; by the other; and by one, saved and loaded, then by the other."""
    whole, params = start(name, options, dtype)
    advance(whole, params, range(3))
    with policy("cuda"):
        other, moved = start(name, options, dtype)
        advance(other, moved, range(2))
        file = io.BytesIO()
        torch.save(other.state_dict(), file)
        file.seek(0)
        third, copied = start(name, options, dtype)
        for p, q in zip(copied, moved, strict=True):
            p.data.copy_(q)
        advance(other, moved, range(2, 3))
    assert_same(left(whole, params), left(other, moved))
    if name == "galore":
        assert any(key[-3] for key in other.chunks._kernels)  # small ones stepped together
    third.load_state_dict(torch.load(file))
    advance(third, copied, range(2, 3))
    assert_same(left(whole, params)[:-1], left(third, copied)[:-1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize(("name", "options", "dtype"), COMPILED, ids=str)
def test_compiled_steps_are_the_same_bits(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    one, params = start(name, options, dtype, compile="on")
    advance(one, params, range(3))
    with policy("cuda"):
        other, moved = start(name, options, dtype, compile="on")
        advance(other, moved, range(3))
    assert_same(left(one, params), left(other, moved))


@pytest.mark.parametrize(
    "name",
    [
        "adamw_8bit",
        "galore",
        "fira",
        "dct",
        "online_subspace",
        "adafactor",
        "muon",
        "ada_muon",
        "swan",
        "dion",
    ],
)
def test_a_card_is_planned_by_its_own_pieces_inside_the_bound(name: str) -> None:
    """Compiled or not; what a refresh takes beside it is that of a basis."""
    strategy, shape = lowmem.create(name), (4096, 11008)
    bound = strategy.rules["matrix"].scratch(shape)
    eager = [workspace_bytes(strategy, shape, BF16, "matrix", False, device) for device in ("cpu", "cuda")]
    assert max(eager) <= bound
    planned = {
        device: _compiled(strategy, shape, BF16, "matrix", device, False).peak for device in ("cpu", "cuda")
    }
    assert planned["cuda"] <= bound + 12 * 4096 * 128
    if name == "galore":  # the half of a product, where the CPU makes a chunk of it
        assert planned["cuda"] - planned["cpu"] > 32 << 20


def test_tensors_that_step_together_are_planned_together() -> None:
    """A card holds copies of what it steps at once; a CPU steps one after the other."""
    small = [Parameter(f"norm{i}", (4096,), FP32, "vector") for i in range(300)]
    strategy = lowmem.create("adamw")
    run = Run(compile="on")
    card, cpu = (footprint(strategy, small, replace(run, device=d)) for d in ("cuda", "cpu"))
    copies = 300 * 4096 * 4 * 4  # weights, gradients and two moments
    assert cpu.together == 0
    assert copies <= card.together == card.worst <= 64 << 20


def assert_close_to_blocks(
    name: str, options: dict[str, Any], made: int, monkeypatch: pytest.MonkeyPatch, named: str = "cuda"
) -> None:
    """Kernels that are not compiled take whole passes, of which so many bytes may be made."""
    blocks, params = start(name, options, FP32)
    advance(blocks, params, range(3))
    calls: list[int] = []

    def as_it_is(step: Any) -> Any:
        return lambda *tensors: (calls.append(1), step(*tensors))[1]

    monkeypatch.setattr(passes, "compiled", as_it_is)
    monkeypatch.setattr(chunks, "compiled", lambda step: step)
    sizes = replace(cutting.POLICIES[named], made=made, passes=0)
    monkeypatch.setitem(cutting.POLICIES, named, sizes)
    with policy(named):
        whole, moved = start(name, options, FP32, compile="on")
        advance(whole, moved, range(3))
    assert calls
    for a, b in zip(left(blocks, params), left(whole, moved), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


SUMMED: list[tuple[str, dict[str, Any]]] = [
    ("adafactor", {"scale_parameter": True}),
    ("came", {}),
    ("adam_mini", {}),
    ("fira", {"rank": 8, "update_proj_gap": 2}),
    ("apollo", {"rank": 8, "update_proj_gap": 2}),
]


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        *((*one, named) for one in SUMMED for named in ("cpu", "cuda")),
        ("frugal", {"rank": 8, "update_proj_gap": 2, "projector": "power"}, "cuda"),
    ],
    ids=str,
)
def test_passes_at_once_are_those_by_blocks(
    name: str, options: dict[str, Any], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What compiled kernels compute, uncompiled: sums of all rows at once differ from those of blocks in the
    last bits alone, products are made in pieces, and a gradient that is not finite is refused alike."""
    assert_close_to_blocks(name, options, 1 << 20, monkeypatch, named)


def test_a_cpu_compiles_the_passes_of_large_matrices_alone() -> None:
    """A kernel takes a second to compile, and saves some milliseconds of each step that is long."""
    frame = passes.Passes(compile=True)
    least = cutting.POLICIES["cpu"].passes
    for rows, cols, at_once in ((least // 256, 256, True), (least // 256 - 1, 256, False)):
        assert (frame.leaf(Dense(torch.zeros(rows, cols))) is not None) == at_once
    with policy("cuda"):
        assert frame.leaf(Dense(torch.zeros(2, 2))) is not None
    assert passes.Passes(compile=False).leaf(Dense(torch.zeros(least // 256, 256))) is None


SMALL = {"odd.weight": (130, 130), "wide.weight": (64, 256), "tall.weight": (256, 96), "bias": (77,)}
MATRICES: list[tuple[str, dict[str, Any]]] = [
    ("muon", {}),
    ("muon", {"states": "bf16"}),
    ("muon", {"states": "int8"}),
    ("muon_8bit", {}),
    ("dion", {"rank": 8}),
    ("swan", {}),
    ("sinkgd", {}),
    ("scale", {}),
    ("auon", {}),
]


@pytest.mark.parametrize(("name", "options"), MATRICES, ids=str)
def test_products_of_what_is_made_are_those_by_blocks(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In strips and panels of a few rows, here, which a card has in millions of elements."""
    monkeypatch.setattr(sys.modules[__name__], "SHAPES", SMALL)
    monkeypatch.setattr(
        passes, "COLUMNS", 256 if name == "muon_8bit" or options.get("states") == "int8" else 32
    )
    assert_close_to_blocks(name, options, 1 << 15, monkeypatch)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize(
    "name",
    ["adafactor", *(pytest.param(x, marks=pytest.mark.thorough) for x in ("fira", "stable_spam"))],
)
def test_passes_compile_to_what_they_say(name: str) -> None:
    rank = {"rank": 8, "update_proj_gap": 2} if name == "fira" else {}
    blocks, params = start(name, rank, FP32)
    advance(blocks, params, range(3))
    with policy("cuda"):
        whole, moved = start(name, rank, FP32, compile="on")
        advance(whole, moved, range(3))
    kernels = whole.chunks.passes._kernels.values()
    assert kernels
    assert all(kernel._order for kernel in kernels)  # and are called directly
    for a, b in zip(left(blocks, params), left(whole, moved), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
def test_a_tensor_of_as_many_rows_as_ages_are_in_the_table_is_one_of_many() -> None:
    """And the table grows in the middle of the run: kernels are called directly before and after."""
    shapes = {"a": (512, 512), "b": (512, 1376), "c": (4, 1 << 16)}
    generator = torch.Generator().manual_seed(0)
    first = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    left_by = []
    for named in ("cpu", "cuda"):
        weights = {name: nn.Parameter(w.clone()) for name, w in first.items()}
        with policy(named):
            optimizer = lowmem.LowMemOptimizer(list(weights.items()), lowmem.create("adamw"), compile="on")
            for step in (0, 1, 1022, 1023, 1024):
                optimizer.param_groups[0]["step"] = step
                for w in weights.values():
                    w.grad = first["a"].mean() + 0.01 * w.detach()
                optimizer.step()
        left_by.append(weights)
        kernels = optimizer.chunks._kernels.values()
        assert all(one._order for kernel in kernels for one in (kernel, *kernel._others))
    for name in shapes:
        torch.testing.assert_close(left_by[0][name], left_by[1][name], rtol=0, atol=0)


LARGE = {"a": (512, 512), "b": (512, 1376), "c": (1376, 512), "lora": (16, 512), "norm": (512,)}
"""Three that a card steps alone, of which the first has 1024 rows of 256; and two that step together."""


def by_gradient() -> list[str]:
    found = {name: lowmem.create(name) for name in lowmem.available()}
    own_loop = ("momo", "momo_adam", "sophia")
    return [name for name, of in found.items() if of.source.needs_autograd and name not in own_loop]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize("name", by_gradient())
def test_every_method_compiles_for_a_card_and_steps_as_ever(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SHAPES", LARGE)
    gap = dict(lowmem.create(name).options).get("update_proj_gap", 1)
    options = {"update_proj_gap": 2} if gap > 2 else {}
    eager, params = start(name, options, FP32, compile="off")
    advance(eager, params, range(4))
    with policy("cuda"):
        card, moved = start(name, options, FP32, compile="on")
        advance(card, moved, range(4))
    begun = start(name, options, FP32)[1]
    for p, q, first in zip(params, moved, begun, strict=True):
        assert (p - q).norm() <= 0.02 * (p - first).norm()  # codes at a tie fall to either side


def test_what_a_card_skips_is_counted_by_rows_and_its_ages_move_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second tensor has more rows than the first; the third is a row and a bit."""
    monkeypatch.setattr(chunks, "compiled", lambda step: step)
    sizes = {"a": 1 << 18, "b": 1 << 19, "c": (1 << 18) + 77}
    weights = {name: nn.Parameter(torch.ones(size)) for name, size in sizes.items()}
    with policy("cuda"):
        optimizer = lowmem.LowMemOptimizer(list(weights.items()), lowmem.create("adamw"), compile="on")
        for step in range(3):
            for i, w in enumerate(weights.values(), 1):
                w.grad = torch.ones_like(w)
                w.grad[-i:] = math.nan if step < 2 else 1.0
            optimizer.step()
        assert optimizer.nonfinite() == 2 * (1 + 2 + 3)
    assert [int(optimizer.state[w]["age"]) for w in weights.values()] == [3, 3, 3]
    assert optimizer.chunks.skipped.rows == (1 << 19) // 256
