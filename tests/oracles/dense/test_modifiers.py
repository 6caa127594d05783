"""Modifiers against the papers' equations in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowmem.optim.contract import AnyRule
from lowmem.optim.elementwise import coded
from lowmem.optim.modifiers.masks import AlphaMask, Cautious, Grams
from lowmem.optim.modifiers.modified import modified
from lowmem.optim.modifiers.modifier import Modifier
from lowmem.optim.modifiers.norms import Limit, TrustRatio
from lowmem.optim.modifiers.spikes import SpikeClip
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.rules.elementwise.adam import Adam
from lowmem.optim.rules.elementwise.sign import Lion
from lowmem.optim.strategy import Strategy
from lowmem.sources import Backprop
from tests.oracles import drive
from tests.oracles.dense import reference_modifiers as reference
from tests.oracles.drive import gradients, start_of

HYPER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}


def follow(rule: AnyRule, start: Tensor, grads: Sequence[Tensor]) -> list[Tensor]:
    p = nn.Parameter(start.clone())
    strategy = Strategy(rules={"matrix": rule, "other": rule}, source=Backprop())
    optimizer = LowMemOptimizer([{"params": [("w", p)], "role": "matrix"}], strategy, **HYPER)
    weights = []
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
        weights.append(p.detach().clone())
    return weights


def agree(modifiers: Sequence[Modifier], grads: Sequence[Tensor], **ours: Any) -> None:
    start = start_of(grads[0].shape)
    found = follow(modified(coded(Adam()), modifiers), start, grads)
    wanted = reference.follow(start, grads, **HYPER, **ours)
    for w, truth in zip(found, wanted, strict=True):
        torch.testing.assert_close(w.double(), truth, rtol=0, atol=3e-7)
    plain = reference.follow(start, grads, **HYPER)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(plain, wanted, strict=True)) > 1e-3
    )  # it does something


@pytest.mark.parametrize("shape", [(7, 12), (41,), (3, 4, 5, 1)])
@pytest.mark.parametrize(
    ("modifier", "after"),
    [
        (Cautious(), reference.cautious),
        (Cautious("norm"), reference.keeping_length),
        (Grams(), reference.grams),
        (TrustRatio(), reference.lamb),
    ],
)
def test_a_modifier_of_the_step(shape: tuple[int, ...], modifier: Modifier, after: reference.After) -> None:
    agree([modifier], gradients(shape, 8), after=[after])


@pytest.mark.parametrize("rule", [coded(Adam(), "int8"), coded(Lion())])
def test_alpha_mask_keeps_the_length_and_leaves_out_what_turned(rule: AnyRule) -> None:
    start, g = start_of((8, 64)), gradients((8, 64), 2)
    one, two = follow(modified(rule, [AlphaMask()]), start, g)
    turned = g[0].sign() != g[1].sign()
    still = (two - one * (1 - 1e-3)).abs() < 1e-7
    assert torch.equal(still, turned)
    plain = follow(rule, start, g)
    torch.testing.assert_close((two - one * (1 - 1e-3)).norm(), (plain[1] - plain[0] * (1 - 1e-3)).norm())


def test_alpha_mask_is_the_papers_mask() -> None:
    agree([AlphaMask()], gradients((7, 12), 8), after=[reference.Alpha(0.9)])


def growing(shape: tuple[int, ...]) -> list[Tensor]:
    """Gradients of one direction after some of many: the steps grow."""
    return [*gradients(shape, 4), *(torch.ones(shape) * 3.0**t for t in range(6))]


def test_the_limiter() -> None:
    limiter = reference.Limiter()
    agree([Limit()], growing((6, 9)), after=[limiter])
    assert limiter.limited > 2


LIMITER = reference.Limiter
CHAINS: list[tuple[list[Modifier], Callable[[], list[reference.After]]]] = [
    ([Cautious(), Limit()], lambda: [reference.cautious, LIMITER()]),
    ([Limit(), Cautious()], lambda: [LIMITER(), reference.cautious]),
    ([Cautious("norm"), Limit(), Grams()], lambda: [reference.keeping_length, LIMITER(), reference.grams]),
    ([Limit(), TrustRatio()], lambda: [LIMITER(), reference.lamb]),
    ([Grams(), Limit(), Cautious()], lambda: [reference.grams, LIMITER(), reference.cautious]),
]


@pytest.mark.parametrize(("modifiers", "after"), CHAINS)
def test_a_chain_is_one_after_the_other(
    modifiers: list[Modifier], after: Callable[[], list[reference.After]]
) -> None:
    """Their sums are taken in one pass, and their factors make up for each other."""
    agree(modifiers, growing((6, 9)), after=after())


def test_spikes_are_clipped_by_their_own_history() -> None:
    grads = gradients((5, 8), 12)
    grads[8][2, 3] = 900.0
    grads[3][1, 1] = -900.0  # too early to be judged
    for g in grads[:9]:
        g[0, 0] = 0.0  # then there is no history to be judged by
    agree([SpikeClip(threshold=50.0, guard=6)], grads, theta=50.0, guard=6)


def test_spike_clip_in_a_chain() -> None:
    grads = gradients((5, 8), 12)
    grads[8][2, 3] = 900.0
    after = [reference.cautious, reference.Limiter()]
    agree([SpikeClip(50.0, 6), Cautious(), Limit()], grads, theta=50.0, guard=6, after=after)


def test_lamb_as_published() -> None:
    """Known answers of published code without clipping: three gradients of a weight of two."""
    answers = [[0.900000025, -0.899999975], [0.7915438014, -0.8333873068], [0.8234429871, -0.9438101391]]
    start, grads = torch.tensor([[1.0, -1.0]]), [[[1.0, -2.0]], [[0.5, 0.25]], [[-1.5, 3.0]]]
    hyper = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6}
    weights = drive.follow("lamb", start, [torch.tensor(g) for g in grads], hyper=hyper)
    torch.testing.assert_close(torch.cat(weights), torch.tensor(answers), rtol=0, atol=3e-7)
