"""Adafactor is transformers' in its modes, and keeps its known invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.oracles import drive
from tests.oracles.factored.reference_adafactor import rms

MODES: list[dict[str, Any]] = [
    {"relative_step": True, "warmup_init": False, "scale_parameter": True},
    {"relative_step": True, "warmup_init": True, "scale_parameter": True},
    {"relative_step": True, "warmup_init": False, "scale_parameter": False},
    {"relative_step": False, "scale_parameter": False},
    {"relative_step": False, "scale_parameter": True, "clip_threshold": 0.3},
    {"relative_step": False, "scale_parameter": False, "beta1": 0.9},
    {"relative_step": False, "scale_parameter": True, "beta1": 0.5, "weight_decay": 0.1},
    {"relative_step": False, "scale_parameter": False, "decay_rate": -0.5, "weight_decay": 0.1},
]
SHAPES = [(6, 9), (9, 6), (7, 7), (1, 11), (11, 1), (13,), (1,)]


@pytest.fixture(autouse=True)
def _registered() -> None:
    drive.need("adafactor")


def options_of(mode: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Ours: what the group holds, and what the strategy is made of.

    Of a relative step lr is the largest: 1e-2 in the paper and in transformers, whose warm-up is 1e-6 t.
    """
    hyper: dict[str, Any] = {"lr": 1e-2, "weight_decay": mode.get("weight_decay", 0.0)}
    options = {key: value for key, value in mode.items() if key not in ("weight_decay", "warmup_init")}
    return hyper, {**options, "warmup": 10_000 if mode.get("warmup_init") else 0}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_adafactor_is_transformers(shape: tuple[int, ...], mode: dict[str, Any]) -> None:
    from transformers.optimization import Adafactor

    start, grads = drive.start_of(shape), drive.gradients(shape, 15)
    theirs = nn.Parameter(start.clone())
    official = Adafactor([theirs], lr=None if mode["relative_step"] else 1e-2, **mode)
    hyper, options = options_of(mode)
    ours = drive.follow("adafactor", start, grads, hyper=hyper, **options)
    for g, w in zip(grads, ours, strict=True):
        theirs.grad = g.clone()
        official.step()
        torch.testing.assert_close(w, theirs.detach(), rtol=1e-5, atol=1e-6)


def move(start: torch.Tensor, g: torch.Tensor, **options: Any) -> torch.Tensor:
    hyper = {"lr": 1e-2, "weight_decay": 0.0}
    fixed = {"relative_step": False, "scale_parameter": False, **options}
    return drive.follow("adafactor", start, [g], hyper=hyper, **fixed)[0] - start


def test_a_rank_one_gradient_gives_its_sign() -> None:
    g = torch.outer(torch.randn(6), torch.randn(9))
    torch.testing.assert_close(move(torch.zeros(6, 9), g), -1e-2 * g.sign(), rtol=1e-5, atol=1e-8)


def test_a_vector_gives_its_sign_at_the_first_step() -> None:
    g = torch.randn(11)
    torch.testing.assert_close(move(torch.zeros(11), g), -1e-2 * g.sign(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_step_does_not_know_the_size_of_the_gradient(factor: float) -> None:
    g, start = torch.randn(6, 9), torch.zeros(6, 9)
    torch.testing.assert_close(move(start, factor * g), move(start, g), rtol=1e-5, atol=1e-9)


def test_rows_and_columns_may_be_exchanged() -> None:
    g, start = torch.randn(6, 9), torch.zeros(6, 9)
    rows, columns = torch.randperm(6), torch.randperm(9)
    permuted = move(start, g[rows][:, columns])
    torch.testing.assert_close(permuted, move(start, g)[rows][:, columns], rtol=1e-5, atol=1e-8)


def test_the_step_is_clipped() -> None:
    g = torch.zeros(8, 8)
    g[0, 0], g[1, 1:] = 100.0, 1e-3
    assert float(rms(move(torch.zeros(8, 8), g, clip_threshold=0.5))) <= 1e-2 * 0.5 * (1 + 1e-5)


def test_the_step_scales_with_the_weight() -> None:
    g, start = torch.randn(6, 9), torch.randn(6, 9)
    scaled = {"scale_parameter": True}
    torch.testing.assert_close(
        move(8 * start, g, **scaled), 8 * move(start, g, **scaled), rtol=1e-4, atol=1e-6
    )


def test_the_statistics_stay_fp32_for_bf16_weights() -> None:
    seen: dict[str, torch.Tensor] = {}
    start, grads = drive.start_of((6, 9)).bfloat16(), drive.gradients((6, 9), 2)
    drive.follow(
        "adafactor",
        start,
        grads,
        watch=lambda o, p: seen.update(o.state[p]),
        hyper={"lr": 1e-2},
        relative_step=False,
        scale_parameter=False,
    )
    floating = [value for value in seen.values() if value.is_floating_point()]
    assert floating
    assert {value.dtype for value in floating} == {torch.float32}
    assert sum(value.numel() for value in floating) == 6 + 9
