"""FISH mask: masked AdamW in double precision, and what must be true of a mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.errors import UserError
from lowmem.optim.blocks import Dense
from lowmem.optim.projectors.fisher import largest
from tests.oracles import drive
from tests.oracles.dense.reference_adamw import AdamW

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def mask_of(g: Tensor, count: int) -> Tensor:
    """The count largest by size, the first of those of one size."""
    mask = torch.zeros(g.numel(), dtype=torch.bool)
    mask[g.abs().view(-1).argsort(descending=True, stable=True)[:count]] = True
    return mask.view_as(g)


@pytest.mark.parametrize(("shape", "role"), [((23, 40), "matrix"), ((31,), "other"), ((19, 12), "embedding")])
def test_chosen_elements_take_adamws_steps_and_the_others_none(shape: tuple[int, ...], role: str) -> None:
    start, grads = drive.start_of(shape), drive.gradients(shape, 5)
    mask = mask_of(grads[0], int(0.1 * start.numel()))
    truth = AdamW(start.double(), **HYPER)
    for g in grads:
        expected = truth.step(g)
    found = drive.follow("fish_mask", start, grads, role, hyper=HYPER, rank=0.1)[-1]
    torch.testing.assert_close(found[mask].double(), expected[mask], rtol=0, atol=3e-7)
    assert torch.equal(found[~mask], start[~mask])


def test_others_keep_their_bits_where_weights_are_rounded_at_random() -> None:
    start, grads = drive.start_of((32, 64)).bfloat16(), drive.gradients((32, 64), 4)
    found = drive.follow("fish_mask", start, grads, hyper=HYPER)[-1]
    assert int((found != start).sum()) == int(0.005 * 2048)


def test_a_mask_of_all_is_adamw() -> None:
    start, grads = drive.start_of((9, 14)), drive.gradients((9, 14), 4)
    whole = drive.follow("fish_mask", start, grads, hyper=HYPER, rank=126)
    plain = drive.follow("adamw", start, grads, hyper=HYPER)
    torch.testing.assert_close(whole[-1], plain[-1], rtol=0, atol=1e-7)


def test_what_is_held() -> None:
    strategy = lowmem.create("fish_mask")
    assert lowmem.state_bytes(strategy, (64, 100)) == 12 * 32 + 4
    assert lowmem.state_bytes(strategy, (64, 100), role="embedding") == 12 * 32 + 4
    assert lowmem.state_bytes(strategy, (100,), role="other") == 12 + 4


def test_a_first_gradient_without_anything_to_find_decides_nothing() -> None:
    start, grads = drive.start_of((8, 16)), drive.gradients((8, 16), 2)
    optimizer, params = drive.on_weights("fish_mask", {"w": start}, hyper=HYPER, rank=4)
    for g in (torch.zeros(8, 16), torch.full((8, 16), torch.nan)):
        drive.step(optimizer, params, {"w": g})
        assert torch.equal(params["w"], start)
    for g in grads:
        drive.step(optimizer, params, {"w": g})
    assert torch.equal(params["w"] != start, mask_of(grads[0], 4))


def test_a_choice_of_ones_own_is_kept() -> None:
    """The Fisher information of many samples, as the paper has it."""
    start, samples = drive.start_of((8, 16)), drive.gradients((8, 16), 20)
    mask = mask_of(torch.stack([g.square() for g in samples]).mean(0), 6)
    optimizer, params = drive.on_weights("fish_mask", {"w": start}, hyper=HYPER, rank=6)
    optimizer.init_state()
    held = optimizer.state[params["w"]]
    held["projector.index"].copy_(mask.view(-1).nonzero()[:, 0])
    for g in samples[:3]:
        drive.step(optimizer, params, {"w": g})
    assert torch.equal(params["w"] != start, mask)


@pytest.mark.parametrize(
    ("shape", "count"), [((7, 9), 5), ((300, 1100), 1234), ((2, 600_000), 7), ((4, 4), 16)]
)
def test_the_largest_are_found_by_counting(shape: tuple[int, int], count: int) -> None:
    """Many are of one size, some are not finite."""
    g = drive.gradients(shape, 1)[0].round(decimals=1)
    g[0, 0], g[-1, -1] = torch.nan, torch.inf
    places = largest(Dense(g), torch.empty(count, dtype=torch.int32))
    wanted = mask_of(torch.where(g.isfinite(), g, 0.0), count).view(-1).nonzero()[:, 0]
    assert torch.equal(places.long(), wanted)


def test_a_linear_model_is_trained_by_its_mask_alone() -> None:
    model = nn.Linear(16, 8)
    before = model.weight.detach().clone()
    optimizer = lowmem.optimizer(model, "fish_mask", lr=0.1, rank=0.25)
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    assert int((model.weight != before).sum()) == 32


def test_the_rest_cannot_be_stepped() -> None:
    with pytest.raises(UserError, match="does not see stays as it is: take residual=drop"):
        lowmem.create("fish_mask", residual="sign")
