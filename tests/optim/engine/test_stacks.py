"""A stack of matrices is so many matrices: to the bit where a rule needs the matrix, and in bytes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.contract import is_pointwise
from lowmem.optim.release import release
from tests.contract.runs import from_file, same, to_file
from tests.enrolled import on_any_model

SHAPE = (3, 10, 16)
GAP = 3
LOW = {"rank": 4, "update_proj_gap": GAP}
CASES: list[tuple[str, dict[str, Any]]] = [
    *(("galore", {**LOW, "states": s}) for s in ("fp32", "bf16", "int8", "int4", "companded8")),
    ("galore", {**LOW, "rule": "adafactor"}),
    ("galore", {**LOW, "projector": "svd", "on_refresh": "rotate", "proj_type": "right"}),
    *(("frugal", {"projector": s, "update_proj_gap": GAP}) for s in ("columns", "randk", "svd")),
    ("adafactor", {}),
    ("adafactor", {"beta1": 0.9, "scale_parameter": True}),
]
every_case = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=lambda x: x if isinstance(x, str) else str(x)
)


def start(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def gradient(step: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(9 + step)).to(dtype)


def of_stack(name: str, options: dict[str, Any], w: Tensor) -> tuple[Any, nn.Parameter]:
    p = nn.Parameter(w.clone())
    return lowmem.optimizer([("0.w", p)], name, lr=1e-2, weight_decay=0.1, **options), p


@pytest.mark.parametrize("writer", ["stochastic", "kahan", "split"])
@every_case
def test_a_stack_is_stepped_matrix_by_matrix(name: str, options: dict[str, Any], writer: str) -> None:
    dtype = torch.float32 if writer == "stochastic" else torch.bfloat16
    options = {**options, "writer": writer}
    optimizer, p = of_stack(name, options, start(dtype))
    apart = [nn.Parameter(w) for w in start(dtype)]
    others = lowmem.optimizer(
        [(f"0.w.{i}", q) for i, q in enumerate(apart)], name, lr=1e-2, weight_decay=0.1, **options
    )
    for step in range(2 * GAP + 1):
        p.grad = gradient(step, dtype)
        for q, g in zip(apart, gradient(step, dtype), strict=True):
            q.grad = g.clone()
        optimizer.step()
        others.step()
    # a mean's last bit depends on where in memory the row starts
    rounding = 1e-6 if name == "adafactor" else 0.0
    compare = {"rtol": rounding, "atol": 1e-3 * rounding}
    torch.testing.assert_close(p.detach(), torch.stack([q.detach() for q in apart]), **compare)
    for key, value in optimizer.state[p].items():
        each = [others.state[q][key].reshape(-1) for q in apart]
        torch.testing.assert_close(value.reshape(-1), torch.cat(each), **compare)
    assert optimizer.state_bytes() == others.state_bytes()


@every_case
def test_planned_bytes_are_those_of_its_matrices(name: str, options: dict[str, Any]) -> None:
    strategy = lowmem.create(name, **options)
    one = lowmem.state_bytes(strategy, SHAPE[1:])
    assert lowmem.state_bytes(strategy, SHAPE) == SHAPE[0] * one
    optimizer, p = of_stack(name, options, start())
    optimizer.init_state()
    assert sum(t.nbytes for t in optimizer.state[p].values()) == SHAPE[0] * one


@every_case
def test_a_stack_resumes_exactly(name: str, options: dict[str, Any]) -> None:
    optimizer, p = of_stack(name, options, start())
    other, q = of_stack(name, options, start())
    for step in range(3 * GAP):
        if step == GAP + 1:
            other.load_state_dict(from_file(to_file(optimizer.state_dict())))
            q.data.copy_(p.detach())
        p.grad = gradient(step)
        optimizer.step()
        if step > GAP:
            q.grad = gradient(step)
            other.step()
    assert torch.equal(p.detach(), q.detach())
    strides = {k: v.stride() for k, v in optimizer.state[p].items()}
    assert {k: v.stride() for k, v in other.state[q].items()} == strides
    assert same(dict(other.state[q]), dict(optimizer.state[p]))


@every_case
def test_layout_of_a_stack_does_not_matter(name: str, options: dict[str, Any]) -> None:
    optimizer, p = of_stack(name, options, start())
    turned = nn.Parameter(start().transpose(1, 2).contiguous().transpose(1, 2))
    other = lowmem.optimizer([("0.w", turned)], name, lr=1e-2, weight_decay=0.1, **options)
    assert not turned.is_contiguous()
    for step in range(GAP + 1):
        p.grad, turned.grad = gradient(step), gradient(step)
        optimizer.step()
        other.step()
    torch.testing.assert_close(turned.detach(), p.detach(), rtol=2e-2, atol=2e-3)


def test_a_bad_gradient_in_one_matrix_stays_there() -> None:
    optimizer, p = of_stack("galore", LOW, start())
    p.grad = gradient(0)
    p.grad[1, 2, 3] = torch.nan
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(p.detach(), start(), strict=True)]
    assert moved == [True, False, True]
    assert optimizer.nonfinite() == SHAPE[1] * SHAPE[2]


def test_elementwise_rules_step_a_stack_as_a_whole() -> None:
    for name in on_any_model():
        strategy = lowmem.create(name)
        rule = strategy.rules["matrix"]
        if is_pointwise(rule) and not rule.measures and strategy.source.needs_autograd:
            optimizer, p = of_stack(name, {}, start())
            flat = nn.Parameter(start().flatten(1))
            other = lowmem.optimizer([("0.w", flat)], name, lr=1e-2, weight_decay=0.1)
            for step in range(2):
                p.grad, flat.grad = gradient(step), gradient(step).flatten(1)
                optimizer.step()
                other.step()
            assert torch.equal(p.detach().flatten(1), flat.detach())


def test_a_kernel_of_one_dimension_is_one_matrix() -> None:
    conv = nn.Conv1d(6, 8, 3, bias=False)
    optimizer = lowmem.optimizer(conv, "galore", rank=4)
    flat = nn.Parameter(conv.weight.detach().flatten(1).clone())
    other = lowmem.optimizer([("weight", flat)], "galore", rank=4)
    conv.weight.grad = torch.randn(8, 6, 3, generator=torch.Generator().manual_seed(1))
    flat.grad = conv.weight.grad.flatten(1)
    optimizer.step()
    other.step()
    # the product is added at once to a matrix, by blocks to a kernel: the last bit may differ
    torch.testing.assert_close(conv.weight.detach().flatten(1), flat.detach(), rtol=1e-6, atol=1e-8)
    planned = lowmem.state_bytes(optimizer.strategy, (8, 6, 3), role="convolution")
    assert planned == sum(t.nbytes for t in optimizer.state[conv.weight].values())


@pytest.mark.parametrize("steps", [1, 2])
def test_a_released_stack_takes_the_ordinary_step(steps: int) -> None:
    """Over several micro-batches as well: some of its matrices may be refreshed, and others not."""
    optimizer, p = of_stack("galore", LOW, start())
    other, q = of_stack("galore", LOW, start())
    handle = release(optimizer, accumulation_steps=steps)
    for step in range(2 * GAP):
        for micro in range(steps):
            handle.sync = micro == steps - 1
            g = gradient(10 * step + micro)
            (p * g).sum().backward()
            (q * g).sum().backward()
        assert p.grad is None
        optimizer.step()
        other.step()
        other.zero_grad()
    assert torch.equal(p.detach(), q.detach())


def test_copies_and_refusals() -> None:
    optimizer, p = of_stack("frugal", {"update_proj_gap": GAP}, start())
    p.grad = gradient(0)
    optimizer.step()
    other = copy.deepcopy(optimizer)
    q = other.param_groups[0]["params"][0]
    p.grad, q.grad = gradient(1), gradient(1)
    optimizer.step()
    other.step()
    assert torch.equal(p.detach(), q.detach())
    fewer, _ = of_stack("frugal", {"update_proj_gap": GAP}, start()[:2])
    with pytest.raises(UserError, match="does not fit"):
        fewer.load_state_dict(optimizer.state_dict())
