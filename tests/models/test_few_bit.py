"""Activation functions that keep a few bits: the best levels, and the right bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.models.few_bit import FewBit, keep_few_bits_, packed, steps, table, unpacked
from tests.memory import families


def test_steps_are_the_best_of_all_partitions() -> None:
    """Against every way to cut nine numbers into three pieces."""
    values = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def error(cuts: tuple[int, ...]) -> float:
        edges = [0, *cuts, 9]
        return sum(
            float((values[a:b] - values[a:b].mean()).square().sum()) for a, b in itertools.pairwise(edges)
        )

    every = [cuts for k in range(3) for cuts in itertools.combinations(range(1, 9), k)]
    assert error(tuple(steps(values, 3)[1:])) == pytest.approx(min(map(error, every)))


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_numbers_come_back_from_their_bits(bits: int) -> None:
    codes = torch.randint(2**bits, (101,), generator=torch.Generator().manual_seed(bits))
    held = packed(codes, bits)
    assert held.numel() == 13 * bits
    assert torch.equal(unpacked(held, bits, 101), codes)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        module(x)
    return sum(kept.values())


def test_the_output_is_exact_and_the_gradient_near_with_an_eighth_of_the_bytes() -> None:
    """More bits are nearer; of a piecewise linear function one bit loses nothing."""
    x = 2 * torch.randn(64, 33, generator=torch.Generator().manual_seed(0))
    errors = []
    for bits in (2, 4):
        a, b = (x.clone().requires_grad_() for _ in range(2))
        few, plain = FewBit(nn.GELU(), bits), nn.GELU()
        assert torch.equal(few(a), plain(b))
        few(a).square().sum().backward()
        plain(b).square().sum().backward()
        errors.append(float((a.grad - b.grad).norm() / b.grad.norm()))
        levels = 4 * 2**bits
        assert saved_bytes(few, a) == 64 * 33 * bits // 8 + levels
        assert saved_bytes(plain, a) == 64 * 33 * 4
    assert errors[1] < errors[0] / 2 < 0.1
    a, b = (x.clone().requires_grad_() for _ in range(2))
    FewBit(nn.ReLU(), 1)(a).sum().backward()
    nn.ReLU()(b).sum().backward()
    far = x.abs() > 0.02  # a border lies between two points of the grid
    assert torch.equal(a.grad[far], b.grad[far])
    assert table(nn.ReLU(), 1)[1] == pytest.approx((0.0, 1.0), abs=1e-2)


def test_a_language_model_has_near_gradients_and_the_same_checkpoint() -> None:
    model, plain = families.model("gpt2"), families.model("gpt2")
    names = set(model.state_dict())
    assert keep_few_bits_(model, 4) > 0
    assert set(model.state_dict()) == names
    ids = torch.randint(5, 60, (2, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for one in (model, plain):
        one.eval()(input_ids=ids, labels=ids).loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in one.parameters() if p.grad is not None]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.05
    with pytest.raises(UserError, match="no modules of their own"):
        keep_few_bits_(nn.Linear(2, 2), 4)
