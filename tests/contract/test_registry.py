"""The registry: typed options, one-line errors with the nearest name, and nothing silently ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowmem
from lowmem.errors import UserError
from lowmem.strategies import parse_options
from tests.contract import cases
from tests.contract.cases import Case


def entries() -> list[tuple[str, Any]]:
    return list(lowmem.available().items())


@pytest.mark.parametrize(("name", "entry"), entries())
def test_an_entry_says_what_it_is(name: str, entry: Any) -> None:
    assert entry.name == name
    assert entry.summary
    assert len(entry.summary.splitlines()) == 1
    for key, option in entry.options.items():
        assert option.name == key
        assert option.type in (int, float, str, bool)
        assert isinstance(option.default, option.type) or option.default is None
        assert option.help
        assert option.default is None or not option.choices or option.default in option.choices


@pytest.mark.parametrize("name", [name for name, _ in entries()])
def test_a_strategy_comes_back_from_its_config(name: str) -> None:
    strategy = lowmem.create(name)
    config = strategy.to_config()
    assert config["name"] == name
    assert lowmem.create(config["name"], writer=config["writer"], **config["options"]) == strategy


@pytest.mark.parametrize(
    ("dtype", "words"), [(torch.float16, "writer 'split' holds bf16"), (torch.complex64, "view_as_real")]
)
def test_weights_that_a_writer_cannot_take_are_refused_at_once(dtype: torch.dtype, words: str) -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=dtype))
    with pytest.raises(UserError, match=words):
        lowmem.LowMemOptimizer([weight], lowmem.create("adamw", writer="split"))


@pytest.mark.parametrize("name", [name for name, _ in entries()])
def test_a_misspelt_option_is_an_error_with_the_nearest_name(name: str) -> None:
    options = lowmem.available()[name].options
    if not options:
        with pytest.raises(UserError):
            lowmem.create(name, anything=1)
        return
    key = max(options, key=len)
    with pytest.raises(UserError, match=key) as caught:
        lowmem.create(name, **{key[:-1] + "q": options[key].default})
    assert len(str(caught.value).splitlines()) == 1


def test_an_unknown_strategy_is_an_error_with_the_nearest_name() -> None:
    for name, _ in entries():
        with pytest.raises(UserError, match=name) as caught:
            lowmem.create(name + "x")
        assert len(str(caught.value).splitlines()) == 1


def bad_values() -> list[tuple[str, str, Any]]:
    found: list[tuple[str, str, Any]] = []
    for name, entry in entries():
        for key, option in entry.options.items():
            if option.choices:
                found.append((name, key, "nonsense"))
            if option.type is int:
                found += [(name, key, value) for value in (0, -1, "many") if (key, value) != ("warmup", 0)]
            if key == "density":
                found += [(name, key, value) for value in (-0.1, 1.5, float("nan"))]
            if option.type is float:
                found += [(name, key, value) for value in ("much", float("nan"), float("inf"))]
            if "scale" in key and option.type is float:
                found.append((name, key, -1.0))
    return found


@pytest.mark.parametrize(("name", "key", "value"), bad_values())
def test_a_bad_value_is_one_line_that_names_the_option(name: str, key: str, value: Any) -> None:
    with pytest.raises(UserError) as caught:
        lowmem.create(name, **{key: value})
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert key in message


@pytest.mark.parametrize("composition", [*cases.plain(), *cases.single()], ids=str)
def test_every_single_choice_is_defined(composition: Case) -> None:
    composition.create()


@pytest.mark.parametrize(("composition", "error"), cases.refused(), ids=lambda x: str(x))
def test_a_composition_that_is_not_defined_says_why_in_one_line(composition: Case, error: UserError) -> None:
    message = str(error)
    assert len(message.splitlines()) == 1
    assert any(option in message for option in composition.varied)


@pytest.mark.parametrize("composition", [*cases.plain(), *cases.single()], ids=str)
def test_options_come_from_the_command_line_typed(composition: Case) -> None:
    told = {key: value for key, value in composition.options if value is not None}
    text = ",".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in told.items()
    )
    assert parse_options(composition.name, text) == told


def test_an_option_given_twice_is_an_error() -> None:
    with pytest.raises(UserError, match="given twice"):
        parse_options("galore", "rank=1, rank=2")
