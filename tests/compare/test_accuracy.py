"""The recipe of the accuracy table: fair rows, numbers that are right, and nothing run twice."""

from __future__ import annotations

import bz2
import importlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lowmem.errors import UserError
from lowmem.report.accuracy import markdown
from lowmem.training.zeroth.usual import usual_rate

ROOT = Path(__file__).parents[2]
recipe = importlib.import_module("lowmem.recipes.accuracy")


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    kinds = ("fresh", "rotten", "plot")
    lines = [f'{kinds[i % 3]},"a, film {i}",film {i // 3}' for i in range(120)]
    file = tmp_path / "reviews.csv.bz2"
    file.write_bytes(bz2.compress("\n".join(["category,text,movie_name", *lines]).encode()))
    return file


def test_no_film_is_on_both_sides(reviews: Path, tmp_path: Path) -> None:
    folder = recipe._data(reviews, tmp_path / "data", 5)
    sides = {}
    for name in ("train", "test"):
        sides[name] = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    assert (len(sides["train"]), len(sides["test"])) == (72, 5)  # four films of forty, at most five rows
    films = [{int(row["prompt"].split()[2]) // 3 for row in side} for side in sides.values()]
    assert not films[0] & films[1]
    assert sides["test"][0]["prompt"].endswith(" It was")
    assert {row["label"] for row in sides["train"]} == {" terrible", " great"}


def test_what_is_done_is_kept_and_told_with_its_error(
    reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(command: list[str], **_: Any) -> Any:
        calls.append(command)
        place = Path(command[command.index("--config") + 1])
        (place.parent / place.stem).mkdir(exist_ok=True)
        (place.parent / place.stem / "memory_report.json").write_text(
            '{"measured": {"peak": {"allocated": 2048}}}'
        )
        sides = {"before": {"accuracy": 0.5, "f1": 0.4}, "after": {"accuracy": 0.8, "f1": 0.7}}
        found = {"steps": 20, "seconds": 1.0, "state_bytes": 0, "held_out": sides, "peak_bytes": 4096}
        return subprocess.CompletedProcess(command, 0, stdout=json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    options = {"runs": ["mezo"], "seeds": [0, 1], "share": 0.01}
    found = recipe.accuracy(reviews, tmp_path / "out", **options)
    again = recipe.accuracy(reviews, tmp_path / "out", **options)
    assert again == found
    assert len(calls) == 2
    (row,) = found["runs"]
    rows = found["rows"]
    assert row["error"] == pytest.approx((0.8 * 0.2 / rows) ** 0.5)
    assert row["above_zero_shot"] == pytest.approx(0.3 / ((0.16 + 0.25) / rows) ** 0.5)
    assert row["values"] == 40
    page = markdown(found)
    assert "| mezo (`noise=rademacher`) | 3e-05, constant | 20 | 80.0% +-" in page
    assert "Not yet run: lora, adamw, qzo nf4, fzoo." in page
    with pytest.raises(UserError, match="there is no 'mzo'"):
        recipe.accuracy(reviews, tmp_path / "out", runs=["mzo"])


def test_values_of_the_loss_are_told_beside_adapters() -> None:
    """A share of LoRA's memory and points of its accuracy; nothing is said of rows that have a gradient."""
    common = {
        "options": "",
        "lr": 1e-3,
        "schedule": "linear",
        "steps": 10,
        "error": 0.01,
        "f1": 0.7,
        "seconds": 5.0,
        "above_zero_shot": 4,
    }
    runs = [
        {**common, "name": "lora", "values": 0, "accuracy": 0.8, "measured_bytes": 1000},
        {**common, "name": "mezo", "values": 20, "accuracy": 0.7, "measured_bytes": 400},
    ]
    about = {
        "rows": 100,
        "words": 9,
        "batch_size": 4,
        "zero_shot": 0.5,
        "missing": [],
        "recomputed_bytes": 512,
        "machine": dict.fromkeys(("device", "date", "torch", "transformers", "python"), "x"),
    }
    page = markdown({**about, "runs": runs})
    assert "- `mezo`: -10.0 points after 20 values of the loss, in 40% of its memory" in page
    assert "Not 3 standard errors" not in page
    below = markdown({**about, "runs": [runs[0], {**runs[1], "above_zero_shot": 2.9}]})
    assert "Not 3 standard errors above zero-shot, so not shown to have learned: mezo." in below
    assert "the same steps of LoRA peak at 512 B" in page
    assert "Not yet run" not in page


def test_the_page_is_what_the_kept_document_says() -> None:
    """When this fails, run the recipe with --page docs/accuracy.md --of configs/measured/accuracy.json."""
    document = json.loads((ROOT / "configs" / "measured" / "accuracy.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8") == markdown(document)


def test_a_rate_that_is_not_given_falls_with_the_models_size(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    from lowmem.config import RunConfig

    def rate(model: str, optim: str, **more: Any) -> float:
        return usual_rate(RunConfig(model=model, optim=optim, **more))

    assert 2.5e-5 < rate("smollm2-135m", "mezo") < 3.5e-5
    assert 1e-7 < rate("llama-2-7b", "mezo") < 1e-6  # the paper's grid for models of its size
    assert rate("llama-2-7b", "adamw") == rate("llama-2-7b", "mezo", lora_rank=8) == 1e-4
    assert rate("smollm2-135m", "qzo", quantize="nf4") == 5e-3
    assert 1e-3 < rate("llama-2-7b", "qzo", quantize="nf4") < 3e-3  # the paper's in these units is 2e-3
    LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, vocab_size=64).save_pretrained(
        tmp_path
    )
    tiny = str(tmp_path)
    assert rate(tiny, "mezo") == 1e-4  # 4000 / weights would be 0.05: the loss of the first run was 1e7
    assert rate(tiny, "fzoo") == 1e-3
    assert rate("smollm2-135m", "fzoo") == 1e-3
    assert 5e-5 < rate("llama-2-7b", "fzoo") < 1e-4  # the paper's for thirteen billion is 5e-5
    assert rate("llama-2-7b", "zo_adamu") == rate("llama-2-7b", "mezo", optim_args="rule=adam")
