"""Broken model folders and edited checkpoints at the command line: one line, exit 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.cli import render
from tests.models.test_broken import CONFIGS, FILES, broken
from tests.models.test_broken import whole as whole  # a fixture

runner = CliRunner()


def refused(*arguments: str) -> str:
    """The line that refuses a command."""
    done = runner.invoke(cli.app, list(arguments))
    assert done.exit_code == 2, (done.exit_code, done.stderr[-300:], done.exception)
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert len(last) <= render.LINE
    assert "error:" in last
    return last


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_plan_refuses_a_broken_folder(whole: Path, tmp_path: Path, kind: str) -> None:
    folder = broken(whole, tmp_path, CONFIGS[kind][0])
    refused("plan", "--model", folder, "--optim", "adamw", "--seq-len", "8")


@pytest.mark.parametrize("kind", FILES)
def test_a_run_refuses_a_broken_folder(flags: list[str], whole: Path, tmp_path: Path, kind: str) -> None:
    folder = broken(whole, tmp_path, FILES[kind][0])
    refused("finetune", *flags, "--model", folder)
    assert not (tmp_path / "out").exists()


def another_byte(folder: Path) -> None:
    path = folder / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def another_number(folder: Path) -> None:
    path = folder / "trainer_state.json"
    path.write_text(path.read_text().replace('"global_step": 2', '"global_step": 3'))


def another_setting(folder: Path) -> None:
    path = folder / "manifest.json"
    said = json.loads(path.read_text())
    said["about"]["settings"]["lr"] = 7.0
    path.write_text(json.dumps(said))


def no_settings(folder: Path) -> None:
    path = folder / "manifest.json"
    said = json.loads(path.read_text())
    del said["about"]["settings"]
    path.write_text(json.dumps(said))


def other_weights(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


EDITS: dict[Callable[[Path], None], str] = {
    another_byte: "optimizer.pt is not what was written",
    another_number: "trainer_state.json is not what was written",
    another_setting: "manifest.json is not what was written",
    no_settings: "manifest.json is not what was written",
    other_weights: "pytorch_model.bin was added",
}


def test_an_edited_checkpoint_is_named_when_it_is_resumed(flags: list[str], tmp_path: Path) -> None:
    done = runner.invoke(cli.app, ["finetune", *flags, "--steps", "2", "--no-report"])
    assert done.exit_code == 0, done.stderr[-500:]
    whole = tmp_path / "whole"
    shutil.move(tmp_path / "out", whole)
    for edit, said in EDITS.items():
        shutil.copytree(whole, tmp_path / "out")
        edit(tmp_path / "out" / "checkpoint-2")
        assert said in refused("finetune", *flags, "--resume", "--no-report"), edit.__name__
        shutil.rmtree(tmp_path / "out")
