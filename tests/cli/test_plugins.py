"""Methods of the user's own from the command line: by a module that brings them, and as module:factory."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import lowmem
import lowmem.cli as cli

runner = CliRunner()
MODULE = '''
"""Mine: a rule of another package."""

from typing import Annotated

import lowmem
import lowmem.strategies as strategies
from lowmem.optim.elementwise import Elementwise


class Halved(Elementwise):
    """Half of the gradient."""

    ages, uses = False, frozenset()

    def direction(self, g, m, old, x):
        return 0.5 * g


@strategies.part("rule")
def halved_gradient():
    """Half of the gradient."""
    return Halved()


strategies.register(strategies.Method("halving", "Half steps.", paper="0000.00000", rule="halved_gradient"))


def gentle(*, rank: Annotated[int, "Directions."] = 4) -> lowmem.Strategy:
    """GaLore in few directions."""
    return lowmem.create("galore", rank=rank, update_proj_gap=2, scale=0.1)


def unhelpful(*, rank=4):
    """No type."""


def wrong():
    """No strategy."""
    return 3
'''


@pytest.fixture(autouse=True)
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the present folder, forgotten afterwards."""
    (tmp_path / "own_methods.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield "own_methods"
    sys.modules.pop("own_methods", None)
    importlib.import_module("lowmem.strategies.method")._METHODS.pop("halving", None)
    importlib.import_module("lowmem.strategies.parts")._PARTS["rule"].pop("halved_gradient", None)


def said(*words: str | Path, code: int = 0) -> str:
    done = runner.invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done.stdout


def refused(*words: str | Path) -> str:
    done = runner.invoke(cli.app, [str(word) for word in words])
    assert done.exit_code == 2, (done.stdout, done.stderr, done.exception)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("named", ["own_methods", "own_methods.py"])
def test_a_module_brings_methods_to_lists_checks_and_plans(named: str, tiny_model: Path) -> None:
    listed = json.loads(said("strategies", "--plugin", named, "--json"))
    assert {"halving": "Mine"}.items() <= {one["name"]: one["family"] for one in listed}.items()
    emitted = Path("run.yaml")
    asked = (
        "--model",
        tiny_model,
        "--optim",
        "adamw,halving",
        "--seq-len",
        "64",
        "--emit",
        emitted,
        "--html",
        "plan.html",
    )
    planned = json.loads(said("plan", *asked, "--plugin", named, "--json"))
    assert [one["strategy"] for one in planned["plans"]] == ["halving", "adamw"]
    assert f"--seq-len 64 --plugin {named}" in Path("plan.html").read_text(encoding="utf-8")
    written = yaml.safe_load(emitted.read_text(encoding="utf-8"))
    assert (written["optim"], written["plugin"]) == ("halving", named)


@pytest.mark.parametrize("optim", ["own_methods:gentle", "own_methods.py:gentle"])
def test_a_factory_is_a_strategy_everywhere(optim: str, tiny_model: Path) -> None:
    made, like = lowmem.create(optim, rank=8), lowmem.create("galore", rank=8, update_proj_gap=2, scale=0.1)
    assert made == like
    assert (made.name, dict(made.options)) == (optim, {"rank": 8})
    assert lowmem.create(made.name, **made.options) == made
    detail = json.loads(said("strategies", optim, "--json"))
    assert (detail["summary"], [o["name"] for o in detail["options"]]) == (
        "GaLore in few directions.",
        ["rank"],
    )
    assert "rank=4" in said("strategies", optim)
    asked = ("--model", tiny_model, "--seq-len", "64", "--json")
    ours, theirs = json.loads(said("plan", *asked, "--optim", f"{optim}(rank=8),galore(rank=8,scale=0.1)"))[
        "plans"
    ]
    assert ours["state_bytes"] == theirs["state_bytes"]
    assert json.loads(said("check", optim, "--json"))["kept"]


def test_a_run_with_a_plugin_resumes_by_what_it_wrote(tiny_model: Path, rows: Path) -> None:
    shared = (
        "--model",
        tiny_model,
        "--data",
        rows,
        "--output-dir",
        "out",
        "--save-steps",
        "2",
        "--seq-len",
        "64",
    )
    shared += ("--prompt", "", "--threads", "1", "--columns", "prompt=question,completion=answer", "--json")
    optim = ("--optim", "own_methods:gentle(rank=2)", "--plugin", "own_methods")
    said("finetune", *shared, *optim, "--steps", "2")
    assert "optim_args: rank=2" in Path("out/config.yaml").read_text(encoding="utf-8")
    found = json.loads(said("finetune", *shared, "--resume", "--steps", "3"))
    assert (found["strategy"], found["options"]) == ("own_methods:gentle", {"rank": 2})
    assert (found["resumed_from"], found["steps"]) == ("checkpoint-2", 3)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--optim", "own_methods:gentle(size=3)"), "own_methods:gentle: no option 'size'; Known: rank"),
        (("--optim", "own_methods:gentle(rank=x)"), "own_methods:gentle: rank is int, got 'x'"),
        (("--optim", "own_methods:wrong"), "own_methods:wrong returns int; let it return a Strategy"),
        (("--optim", "own_methods:unhelpful"), "needs a plain type, a default and a help line"),
        (("--optim", "own_methods:nothing"), "optim: own_methods has no function 'nothing'"),
        (("--optim", "nowhere:nothing"), "optim: cannot import 'nowhere': ModuleNotFoundError"),
        (("--plugin", "nowhere"), "plugin: cannot import 'nowhere': ModuleNotFoundError"),
        (("--plugin", "nowhere.py"), "plugin: cannot import 'nowhere.py': FileNotFoundError"),
    ],
)
def test_what_is_wrong_with_it_is_one_line(words: tuple[str, ...], told: str, tiny_model: Path) -> None:
    assert told in refused("plan", "--model", tiny_model, *words)


def test_a_configuration_names_a_plugin_that_is_missing_once(tiny_model: Path) -> None:
    told = refused("finetune", "--model", tiny_model, "--optim", "halving", "--plugin", "nowhere")
    assert told.count("nowhere") == 2
    assert "unknown strategy" not in told
