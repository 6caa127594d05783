"""Slopes by tangents: the true gradient along a direction, exact, and refused where there are none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowmem
from lowmem.errors import UserError
from lowmem.optim.source import Query
from lowmem.sources import ForwardGradient
from tests.sources import test_spsa as probed

READERS = [probed.Tied, probed.ReadsTheEmbedding, probed.Attention, probed.Nested, probed.CallsForward]


def evaluated(model: nn.Module, loss: Any, **options: Any) -> tuple[Tensor, Any]:
    params = list(model.named_parameters())
    return ForwardGradient(**options).backward(params, loss, model=model, query=Query(0, 3))


@pytest.mark.parametrize("kind", READERS)
def test_the_slope_is_the_gradients_whoever_reads_a_weight(kind: type[nn.Module]) -> None:
    """Against backpropagation, in dropout's absence; every bit and every mode stays."""
    model = probed.made(kind).train()
    before = probed.bits(model)
    loss, (slope, other) = evaluated(model, lambda: probed.loss_of(model), queries=2)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(module.training for module in model.modules())
    assert not loss.requires_grad
    truth = probed.loss_of(model.eval())
    assert float(loss) == pytest.approx(float(truth.detach()), rel=1e-5)
    truth.backward()
    for c, z in (slope, other):
        along = [float((z.draw(n, p, 0, p.numel()).view(p.shape) * p.grad).sum()) for n, p in
                 model.named_parameters()]  # fmt: skip
        assert 2 * c == pytest.approx(sum(along), rel=1e-3, abs=1e-5)


def test_no_graph_is_kept_and_16_bit_weights_keep_their_bits() -> None:
    model = probed.made(probed.Plain, torch.bfloat16)
    before, saved = probed.bits(model), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        evaluated(model, lambda: probed.loss_of(model))
    assert saved == []
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())


class _Opaque(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_what_has_no_tangent_is_refused_by_name_and_leaves_the_weights() -> None:
    model = probed.made(probed.Plain)
    before = probed.bits(model)
    ids, target = probed.batch()
    for loss, said in (
        (lambda: _Opaque.apply(model(ids)).sum(), "use mezo"),
        (lambda: (model(ids).argmax(-1) == target).float().mean(), "made of the weights by arithmetic"),
        (lambda: torch.tensor(float(model(ids).sum())), "made of the weights by arithmetic"),
        (lambda: model(ids), "one number"),
    ):
        with pytest.raises(UserError, match=said) as refused:
            evaluated(model, loss)
        assert "\n" not in str(refused.value)
        assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert F.mse_loss(model(ids), model(ids)).isfinite()  # no tangent is left behind


def test_it_is_mezo_without_a_radius() -> None:
    """On a quadratic, where the difference quotient is exact too, both take the same step."""
    w = torch.linspace(-1, 1, 12).view(3, 4)
    taken = {}
    for name in ("mezo", "forward_gradient"):
        p = nn.Parameter(w.clone())
        optimizer = lowmem.optimizer([("w", p)], name, lr=0.1)
        for _ in range(5):
            optimizer.backward(lambda p=p: (p.double() - 3).square().sum())
            optimizer.step()
        taken[name] = p.detach()
    torch.testing.assert_close(taken["mezo"], taken["forward_gradient"], rtol=1e-3, atol=1e-3)
    assert not torch.equal(taken["mezo"], w)
