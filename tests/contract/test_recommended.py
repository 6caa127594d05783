"""What a method's record recommends can be written, does something, and is shown."""

from __future__ import annotations

import json

from typer.testing import CliRunner

import lowmem
from lowmem.cli import app
from lowmem.optim.tensors.checks import idle
from tests.contract.cases import Case

SETTINGS = {"lr", "betas", "eps", "weight_decay"}


def test_recommended_values_make_an_optimizer() -> None:
    assert sum(bool(entry.recommended) for entry in lowmem.available().values()) > 40
    for entry in lowmem.available().values():
        for advice in entry.recommended:
            assert advice.purpose in ("fine-tuning", "pre-training")
            assert advice.source
            options = {key: value for key, value in advice.values.items() if key not in SETTINGS}
            hyper = {key: value for key, value in advice.values.items() if key in SETTINGS}
            rules = Case(entry.name, tuple(options.items())).create().rules.values()
            given = {"betas": hyper.get("betas", (0.9, 0.999)), "eps": hyper.get("eps", 1e-8)}
            assert not idle(entry.name, rules, **given), entry.name


def test_they_are_shown() -> None:
    told = CliRunner().invoke(app, ["strategies", "mars", "--json"])
    (advice,) = json.loads(told.stdout)["recommended"]
    assert advice["values"] == {"lr": 6e-3, "betas": [0.95, 0.99], "weight_decay": 1e-2}
    assert advice["source"].startswith("authors, GPT-2")
    assert "weight_decay=0.01" in CliRunner().invoke(app, ["strategies", "mars"]).stdout


def test_the_momentum_in_a_subspace_is_its_authors_recipe() -> None:
    """Their command line's own gap is 200; the recipe that the values are of says 100."""
    (advice,) = lowmem.available()["subspace_momentum"].recommended
    assert advice.values == {"lr": 0.05, "eps": 1e-6, "rank": 128, "update_proj_gap": 100}


def test_muon_says_what_it_is_meant_for() -> None:
    for name in ("muon", "muon_8bit"):
        said = " ".join(lowmem.available()[name].doc.split())
        assert "meant for (continued) pre-training and for the factors of LoRA" in said.replace(
            "Meant", "meant"
        )
