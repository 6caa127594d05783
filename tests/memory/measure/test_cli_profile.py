"""`lowmem profile`, `compare` and `calibrate` from the command line: one document, one line per mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import lowmem.cli as cli
from tests.trainer import tiny_folder

runner = CliRunner()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cli")
    model = tiny_folder.make_model(folder / "model")
    rows = tiny_folder.make_rows(folder / "rows.jsonl")
    return ["--model", str(model), "--data", str(rows), "--dtype", "float32", "--seq-len", "128"]


def lowmem(*arguments: str) -> Result:
    return runner.invoke(cli.app, list(arguments))


def test_profile_prints_predicted_beside_measured(shared: list[str], tmp_path: Path) -> None:
    page = tmp_path / "profile.html"
    flags = ["--optim", "galore", "--optim-args", "rank=4", "--budget", "1GiB", "--html", str(page), "--json"]
    done = lowmem("profile", *shared, *flags)
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    measured, predicted = found["measured"], found["predicted"]
    assert set(predicted) >= {
        "strategy",
        "options",
        "state_bytes",
        "at_peak",
        "peak",
        "event",
        "events",
        "why",
    }
    assert set(measured) >= set(predicted) - {"levers", "verdict", "max_seq_len", "max_batch_size"}
    assert (measured["strategy"], measured["options"]["rank"]) == ("galore", 4)
    assert measured["state_bytes"] == predicted["state_bytes"]
    assert abs(found["error_percent"]["peak_allocated"]) < 1.0
    assert measured["fits"] is True
    assert found["budget_bytes"] == 1 << 30
    assert len(found["steps"]) == 3
    assert "Predicted for the batch of the tracked step" in found["assumptions"][0]
    assert f'data-bytes="{measured["peak"]["allocated"]}"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "galor"], "did you mean 'galore'"),
        (["--optim", "adamw", "--steps", "0"], "steps: 0 is out of range"),
        (["--optim", "adamw", "--gpu", "t4", "--budget", "1GiB"], "gpu and budget: give one of the two"),
        (["--optim", "adamw", "--gpu", "rtx9999"], "unknown GPU 'rtx9999'"),
        (["--optim", "adamw", "--html", "missing/folder/x.html"], "the folder missing/folder does not exist"),
    ],
)
def test_profile_says_what_is_wrong_in_one_line(shared: list[str], flags: list[str], message: str) -> None:
    done = lowmem("profile", *shared, *flags)
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--optim", "adamw,galor", "--steps", "2"], "did you mean 'galore'"),
        (["--optim", "adamw(rank=4)", "--steps", "2"], "rank"),
        (["--optim", "adamw"], "a comparison needs a budget"),
        (["--optim", "adamw", "--steps", "2", "--seeds", "a"], "seeds 'a' are no whole numbers"),
    ],
)
def test_compare_says_what_is_wrong_before_it_starts(
    shared: list[str], tmp_path: Path, flags: list[str], message: str
) -> None:
    done = lowmem("compare", *shared, *flags, "--output-dir", str(tmp_path / "out"))
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_calibrate_without_a_gpu_is_one_line() -> None:
    done = lowmem("calibrate")
    assert (done.exit_code, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
