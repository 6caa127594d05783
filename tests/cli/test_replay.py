"""`lowmem replay`: what a run left is enough to rebuild its weights, and nothing else passes for it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

import lowmem.cli as cli

runner = CliRunner()


@pytest.fixture
def run(flags: list[str], tmp_path: Path) -> Path:
    """The folder of a finished run of mezo."""
    values = dict(zip(flags[::2], flags[1::2], strict=True))
    values |= {"--optim": "mezo", "--accumulation": "2"}
    del values["--optim-args"]
    done = runner.invoke(cli.app, ["finetune", *(x for pair in values.items() for x in pair), "--no-report"])
    assert done.exit_code == 0, done.output
    return tmp_path / "out"


def test_replay_rebuilds_the_weights_bit_for_bit(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Of the finished run, and of its checkpoint by the first steps alone; the base is another model."""
    again = ["replay", "--model", str(tiny_model), "--log", str(run / "zo_log.safetensors")]
    done = runner.invoke(cli.app, [*again, "--output-dir", str(tmp_path / "again"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["steps"] == 4
    wanted = (run / "model.safetensors").read_bytes()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == wanted
    base = (tiny_model / "model.safetensors").read_bytes()
    assert base != wanted
    part = runner.invoke(cli.app, [*again, "--steps", "2", "--output-dir", str(tmp_path / "part")])
    assert part.exit_code == 0, part.output
    two, saved = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "part", run / "checkpoint-2")
    )
    assert all(two[name].equal(saved[name]) for name in two)
    assert (run / "checkpoint-2" / "zo_log.safetensors").stat().st_size < 8192


def test_what_is_not_the_log_of_this_base_exits_with_two(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    log = str(run / "zo_log.safetensors")
    for arguments, said in (
        (["--model", str(run), "--log", log], "the log starts from other weights"),
        (["--model", str(tiny_model), "--log", str(run / "model.safetensors")], "is not the log of a run"),
        (["--model", str(tiny_model), "--log", str(run / "none")], "is not the log of a run"),
        (["--model", str(tiny_model), "--log", log, "--steps", "9"], "the log has 4"),
    ):
        done = runner.invoke(cli.app, ["replay", *arguments, "--output-dir", str(tmp_path / "new")])
        assert (done.exit_code, len(done.stderr.strip().splitlines()[-1:])) == (2, 1)
        assert said in " ".join(done.stderr.split())
        assert not (tmp_path / "new").exists()
    done = runner.invoke(
        cli.app, ["replay", "--model", str(tiny_model), "--log", log, "--output-dir", str(run)]
    )
    assert done.exit_code == 2
    assert "holds something already" in " ".join(done.stderr.split())
