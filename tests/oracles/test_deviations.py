"""Where a package is not the paper: what is equal, and what is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem
from lowmem.optim.int8.tensor import Int8Weight
from tests.oracles.drive import follow, gradients, on_weights, start_of, step
from tests.oracles.official import (
    ADAM,
    DECAY,
    LR,
    SHAPE,
    STEPS,
    Pair,
    apart,
    apollo,
    aside,
    kozistr,
    module_of,
    ours,
    paired,
    schedule_free,
    theirs,
)  # fmt: skip


def moved(weights: list[Tensor]) -> list[Tensor]:
    """The steps."""
    return [b - a for a, b in zip([start_of(SHAPE), *weights], weights, strict=False)]


def test_mars_has_no_gradient_before_the_first_one() -> None:
    """The package takes zeros for it, which enlarges the first corrected gradient and all that follows."""
    small = paired("MARS", "mars", (0.95, 0.99), hyper={"eps": 1e-12}, scale=0.01)
    found = apart(small)
    assert found[0] < 1e-6
    assert found[1] > 1e-3

    def remembers(module: Any, params: list[Any]) -> Any:
        optimizer = small.make(module, params)
        params[0].grad = torch.zeros(SHAPE)
        optimizer.init_group(optimizer.param_groups[0])
        optimizer.state[params[0]]["last_grad"] = gradients(SHAPE, 1, scale=0.01)[0]
        return optimizer

    assert max(apart(Pair(small.package, remembers, "mars", hyper=small.hyper, scale=0.01))) < 1e-6


def test_lamb_steps_as_far_as_lr_says() -> None:
    """The package corrects the bias of a step that has its length already: the first is 10 times too long."""
    pair = Pair("pytorch_optimizer", kozistr("Lamb", max_grad_norm=0.0), "lamb", hyper=ADAM)
    length = LR * float(start_of(SHAPE).norm())
    assert float(moved(ours(pair))[0].norm()) == pytest.approx(length, rel=1e-5)
    assert float(moved(theirs(pair))[0].norm()) == pytest.approx(10 * length, rel=1e-3)


def test_a_cautious_step_keeps_its_size() -> None:
    """The released code counts one element more than are left."""
    pair = Pair(
        "pytorch_optimizer", kozistr("Lion", betas=(0.9, 0.99), cautious=True), "lion",
        {"modifiers": "cautious"}, {"lr": LR, "betas": (0.9, 0.99)},
    )  # fmt: skip
    for mine, other in zip(moved(ours(pair)), moved(theirs(pair)), strict=True):
        assert torch.equal(mine == 0.0, other == 0.0)
        left = int((mine != 0.0).sum())
        torch.testing.assert_close(mine * left / (left + 1), other, rtol=0, atol=1e-7)


def test_tam_has_one_cosine_for_a_tensor() -> None:
    """The package has a product for each element, which no rotation of the space leaves alone."""
    pair = Pair("pytorch_optimizer", kozistr("TAM"), "tam", hyper={**ADAM, "betas": (0.9, 0.999)})
    turn = torch.linalg.qr(gradients((SHAPE[0], SHAPE[0]), 1, seed=9)[0])[0]
    plain, turned = (
        follow("tam", t @ start_of(SHAPE), [t @ g for g in gradients(SHAPE, STEPS)], hyper=pair.hyper)
        for t in (torch.eye(SHAPE[0]), turn)
    )
    torch.testing.assert_close(turn @ plain[-1], turned[-1], rtol=0, atol=1e-5)
    assert max(apart(pair)) > 1e-2


def test_a_reset_of_stable_spam_leaves_nothing_behind() -> None:
    """The package counts its averages of norms anew without forgetting them: from there on steps differ."""
    pair = Pair(
        "pytorch_optimizer", kozistr("StableSPAM", update_proj_gap=4), "stable_spam",
        {"momentum_reset_gap": 4}, ADAM,
    )  # fmt: skip
    found = apart(pair)
    assert max(found[:3]) < 1e-7
    assert max(found[3:]) > 1e-5


def test_decay_of_schedule_free_is_decoupled() -> None:
    """The package decays the base, as a part of its step; ours decays the weight of training."""
    decayed = Pair(
        "schedulefree", lambda of, p: schedule_free(of, p, weight_decay=0.1), "schedule_free",
        hyper={**ADAM, **DECAY},
    )  # fmt: skip
    found = apart(decayed)
    assert found[0] < 1e-7
    assert 1e-5 < found[-1] < STEPS * LR * 0.1


def test_fira_of_full_rank_has_no_rest() -> None:
    """The released code, and the package, take the scale into what is left out: there is a rest of all."""
    full = {"rank": 8, "update_proj_gap": 200, "scale": 0.25}
    theirs_of = {
        kind: Pair(
            "pytorch_optimizer",
            lambda module, params, kind=kind: getattr(module, kind)(
                [{"params": params, "projection_type": "std", **full}], lr=LR, betas=(0.9, 0.999), eps=1e-8
            ),
            kind.lower(), {"projector": "svd", **full, **({"limit": 0.0} if kind == "Fira" else {})}, ADAM,
        )
        for kind in ("Fira", "GaLore")
    }  # fmt: skip
    torch.testing.assert_close(ours(theirs_of["Fira"]), ours(theirs_of["GaLore"]), rtol=0, atol=1e-6)
    one, other = theirs(theirs_of["Fira"]), theirs(theirs_of["GaLore"])
    assert float((one[-1] - other[-1]).abs().max()) > 1e-3


def test_the_limiter_of_apollo_limits_steps() -> None:
    """The package limits before it corrects the bias, which lets steps grow by more."""
    betas, options = (0.5, 0.999), {"projector": "svd", "rank": 3}
    theirs_of = apollo("channel", 3, 1.0, betas=betas)
    pair = Pair("apollo_torch", theirs_of, "apollo", options, {**ADAM, "betas": betas}, grow=4.0)
    one, other = (torch.stack([d.norm() for d in moved(found)]) for found in (ours(pair), theirs(pair)))
    assert float((one[1:] / one[:-1]).amax()) <= 1.01 + 1e-4
    assert float((other[1:] / other[:-1]).amax()) > 1.04


def test_a_scale_found_once_outlives_a_resume() -> None:
    """The package of SGD-SaI finds it anew from the next gradient; pytorch_optimizer does so at each."""
    module, grads = module_of("sgd_sai"), gradients(SHAPE, 4)
    grads[2] = grads[2].abs() + 1.0  # of another ratio
    p = nn.Parameter(start_of(SHAPE))
    hyper = {"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0}
    one, params = on_weights("sgd_sai", {"w": start_of(SHAPE)}, hyper=hyper)

    def package() -> Any:
        return module.SGD_sai([p], lr=1e-3, weight_decay=0.0)

    straight = follow("sgd_sai", start_of(SHAPE), grads, hyper=hyper)
    theirs_now = package()
    with aside():
        for at, g in enumerate(grads):
            if at == 2:
                saved, held = theirs_now.state_dict(), one.state_dict()
                theirs_now = package()
                theirs_now.load_state_dict(saved)
                again, fresh = on_weights("sgd_sai", {"w": params["w"]}, hyper=hyper)
                again.load_state_dict(held)
                one, params = again, fresh
            p.grad = g.clone()
            theirs_now.step()
            step(one, params, {"w": g})
            if at == 1:
                torch.testing.assert_close(p.detach(), straight[1], rtol=0, atol=1e-7)
    assert torch.equal(params["w"], straight[-1])
    assert float((p.detach() - straight[-1]).abs().max()) > 1e-3


def test_small_gradients_of_bf16_weights_are_not_taken_for_none() -> None:
    """torch's Adafactor floors its root at the eps of bf16: a step is 250 times too short."""
    start, g = start_of(SHAPE).bfloat16(), 1e-4 * gradients(SHAPE, 1)[0]
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.Adafactor([p], lr=LR, weight_decay=0.0)
    p.grad = g.bfloat16()
    optimizer.step()
    mine = follow("adafactor", start, [g], hyper={"lr": LR}, writer="nearest")[0]
    size = [float((w.float() - start.float()).square().mean().sqrt()) for w in (p.detach(), mine)]
    assert size[0] < LR / 50
    assert size[1] == pytest.approx(LR, rel=0.05)


def returned_through_the_moment(steps: int, lr: float, beta: float, spacing: float) -> list[float]:
    """Adam by a gradient of 1, with ECO as published (arXiv 2601.22101): a weight on a grid at each step."""
    w, m, found = 0.0, 0.0, []
    for t in range(1, steps + 1):
        m = beta * m + (1 - beta)
        unbias = 1 - beta**t
        wanted = w - lr * m / unbias
        w = spacing * round(wanted / spacing)
        m += unbias / lr * (1 - 1 / beta) * (wanted - w)
        found.append(w)
    return found


def test_a_code_that_carries_its_error_follows_the_sum_of_steps() -> None:
    """The published rule lets an error act one step late for ever: codes wait, and lag by more than one."""
    steps, spacing, every = 150, 0.01, 20
    lr = spacing / every  # a code in 20 steps
    late = returned_through_the_moment(steps, lr, 0.9, spacing)
    w = nn.Parameter(Int8Weight.of(torch.full((1, 256), 127 * spacing)))
    before, found = w.decode(), []
    optimizer = lowmem.optimizer([w], "adamw", lr=lr, betas=(0.9, 0.999), writer="eco")
    for _ in range(steps):
        w.grad = torch.ones(w.shape)
        optimizer.step()
        found.append(float((w.decode() - before).mean()))
    wanted = [-lr * t for t in range(1, steps + 1)]
    assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < spacing
    assert max(abs(a - b) for a, b in zip(late, wanted, strict=True)) > 3 * spacing
    first, published = (next(t for t, x in enumerate(one, 1) if x < -spacing / 2) for one in (found, late))
    assert first == pytest.approx(every / 2, abs=1)
    assert published == pytest.approx(every / 2 / (1 - 0.9), abs=1)
