"""The recipe of what methods learn: rates by the validation split alone, nothing run twice, a true table."""

from __future__ import annotations

import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lowmem.config import load
from lowmem.errors import UserError
from lowmem.report.quality import markdown, rows

ROOT = Path(__file__).resolve().parents[2]
recipe = importlib.import_module("lowmem.recipes.quality")
reading = importlib.import_module("lowmem.training.comparing.reading")

RATES = (1e-4, 3e-4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Runs that were started; int8 weights lose a tenth, the lower rate is better on the validation split."""
    seen: list[Any] = []

    def run(command: list[str], **_: Any) -> Any:
        config = load(command[command.index("--config") + 1])
        seen.append(config)
        held_out_prefers = str(config.eval_data).endswith("validation.jsonl") == (config.lr == RATES[0])
        after = (1.0 if held_out_prefers else 1.5) * (1.1 if config.weights else 1.0) + config.seed / 100
        held = {"before": {"loss": 2.0}, "after": {"loss": after}}
        found = {
            "steps": config.steps, "seconds": 4.0, "state_bytes": 2**20, "peak_bytes": 1,
            "held_out": held, "general": {"before": 3.0, "after": 3.25},
        }  # fmt: skip
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(recipe.METHODS, "adamw", {"demo": recipe.Row("adamw", RATES)})
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
    assert len(calls) == 2 + 3 * 2  # the grid, then each variant with each seed
    assert {str(c.eval_data).rpartition("/")[2] for c in calls[:2]} == {"validation.jsonl"}
    judged = calls[2:]
    assert all(c.forgetting and c.steps == 10 for c in calls)
    assert {c.lr for c in judged} == {RATES[0]}  # which is the worse one on the held-out split
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
    for told in ("## demo", "1 thread a run", "2.0000", "| `adamw` | int8 | 0.0001 | 2 | 1.6550 +- 0.0050 |"):
        assert told in text
    assert "Validation loss of the grids: adamw 0.0001: 1.0000; adamw 0.0003: 1.5000." in text


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown strategy 'adamm'"):
        recipe.quality(tmp_path, methods=["adamm"])


def test_a_method_without_settings_here_has_what_its_record_recommends(tmp_path: Path) -> None:
    made = recipe.row("scratch", "mars")
    assert made.rates == (6e-3, 1.8e-2, 6e-2)
    assert dict(made.others) == {"betas": (0.95, 0.99), "weight_decay": 1e-2}
    assert recipe.row("demo", "mars").rates[0] == recipe.USUAL["demo"]  # nothing is recommended there
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
