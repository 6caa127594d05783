"""`lowmem plan` at the command line: one document, one line per mistake, a run that finetune accepts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import BloomConfig
from typer.testing import CliRunner

import lowmem.cli as cli

runner = CliRunner()
SHORT = ["--seq-len", "64"]


def invoke(*arguments: str):
    return runner.invoke(cli.app, ["plan", *arguments])


def test_json_is_one_document_with_the_promised_keys(tiny_model: Path) -> None:
    done = invoke("--model", str(tiny_model), "--optim", "adamw,galore", *SHORT, "--budget", "1GiB", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert set(document) == {"model", "run", "budget_bytes", "plans"}
    assert {entry["strategy"] for entry in document["plans"]} == {"adamw", "galore"}
    for entry in document["plans"]:
        assert sum(entry["at_peak"].values()) == entry["peak"]["allocated"]


def test_table_report_and_run(tiny_model: Path, tmp_path: Path) -> None:
    page, run = tmp_path / "plan.html", tmp_path / "run.yaml"
    done = invoke(
        "--model", str(tiny_model), "--optim", "galore", "--optim-args", "rank=4", *SHORT, "--budget", "1GiB",
        "--solve", "batch-size", "--html", str(page), "--emit", str(run), "--data", "factbook",
        "--rows", "padded",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "largest batch size" in done.stdout
    assert "stopped by" in done.stdout
    assert "The peak of" in done.stdout
    assert page.read_text().startswith("<!doctype html>")
    assert runner.invoke(cli.app, ["validate", str(run)]).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "lama-7b"], "did you mean 'llama-7b'"),
        (["--model", "gpt2", "--gpu", "rtx4091"], "did you mean 'rtx4090'"),
        (["--model", "gpt2", "--optim", "galor"], "did you mean 'galore'"),
        (["--model", "gpt2", "--budget", "24GX"], "unknown unit 'GX'"),
        (["--model", "gpt2", "--optim", "adamw", "--force"], "give --emit FILE"),
        (["--model", "gpt2", "--solve", "seq-len"], "--gpu NAME or --budget"),
        (["--model", "gpt2", "--html", "/no/such/folder/x.html"], "does not exist"),
        (["--model", "gpt2", "--quantize", "nf4"], "lora_rank"),
        (["--model", "gpt2", "--gpu", "t4", "--budget", "4GiB"], "one of the two"),
        (["--model", "gpt2", "--gpu", "t4", "--device", "cpu"], "device is cpu"),
        (["--model", "gpt2", "--gpu", "t4", "--device", "cpu", "--optim", "adamw"], "device is cpu"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments: list[str], said: str) -> None:
    done = invoke(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_assumed_units_and_lengths_are_said(tiny_model: Path) -> None:
    done = invoke("--model", str(tiny_model), "--optim", "adamw", "--seq-len", "512", "--budget", "2")
    assert done.exit_code == 0, done.output
    assert "taken as GiB" in done.stderr
    assert "512" in done.stderr
    assert "256" in done.stderr


def test_data_says_how_long_rows_are(tiny_model: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": "a" * n}) + "\n" for n in (10, 20, 90, 5)))
    asked = ["--model", str(tiny_model), "--optim", "adamw", "--data", str(rows), *SHORT]
    done = invoke(*asked, "--rows", "padded", "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["lengths"]["rows"], document["lengths"]["cut"]) == (4, 1)
    assert document["run"]["seq_len"] == 64
    assert document["run"]["typical"] == document["lengths"]["typical"] < 64
    row = document["plans"][0]
    assert row["events"]["step of a typical batch"] <= row["peak"]["allocated"]
    done = invoke(*asked, "--rows", "full")
    assert done.exit_code == 2
    assert "--rows padded" in done.stderr


def test_a_run_that_does_not_fit_is_written_by_force_alone(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    asked = [
        "--model",
        str(tiny_model),
        "--optim",
        "adamw",
        *SHORT,
        "--batch-size",
        "2048",
        "--budget",
        "1GiB",
    ]
    done = invoke(*asked, "--emit", str(run))
    assert done.exit_code == 2
    assert "misses by" in done.stderr
    assert not run.exists()
    assert invoke(*asked, "--emit", str(run), "--force").exit_code == 0
    assert run.exists()


def test_a_run_without_data_asks_for_it(tiny_model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    assert invoke("--model", str(tiny_model), "--optim", "adamw", *SHORT, "--emit", str(run)).exit_code == 0
    assert "factbook" not in run.read_text().split("data:")[1].splitlines()[0].split("#")[0]
    for command in (
        ["validate", str(run)],
        ["finetune", "--config", str(run), "--output-dir", str(tmp_path / "o")],
    ):
        done = runner.invoke(cli.app, command)
        assert done.exit_code == 2
        assert "data: none is named; give --data" in done.stderr
    mine = [*command, "--data", "/no/such/rows.jsonl"]
    assert "rows.jsonl" in runner.invoke(cli.app, mine).stderr


def test_a_run_of_a_model_that_cannot_be_packed_is_written_padded(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    BloomConfig(**sizes).save_pretrained(tmp_path)
    run = tmp_path / "run.yaml"
    asked = ["--model", str(tmp_path), "--optim", "adamw", "--seq-len", "16", "--emit", str(run)]
    done = invoke(*asked)
    assert done.exit_code == 2, done.output
    assert "plan with --rows padded" in done.stderr
    assert not run.exists()
    assert invoke(*asked, "--rows", "padded").exit_code == 0
    assert "packing: false" in run.read_text()
