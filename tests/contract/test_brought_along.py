"""What another package brings is found everywhere: a rule, a projector and a method from another folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LOWMEM = ("-c", "from lowmem.cli import app; app()")

MODULE = '''
"""A rule, a projector and a method that lowmem does not have."""

from dataclasses import dataclass

import torch

import lowmem.strategies as strategies
from lowmem.optim.projectors.coordinate import Columns
from lowmem.optim.elementwise import Elementwise


@dataclass(frozen=True)
class Halved(Elementwise):
    """Half of the gradient."""

    ages, uses = False, frozenset()

    def direction(self, g, m, old, x):
        return 0.5 * g


@strategies.part("rule")
def halved():
    """Half of the gradient."""
    return Halved()


@strategies.part("projector")
def narrow(*, rank: strategies.Size = 2, update_proj_gap: strategies.Gap = 100):
    """A few of the columns.

    Args:
        rank: Columns.
        update_proj_gap: Steps until others have their turn.
    """
    return Columns(rank, update_proj_gap)


@dataclass(frozen=True)
class Leaky(Elementwise):
    """Draws from the global generator, which no checkpoint holds."""

    ages, uses = False, frozenset()

    def direction(self, g, m, old, x):
        return g * torch.rand_like(g)


@strategies.part("rule")
def leaky():
    """Draws from the global generator."""
    return Leaky()


@strategies.part("rule")
def alone():
    """In no method."""
    return Halved()


strategies.register(strategies.Method("leaking", "Never the same.", paper="0000.00000", rule="leaky"))
strategies.register(strategies.Method(
    "halfway", "Half a step in a few columns. Bytes for (m, n): 4 r.", paper="0000.00000",
    projector="narrow", rule="halved", rank=5,
))
'''


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As if the package were installed: a module, and the entry point that names it."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "brought_along.py").write_text(MODULE, encoding="utf-8")
    about = folder / "brought_along-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n", encoding="utf-8"
    )
    (about / "entry_points.txt").write_text("[lowmem.strategies]\nmine = brought_along\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": str(folder)}


def lines(environment: dict[str, str], *words: str) -> str:
    done = subprocess.run([sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_python_and_the_plan_know_it(environment: dict[str, str]) -> None:
    script = """
import lowmem
strategy = lowmem.create("halfway")
assert strategy.options["rank"] == 5 and lowmem.available()["halfway"].summary
assert lowmem.state_bytes(strategy, (64, 32)) == 4 * 5
assert lowmem.create("galore", projector="narrow", rule="halved").options["rank"] == 128
from transformers import LlamaConfig
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 2}
config = LlamaConfig(num_hidden_layers=1, vocab_size=40, **sizes)
planned = lowmem.plan(config, "halfway", seq_len=16, dtype="float32").plans[0]
print(planned.state_bytes, planned.strategy)
"""
    size, name = lines(environment, "-c", script).split()
    assert int(size) > 0
    assert name == "halfway"


def test_the_command_line_knows_it(environment: dict[str, str]) -> None:
    listed = json.loads(lines(environment, *LOWMEM, "strategies", "--json"))
    families = {one["name"]: one["family"] for one in listed}
    assert families["halfway"] == "A rule, a projector and a method that lowmem does not have"
    assert families["galore"] == families["fira"] == "Leading subspaces"
    found = json.loads(lines(environment, *LOWMEM, "strategies", "--parts", "--json"))
    assert "narrow" in [one["name"] for one in found["projector"]]
    assert "halved" in [one["name"] for one in found["rule"]]


def test_the_contract_is_asked_of_it(environment: dict[str, str]) -> None:
    told = json.loads(lines(environment, *LOWMEM, "check", "halfway", "--json"))
    assert told["kept"]
    assert {finding["promise"] for finding in told["findings"]} >= {"counted", "resumed", "released"}
    words = [sys.executable, *LOWMEM, "check", "leaking", "--json"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "leaking does not keep what every strategy promises: released, resumed" in done.stderr
    problems = {f["promise"]: f["problem"] for f in json.loads(done.stdout)["findings"] if f["problem"]}
    assert problems["resumed"] == "after a resume the weights are others"


def test_the_contract_suite_knows_it(environment: dict[str, str]) -> None:
    """The method as it comes, a part that no method has, and every part in what is drawn; a few are run."""
    suite = ("-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "tests/contract/test_bytes.py")
    collected = lines(environment, *suite, "--collect-only")
    for case in ("[halfway-", "[leaking-", "adamw[rule=alone]"):
        assert case in collected
    assert " passed" in lines(environment, *suite, "-k", "halfway or narrow or halved or alone")
    script = "from tests.contract.cases import drawn; print(*drawn(), sep='\\n')"
    told = lines(environment, "-c", script)
    assert "projector=narrow" in told
    assert "rule=halved" in told
    assert "rule=alone" in told


def test_one_that_cannot_be_imported_is_named_in_one_line(tmp_path: Path) -> None:
    about = tmp_path / "broken-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n", encoding="utf-8")
    (about / "entry_points.txt").write_text("[lowmem.strategies]\nmine = nonesuch\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    words = [sys.executable, *LOWMEM, "strategies"]
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "'nonesuch' is to bring strategies and cannot be imported" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
