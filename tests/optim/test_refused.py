"""What cannot be meant is refused when it is written: by what was given, what is allowed, and what to do."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import lowmem
from lowmem.config import RunConfig
from lowmem.errors import UserError
from lowmem.optim.tensors.checks import check_hyper
from lowmem.strategies import parse_options


def weight() -> nn.Parameter:
    return nn.Parameter(torch.ones(4, 4))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3': a text, as YAML reads 1e-3; give 0.001"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"lr": None}, "lr must be a number, got None"),
        ({"lr": True}, "lr must be a number, got True"),
        ({"lr": 10**400}, "lr must be at least 0 and finite"),
        ({"eps": [1e-8]}, "eps must be a number, got [1e-08]"),
        ({"weight_decay": 1j}, "weight_decay must be a number, got 1j"),
        ({"betas": 0.9}, "betas must be two numbers in [0, 1), as in (0.9, 0.999), got 0.9"),
        ({"betas": "0.9"}, "betas must be two numbers"),
        ({"betas": (0.9, "0.999")}, "betas must be two numbers"),
        ({"betas": (0.9, 1.0)}, "betas must be two numbers"),
        ({"seed": "x"}, "seed must be a whole number, got 'x'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
    ],
)
def test_a_number_is_of_its_type(numbers: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        check_hyper(numbers)


def test_all_that_is_wrong_with_numbers_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        lowmem.optimizer([weight()], "adamw", lr="1e-3", betas=0.9, eps=None, weight_decay=-1, compile="x")
    assert [said.split(" must")[0] for said in str(caught.value).split("; ") if " must" in said] == [
        "lr", "eps", "weight_decay", "betas", "compile",
    ]  # fmt: skip


@pytest.mark.parametrize("one", [1, 0.5, numpy.float32(0.5), torch.tensor(0.5), torch.tensor([0.5])])
def test_what_is_a_number_is_taken(one: Any) -> None:
    check_hyper({"lr": one, "betas": [0.5, 0.5], "seed": numpy.int64(3)})


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("adamw", {"embedding": None}, "unknown embedding None; Known: "),
        ("adamw", {"embedding": 0}, "unknown embedding 0; Known: "),
        ("adamw", {"head": False}, "unknown head False; Known: "),
        ("adamw", {"modifiers": "none+cautious"}, "modifiers has 'none' beside others in 'none+cautious'"),
        ("adamw", {"embedding_modifiers": "none+limit"}, "embedding_modifiers has 'none' beside others"),
        ("galore", {"rank": 10**400}, "rank is a finite number, got inf"),
    ],
)
def test_an_option_is_of_its_type(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        lowmem.create(name, **options)


def test_a_role_may_be_given_no_rule_of_its_own() -> None:
    assert "embedding" not in lowmem.create("adamw", embedding="").options


@pytest.mark.parametrize("name", [None, 3, nn.Linear])
def test_a_strategy_is_a_name(name: Any) -> None:
    for use in (lowmem.create, lambda name: lowmem.optimizer([weight()], name)):
        with pytest.raises(UserError, match="a strategy is a name, such as 'adamw', or what"):
            use(name)


def test_the_name_of_an_option_is_a_text() -> None:
    given: Any = {1: 2}
    with pytest.raises(UserError, match="no option '1'; Known: "):
        parse_options("galore", given)


def test_a_list_in_a_file_is_several_words() -> None:
    given: Any = {"modifiers": ["cautious", "limit"], "states": "int8"}
    run = RunConfig(model="smollm2-135m", optim="adamw", optim_args=given)
    assert parse_options("adamw", run.optim_args) == {"modifiers": "cautious+limit", "states": "int8"}


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_that_take_no_step_are_refused_at_once(dtype: torch.dtype) -> None:
    with pytest.raises(UserError, match="take no steps; hold them as float32, float64, bfloat16 or float16"):
        lowmem.optimizer([nn.Parameter(torch.ones(4, 4).to(dtype))], "adamw")


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("sm3", {"states": "int8"}, "rule sm3 holds no moments; leave states out"),
        (
            "adamw",
            {"vector": "sm3", "vector_states": "int8"},
            "rule sm3 holds no moments; leave vector_states",
        ),
        ("online_subspace", {"basis_states": "int8"}, "basis_states=int8 would have no effect"),
        ("online_subspace", {"on_refresh": "reset"}, "projector=online never takes other coordinates"),
        ("fish_mask", {"on_refresh": "reset"}, "projector=fisher never takes other coordinates"),
    ],
)
def test_what_would_have_no_effect_is_refused(name: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        lowmem.create(name, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sm3", {"states": "fp32"}),
        ("sm3", {"states": "int8", "momentum": 0.9}),
        ("sm3", {"states": "int8", "other": "adam"}),
        ("adafactor", {"states": "int8"}),
        ("online_subspace", {"basis_states": "int8", "basis_rule": "adam"}),
        ("online_subspace", {"on_refresh": "keep"}),
        ("adamw_8bit", {"rule": "sm3"}),
        ("adamw_8bit", {"rule": "sm3", "states": "int8"}),
        ("frugal", {"projector": "online", "residual": "drop"}),
    ],
)
def test_what_has_an_effect_is_taken(name: str, options: dict[str, Any]) -> None:
    made = lowmem.create(name, **options)
    assert lowmem.create(name, **made.options) == made


RESET = {"on_refresh": "reset"}


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("galore", {"rule": "ademamix", "slow_warmup": 9, **RESET}, "slow_warmup counts steps by the age"),
        ("galore", {"rule": "adafactor", "relative_step": True, **RESET}, "relative_step counts steps by"),
        ("ademamix", {"slow_warmup": 9, "modifiers": "momentum_reset"}, "leave momentum_reset out"),
        ("schedule_free", {"rule_warmup": 9, "modifiers": "momentum_reset"}, "warmup counts steps by"),
    ],
)
def test_a_schedule_by_age_is_refused_where_ages_start_afresh(
    name: str, options: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        lowmem.create(name, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"slow_warmup": 9},
        {"modifiers": "momentum_reset"},
        {"projector": "power", "slow_warmup": 9, "on_refresh": "keep"},
        {"projector": "power", **RESET},
    ],
    ids=str,
)
def test_a_schedule_by_age_is_taken_where_ages_go_on(options: dict[str, Any]) -> None:
    lowmem.create("ademamix", **options)


@pytest.mark.parametrize("seed", ["x", 1.5])
def test_a_seed_is_a_whole_number_from_the_start(seed: Any) -> None:
    with pytest.raises(UserError, match="seed must be a whole number"):
        lowmem.optimizer([weight()], "adamw", seed=seed)
