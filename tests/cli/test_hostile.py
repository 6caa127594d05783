"""Files and flags made to do harm: one line of 300 characters, exit 2, nothing raw, nothing written."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lowmem.cli as cli
from lowmem.cli import render

runner = CliRunner()
DEEP = "[" * 100_000 + "]" * 100_000
DIGITS = "9" * 5000
STEER = "\x1b[2J\x1b]0;title\x07\x9b31m\r\u202egnp"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "a: &a {x: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


def is_raw(character: str) -> bool:
    return character != "\n" and (unicodedata.category(character) in ("Cc", "Cs") or character == "\u202e")


def refused(*arguments: str) -> str:
    """The line that refuses a command."""
    done = runner.invoke(cli.app, list(arguments))
    assert done.exit_code == 2, (done.exit_code, done.stderr[-300:], done.exception)
    assert not any(is_raw(character) for character in done.output)
    lines = done.stderr.splitlines()
    assert max(map(len, lines)) <= 300
    assert "Traceback" not in done.output
    return lines[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: " + DEEP, "nest more than"),
        ("- " * 50_000, "nest more than|not valid YAML|must map"),
        (f"steps: {DIGITS}", "5000 digits|digits"),
        (f"lr: {DIGITS}.0", "out of range|not a number"),
        (BOMB, "more than 10,000 values"),
        (MERGES, "more than 10,000 values"),
        ("a: &a [*a]", "more than 10,000 values|undefined alias"),
        ("? [a, b]\n: c", "unhashable|unknown setting"),
        ("date: 2026-99-99", "month|unknown"),
        ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("x" * 2**21, "characters, settings have at most"),
        (f"model: {json.dumps(STEER)}\noptim: adamw", "x1b"),
        ("", "must map names to values"),
    ],
)
def test_settings(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert re.search(words, refused("validate", str(tmp_path / "run.yaml")))
    out = tmp_path / "out"
    refused("finetune", "--config", str(tmp_path / "run.yaml"), "--output-dir", str(out))
    assert not out.exists()


def test_anchors_that_stand_for_little_are_read(tmp_path: Path) -> None:
    text = "a: &a {model: gpt2}\n<<: *a\noptim: adamw\n"
    (tmp_path / "run.yaml").write_text(text)
    assert "unknown setting 'a'" in refused("validate", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize("value", [DIGITS, "1e400", str(10**30), "-1", "nan", STEER])
@pytest.mark.parametrize(
    "flag",
    [
        "steps",
        "batch-size",
        "accumulation",
        "seq-len",
        "threads",
        "lora-rank",
        "eval-rows",
        "save-steps",
        "lr",
    ],
)
def test_flags_without_bounds(flags: list[str], tmp_path: Path, flag: str, value: str) -> None:
    assert flag in refused("finetune", *flags, f"--{flag}", value).replace("_", "-")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [DIGITS, str(10**30), STEER])
@pytest.mark.parametrize("flag", ["seq-len", "batch-size", "accumulation", "lora-rank", "budget", "gpu"])
def test_flags_of_a_plan(tiny_model: Path, flag: str, value: str) -> None:
    refused("plan", "--model", str(tiny_model), f"--{flag}", value)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"text": ' + DEEP + "}", "line 1 is not JSON: brackets nest"),
        ("a.jsonl", '{"text": "x", "n": ' + DIGITS + "}", "line 1 is not JSON: a number has 5000 digits"),
        ("a.jsonl", '{"text": "x", "n": ' + "[" * 500 + "]" * 500 + "}", "brackets nest"),
        ("a.json", DEEP, "is not JSON: brackets nest"),
        ("a.json", '{"train": ' + DEEP + "}", "is not JSON: brackets nest"),
        ("a.jsonl", json.dumps({STEER: "x"}), "fit no format"),
        ("a.jsonl", json.dumps({f"{STEER}{i}": "x" * 99 for i in range(999)}), "question, answer; text"),
        ("a.jsonl", json.dumps({"messages": [{"role": STEER * 99, "content": "x"}]}), "the role"),
        (f"{STEER[:8]}.jsonl", "nothing", "is not JSON"),
        ("a.csv", f"text,{STEER}\na,b,c,{STEER}\n", "line 3 has 4 fields"),
    ],
)
def test_data(flags: list[str], tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    assert re.search(words, refused("finetune", *flags, "--data", str(tmp_path / name)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora-targets": "nope"}, "cannot be attached: Target modules .'nope'"),
        ({"adapter-args": "init_lora_weights=nope"}, "cannot be attached: Unknown initialization"),
        ({"adapter-args": "target_modules=[nope"}, "cannot be read"),
        ({"adapter-args": "use_dora=maybe"}, "use_dora is true or false, got 'maybe'"),
    ],
)
def test_adapters_that_do_not_go_with_the_model(
    flags: list[str], tmp_path: Path, options: dict[str, str], words: str
) -> None:
    given = [part for name, value in options.items() for part in (f"--{name}", value)]
    assert re.search(words, refused("finetune", *flags, "--optim-args", "", "--lora-rank", "4", *given))
    assert not (tmp_path / "out").exists()


def test_one_name_is_a_list_where_peft_takes_lists_alone() -> None:
    from lowmem.memory.run import Run
    from lowmem.models.peft_methods import adapter_config

    made = adapter_config(Run(lora_rank=4, lora_alpha=2.5, adapter_args="modules_to_save=lm_head"))
    assert (made.modules_to_save, made.lora_alpha) == (["lm_head"], 2.5)


def test_a_run_prints_nothing_raw(flags: list[str], tmp_path: Path) -> None:
    rows = [{"question": f"{STEER} {i}?", "answer": f"{STEER}{i}", STEER: 1} for i in range(20)]
    file = tmp_path / f"{STEER[:8]}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = [*flags, "--data", str(file), "--steps", "1", "--prompt", STEER, "--no-report"]
    for more in ([], ["--json", "--overwrite"]):
        done: Result = runner.invoke(cli.app, ["finetune", *run, *more])
        assert done.exit_code == 0, done.output[-500:]
        assert not [character for character in done.stdout + done.stderr if is_raw(character)]
    assert json.loads(done.stdout)["samples"][0]["prompt"] == STEER


def test_lines_lose_their_middle() -> None:
    text = render.line("given " + "x" * 10**6 + " remedy")
    assert len(text) == render.LINE
    assert text.startswith("given ")
    assert text.endswith(" remedy")


def test_settings_of_every_kind_are_refused_together(flags: list[str]) -> None:
    """A rate out of range does not hide what is wrong with the method."""
    told = runner.invoke(cli.app, ["finetune", *flags, "--lr", "-1", "--optim-args", "foo=2"]).stderr
    assert "lr: -1 is out of range" in told
    assert "no option 'foo'" in told


def test_an_option_that_took_the_next_one_is_named(tiny_model: Path) -> None:
    told = refused("plan", "--model", str(tiny_model), "--optim", "galore", "--solve", "--gpu", "24GB")
    assert "--solve needs a value, got '--gpu'" in told
