"""SPAM and Stable-SPAM: their papers in double precision, and what must be true of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.errors import UserError
from lowmem.optim.modifiers.spikes import MomentumReset
from lowmem.optim.rules.measured.layerwise import StableSPAM
from tests.oracles import drive
from tests.oracles.measured import reference_spam as reference

GAP = 6
SHAPE = (7, 12)
HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
RESET = {"momentum_reset_gap": GAP, "momentum_reset_warmup": 3}


def spiked(steps: int = 20) -> list[Tensor]:
    grads = drive.gradients(SHAPE, 20)
    grads[4][2, 3], grads[10][0, 0], grads[17][5, 5] = 900.0, -900.0, 5000.0
    return grads[:steps]


def follow(name: str, grads: list[Tensor], **options: Any) -> list[Tensor]:
    key = drive.name_without_offset(GAP)
    return drive.follow(name, drive.start_of(SHAPE), grads, key=key, hyper=HYPER, **options)


def test_spam_is_the_papers() -> None:
    truth = reference.SPAM(
        drive.start_of(SHAPE).double(), **HYPER, threshold=50.0, guard=3, gap=GAP, warmup=3
    )
    found = follow("spam", spiked(), threshold=50.0, guard=3, **RESET)
    for w, g in zip(found, spiked(), strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=3e-7)


@pytest.mark.parametrize(("last", "cut"), [(3, False), (4, True), (GAP + 3, False), (GAP + 4, True)])
def test_as_many_steps_are_free_at_the_start_as_after_a_reset(last: int, cut: bool) -> None:
    """A spike in the last of `guard` steps of the moments, and in the step after them: how large is lost."""
    grads, ends = drive.gradients(SHAPE, last), []
    for spike in (100.0, 200.0):
        grads[-1][2, 3] = spike
        ends.append(follow("spam", grads, threshold=50.0, guard=3, **RESET)[-1][2, 3])
    assert (ends[0] == ends[1]) == cut


def test_spam_that_neither_clips_nor_forgets_is_adamw() -> None:
    options: dict[str, Any] = {"threshold": 1e30, "momentum_reset_gap": 10_000}
    one, other = follow("spam", spiked(8), **options), follow("adamw", spiked(8))
    assert torch.equal(one[-1], other[-1])


def test_stable_spam_is_the_papers_with_a_clean_reset() -> None:
    truth = reference.StableSPAM(drive.start_of(SHAPE).double(), **HYPER, theta=0.9, gap=GAP)
    found = follow("stable_spam", spiked(), theta=0.9, momentum_reset_gap=GAP)
    for w, g in zip(found, spiked(), strict=True):
        torch.testing.assert_close(w.double(), truth.step(g), rtol=0, atol=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 1e12])
def test_stable_spam_does_not_know_the_scale_of_gradients(factor: float) -> None:
    scaled = follow("stable_spam", [g * factor for g in spiked(8)])
    torch.testing.assert_close(scaled[-1], follow("stable_spam", spiked(8))[-1], rtol=0, atol=2e-6)


def test_a_gradient_with_a_bad_element_leaves_stable_spam_as_it_was() -> None:
    grads = spiked(6)
    bad = grads[2].clone()
    bad[1, 1] = torch.nan
    with_bad = follow("stable_spam", [*grads[:3], bad, *grads[3:]])
    assert torch.equal(with_bad[3], with_bad[2])


def test_steps_grow_back_after_a_reset() -> None:
    factors = [MomentumReset(500, 150).factor_at(since) for since in range(152)]
    assert factors[0] == pytest.approx(0.01)
    assert factors == sorted(factors)
    assert factors[150:] == [1.0, 1.0]


def test_sparse_momentum_steps_and_holds_a_share_of_the_elements() -> None:
    options: dict[str, Any] = {"projector": "randk", "rank": 0.25, "on_refresh": "reset"}
    optimizer, params = drive.on_weights(
        "spam", {"w": drive.start_of((16, 64))}, hyper=HYPER | {"weight_decay": 0.0},
        update_proj_gap=GAP, **RESET, **options,
    )  # fmt: skip
    before = params["w"].detach().clone()
    drive.step(optimizer, params, {"w": drive.gradients((16, 64), 1)[0]})
    assert int((params["w"] != before).sum()) == 256
    strategy = lowmem.create("spam", update_proj_gap=GAP, **options)
    held = sum(x.nbytes for x in optimizer.state[params["w"]].values())
    assert held == lowmem.state_bytes(strategy, (16, 64)) == 9 * 256 + 8


@pytest.mark.parametrize("rule", ["lion", "adafactor", "smmf", "muon", "novograd", "microadam"])
def test_a_reset_puts_any_rule_back_to_its_beginning(rule: str) -> None:
    """From the reset on, it steps as one that starts there."""
    hyper: dict[str, Any] = {"lr": 1e-2}
    grads, key = drive.gradients((16, 24), GAP + 3), drive.name_without_offset(GAP)
    options: dict[str, Any] = {
        "rule": rule,
        "modifiers": "momentum_reset",
        "gap": GAP,
        "momentum_reset_warmup": 0,
    }
    whole = drive.follow("adamw", drive.start_of((16, 24)), grads, key=key, hyper=hyper, **options)
    fresh = drive.follow("adamw", whole[GAP - 1], grads[GAP:], key=key, hyper=hyper, **options)
    assert torch.equal(whole[-1], fresh[-1])


def test_a_vector_is_reset_too() -> None:
    """Adafactor holds a vector otherwise than a matrix."""
    options: dict[str, Any] = {"rule": "adafactor", "modifiers": "momentum_reset", "gap": GAP, "warmup": 0}
    options["momentum_reset_warmup"] = options.pop("warmup")
    grads, key = drive.gradients((9,), GAP + 2), drive.name_without_offset(GAP)
    whole = drive.follow("adamw", drive.start_of((9,)), grads, key=key, hyper={"lr": 1e-2}, **options)
    fresh = drive.follow("adamw", whole[GAP - 1], grads[GAP:], key=key, hyper={"lr": 1e-2}, **options)
    assert torch.equal(whole[-1], fresh[-1])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match="holds nothing to forget; leave it out"):
        lowmem.create("sgd", modifiers="momentum_reset")
    with pytest.raises(UserError, match="gap must be at least 1 and warmup at least 0"):
        MomentumReset(0)
    with pytest.raises(UserError, match="gamma1, gamma2 and theta must be in"):
        StableSPAM.of("fp32", theta=1.0)
