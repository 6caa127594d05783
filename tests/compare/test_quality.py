"""The recipe of what methods learn: rates by the validation split alone, nothing run twice, a true table."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lowmem.config import load
from lowmem.errors import UserError
from lowmem.report.quality import UNKNOWN, markdown, measured, methods, rows, told
from lowmem.training.comparing.rates import rated

ROOT = Path(__file__).resolve().parents[2]
recipe = importlib.import_module("lowmem.recipes.quality")
reading = importlib.import_module("lowmem.training.comparing.reading")

FIRST, BEST = 1e-3, 1e-4
TRIED = [1e-3, 3e-3, 3e-4, 1e-4, 3e-5]
"""Up is worse, down is better until after the best."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs that were started; int8 weights lose a tenth, `BEST` is best on the validation split alone."""
    seen: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        config = load(command[command.index("--config") + 1])
        seen.append(config)
        off = abs(math.log10(config.lr / BEST))
        after = 1 + off if str(config.eval_data).endswith("validation.jsonl") else 1.5 - off
        after = after * (1.1 if config.weights else 1.0) + config.seed / 100
        held = {"before": {"loss": 3.0}, "after": {"loss": after}}
        found = {
            "steps": config.steps, "seconds": 4.0, "state_bytes": 2**20, "peak_bytes": 1,
            "held_out": held, "general": {"before": 3.0, "after": 3.25},
        }  # fmt: skip
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(recipe.METHODS, "adamw", {"demo": recipe.Row("adamw", FIRST)})
    return seen


def test_the_rate_is_chosen_on_the_validation_split_and_nothing_runs_twice(
    calls: list[Any], tmp_path: Path
) -> None:
    asked: dict[str, Any] = {
        "methods": ["adamw"], "variants": ["bf16", "int8", "int8 nearest"], "seeds": [0, 1],
        "steps": 10, "forgetting": True,
    }  # fmt: skip
    found = recipe.quality(tmp_path, **asked)
    assert recipe.quality(tmp_path, **asked) == found
    tried, judged = calls[:5], calls[5:]
    assert [c.lr for c in tried] == pytest.approx(TRIED)
    assert len(judged) == 3 * 2  # each variant with each seed
    assert {str(c.eval_data).rpartition("/")[2] for c in tried} == {"validation.jsonl"}
    assert all(c.steps == 10 and c.forgetting == (c in judged) for c in calls)
    assert {c.lr for c in judged} == {BEST}  # which is the worst one on the held-out split
    assert {str(c.eval_data).rpartition("/")[2] for c in judged} == {"heldout.jsonl"}
    assert {(c.weights, c.optim_args) for c in judged} == {
        (None, ""), ("int8", ""), ("int8", "writer=nearest"),
    }  # fmt: skip
    made = {row["variant"]: row for row in rows(found["runs"])}
    assert made["bf16"]["loss"] == pytest.approx(1.505)
    assert made["bf16"]["spread"] == pytest.approx(0.005)
    assert made["bf16"]["above"] is None
    assert made["int8"]["above"] == pytest.approx((1.65 / 1.5 + 1.66 / 1.51) / 2 - 1)
    assert made["int8"]["forgotten"] == pytest.approx(0.25)


def test_a_page_names_what_its_figures_belong_to(calls: list[Any], tmp_path: Path) -> None:
    found = recipe.quality(tmp_path, methods=["adamw"], variants=["bf16", "int8"], seeds=[0, 1])
    text = markdown(found)
    for words in (
        "## demo",
        "1 thread a run",
        "2.0000",
        "| `adamw` | a | int8 | 0.0001 | 2 | 1.6550 +- 0.0050 |",
    ):
        assert words in text
    assert "Validation losses: adamw 3e-05: 1.5229, 0.0001: 1.0000, 0.0003: 1.4771, " in text


def test_methods_are_compared_at_their_rates_and_what_is_far_off_has_a_reason() -> None:
    def run(
        method: str, split: str, lr: float, after: float, seed: int = 0, device: str = "here"
    ) -> dict[str, Any]:
        return {
            "setting": "demo", "method": method, "variant": "bf16", "split": split, "lr": lr, "seed": seed,
            "optim": method, "options": "", "steps": 4, "seconds": 4.0, "state_bytes": 2**20, "general": None,
            "held_out": {"before": 2.0, "after": after}, "machine": {**recipe.machine(), "device": device},
        }  # fmt: skip

    runs = [
        run("adamw", "validation", 1e-4, 1.0), run("adamw", "validation", 3e-4, 1.2),
        run("adamw", "heldout", 1e-4, 1.0), run("adamw", "heldout", 1e-4, 2.0, seed=1),
        run("adamw", "heldout", 3e-4, 0.5), run("sgd", "validation", 0.1, 1.1),
        run("sgd", "heldout", 0.1, 1.1), run("lion", "heldout", 1e-5, 0.1),
    ]  # fmt: skip
    adamw, sgd = sorted(methods(runs), key=lambda row: row["method"])  # lion's rate was not chosen
    assert (adamw["lr"], adamw["above"], adamw["loss"]) == (1e-4, None, 1.5)
    assert sgd["above"] == pytest.approx(0.1)  # of the seed that both have
    text = markdown({"runs": runs, "reasons": {"sgd": "it has no moments."}})
    assert "| `sgd` | a | 0.1 | 1 | 1.1000 | +10.00% |" in text
    assert "- `sgd`: it has no moments." in text
    assert "lion" not in text
    runs += [
        run("sgd", "heldout", 0.1, 1.8, device="there"),
        run("adamw", "heldout", 1e-4, 2.0, device="there"),
    ]
    found = {(row["method"], row["place"]): row["above"] for row in methods(runs)}
    assert found["sgd", "here"] == pytest.approx(0.1)
    assert found["sgd", "there"] == pytest.approx(-0.1)  # beside the AdamW of the same machine
    text = markdown({"runs": runs})
    assert "- b: there; " in text
    assert "| `sgd` | b | 0.1 | 1 | 1.8000 | -10.00% |" in text


def test_a_strategy_is_told_what_was_measured_of_it() -> None:
    kept = json.loads((ROOT / "configs" / "measured" / "quality.json").read_text(encoding="utf-8"))
    found = measured("galore")
    assert {row["method"] for row in found} >= {"galore", "galore_roles"}
    assert all(row in methods(kept["runs"]) for row in found)
    assert not measured("mezo")
    row = {"setting": "demo", "options": "rank=4", "hyper": "eps=1e-16", "lr": 1e-3, "seeds": [0, 1]}
    words = told({**row, "loss": 1.0, "above": 0.021, "state_bytes": 2**20})
    assert words == (
        "SmolLM2-135M on the demo", "lr=0.001, eps=1e-16, rank=4", "1.0000 (+2.1%), 2 seeds", "1.0",
    )  # fmt: skip


def test_rates_at_which_runs_break_off_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[float] = []

    def measure(self: Any, cases: Any) -> Any:
        (case,) = cases
        tried.append(case.lr)
        if case.lr > 1e-4:
            raise UserError("ended with 1")
        after = 9.0 if case.lr > 5e-5 else abs(math.log10(case.lr / 3e-5))  # it only rose
        return [{"held_out": {"before": 8.0, "after": after}}]

    monkeypatch.setattr(recipe.Quality, "measure", measure)
    monkeypatch.setitem(recipe.METHODS, "adamw", {"demo": recipe.Row("adamw", 1e-3)})
    assert recipe.Quality(tmp_path).rate("demo", "adamw") == 3e-5
    assert tried == [1e-3, 3e-4, 1e-4, 3e-5, 1e-5]
    monkeypatch.setitem(recipe.METHODS, "adamw", {"demo": recipe.Row("adamw", 1e3)})
    with pytest.raises(UserError, match="no run from lr 1000 on"):
        recipe.Quality(tmp_path).rate("demo", "adamw")


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown strategy 'adamm'"):
        recipe.quality(tmp_path, methods=["adamm"])


def test_a_method_without_settings_here_has_what_its_record_recommends(tmp_path: Path) -> None:
    made = recipe.row("scratch", "mars")
    assert made.lr == 1e-2  # of 6e-3, on the grid of all
    assert recipe.row("demo", "adamw_8bit").lr == 3e-5
    assert [rated(3e-5, k) for k in (-2, -1, 0, 1, 2)] == [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]
    assert dict(made.others) == {"betas": (0.95, 0.99), "weight_decay": 1e-2}
    assert recipe.row("demo", "mars").lr == recipe.USUAL["demo"]  # nothing is recommended there
    config = recipe.Quality(tmp_path).config(recipe.Case("demo", "fish_mask", "bf16", 1e-4, 0))
    assert config.optim_args == "rank=0.005"


def test_no_paragraph_of_the_text_is_on_two_sides(tmp_path: Path) -> None:
    place = reading.texts(tmp_path)
    sides = {}
    for side in ("train", "validation", "heldout"):
        texts = [json.loads(line)["text"] for line in (place / f"{side}.jsonl").read_text().splitlines()]
        sides[side] = {part for text in texts for part in text.split("\n\n")}
        assert sum(map(len, texts)) > 20_000
    assert not sides["train"] & (sides["heldout"] | sides["validation"])
    assert not sides["heldout"] & sides["validation"]


def test_the_page_is_what_the_kept_document_says() -> None:
    """When this fails, run the recipe with --page docs/quality.md --of configs/measured/quality.json."""
    document = json.loads((ROOT / "configs" / "measured" / "quality.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == markdown(document)
    assert UNKNOWN not in markdown(document)
