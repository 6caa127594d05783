"""The commands that list, check and copy; what they print for people and as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import lowmem
import lowmem.cli as cli
from lowmem.cli._progress import Bars
from lowmem.models.entries import available_models
from lowmem.strategies import parts
from lowmem.strategies.parts import KINDS

runner = CliRunner()


def document(*arguments: str) -> Any:
    """What a command prints with --json, and nothing else."""
    done = runner.invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    assert done.stderr == ""
    return json.loads(done.stdout)


def refused(*arguments: str) -> str:
    """The one line of an error that the user can mend."""
    done = runner.invoke(cli.app, list(arguments))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_strategies_lists_the_registry_with_exact_state() -> None:
    import torch

    listed = document("strategies")
    assert [entry["name"] for entry in listed] == list(lowmem.available())
    for entry in listed:
        strategy = lowmem.create(entry["name"])
        assert entry["state_bytes"] == lowmem.state_bytes(strategy, tuple(entry["shape"]), torch.bfloat16)
    text = runner.invoke(cli.app, ["strategies"]).stdout
    assert all(name in text for name in lowmem.available())


@pytest.mark.parametrize("name", list(lowmem.available()))
def test_one_strategy_with_its_options(name: str) -> None:
    detail = document("strategies", name)
    options = {option["name"]: option["default"] for option in (*detail["axes"], *detail["options"])}
    assert options == {o.name: o.default for o in lowmem.available()[name].options.values()}
    text = runner.invoke(cli.app, ["strategies", name], env={"COLUMNS": "300"})
    assert text.exit_code == 0
    assert all(option in text.stdout for option in options)


def test_parts_of_every_axis() -> None:
    listed = document("strategies", "--parts")
    assert {kind: [one["name"] for one in found] for kind, found in listed.items()} == {
        kind: list(parts(kind)) for kind in KINDS
    }
    text = runner.invoke(cli.app, ["strategies", "--parts"], env={"COLUMNS": "300"}).stdout
    assert all(one["name"] in text for found in listed.values() for one in found)
    assert "leave galore or --parts out" in refused("strategies", "galore", "--parts")


def test_unknown_strategy() -> None:
    assert "unknown strategy 'galor'; did you mean 'galore'?" in refused("strategies", "galor")


def test_models() -> None:
    listed = document("models")
    assert [entry["name"] for entry in listed] == list(available_models())
    assert "smollm2-135m" in runner.invoke(cli.app, ["models"]).stdout


def test_validate_says_all_problems_and_leaves_with_2(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("model: smollm2-135m\noptim: galore\noptim_args: {rank: 8}\n", encoding="utf-8")
    assert runner.invoke(cli.app, ["validate", str(good)]).exit_code == 0
    checked = document("validate", str(good))
    assert (checked["valid"], checked["resolved"]["optim_args"]) == (True, "rank=8")

    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "modle: smollm2-135m\nmodel: smollm-135m\noptim: galore\noptim_args: {rnk: 8}\nlr: -1\n"
        "data_format: alpacca\nsteps: 3\nepochs: 1\n",
        encoding="utf-8",
    )
    done = runner.invoke(cli.app, ["validate", str(bad), "--json"])
    assert done.exit_code == 2
    problems = "\n".join(json.loads(done.stdout)["problems"])
    for expected in (
        "did you mean 'model'?",
        "did you mean 'smollm2-135m'?",
        "did you mean 'rank'?",
        "lr: -1 is out of range",
        "did you mean 'alpaca'?",
        "steps and epochs",
    ):
        assert expected in problems
    assert done.stderr.count("\n") == 6


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("gradient_checkpointing: true", "gradient_checkpointing: mezo works without gradients"),
        ("gradient_release: true", "gradient_release: mezo works without gradients"),
        ("clip: global", "clip: mezo works without gradients"),
    ],
)
def test_what_a_strategy_without_gradients_excludes(line: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: gpt2\noptim: mezo\n{line}\n", encoding="utf-8")
    assert problem in refused("validate", str(tmp_path / "run.yaml"))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("rank=0", "rank"),
        ("rank=-4", "rank"),
        ("rank=ten", "rank is a whole number from 1 on, or a share between 0 and 1, got 'ten'"),
        ("states=int7", "did you mean 'int"),
        ("rank", "key=value"),
        ("writer=kahan", "writer=kahan is for weights of 16 bits"),
        ("writer=kahn", "did you mean 'kahan'"),
    ],
)
def test_bad_options_of_a_strategy(options: str, problem: str, tmp_path: Path) -> None:
    text = f"model: gpt2\ndtype: float32\noptim: galore\noptim_args: {options}\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    assert problem in refused("validate", str(tmp_path / "run.yaml"))


def test_shipped_configurations_are_valid() -> None:
    """But for the data that they wait for: a file of the user's."""
    for file in (Path(__file__).resolve().parents[2] / "configs" / "runs").glob("*.yaml"):
        done = runner.invoke(cli.app, ["validate", file.stem, "--json"])
        found = json.loads(done.stdout)["problems"]
        assert all(text.startswith("data: no file or folder 'conversations.jsonl'") for text in found), file


def problems(config: Path) -> list[str]:
    done = runner.invoke(cli.app, ["validate", str(config), "--json"])
    assert done.exit_code == 2, done.output
    found: list[str] = json.loads(done.stdout)["problems"]
    return found


def test_every_option_and_the_data_are_looked_at_together(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(
        "model: gpt2\noptim: galore\ndata: absent.jsonl\n"
        "optim_args: {rank: 0, projecter: power, states: int3}\n",
        encoding="utf-8",
    )
    data, optim = problems(bad)
    assert "absent.jsonl" in data
    assert all(word in optim for word in ("'projecter'", "'int3'", "rank is a whole number"))


def test_validate_refuses_what_training_would(tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text("model: gpt2\noptim: frugal\ngradient_release: true\naccumulation: 2\n", encoding="utf-8")
    (problem,) = problems(bad)
    assert "take accumulation 1, no gradient release, or galore" in problem


@pytest.mark.parametrize("name", ["finetune", "measure", "compare"])
def test_a_copied_recipe_says_how_it_is_run(name: str, tmp_path: Path) -> None:
    target = tmp_path / "my.py"
    told = runner.invoke(cli.app, ["cp", name, str(target)])
    assert f"run it: python {target} --help" in " ".join(told.stdout.split()).replace("\n", "")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, target, *arguments], capture_output=True, text=True)

    assert "YAML file" in run("--help").stdout
    assert run().returncode == 2
    wrong = run(*["absent.yaml", "galore", str(tmp_path / "out")][: 3 if name == "compare" else 1])
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "cannot read config 'absent.yaml'" in wrong.stderr


@pytest.mark.parametrize("there", [True, False])
def test_cp_never_writes_through_a_link(tmp_path: Path, there: bool) -> None:
    elsewhere, target = tmp_path / "elsewhere", tmp_path / "demo.yaml"
    if there:
        elsewhere.write_text("precious", encoding="utf-8")
    target.symlink_to(elsewhere)
    assert "exists" in refused("cp", "demo", str(target))
    assert runner.invoke(cli.app, ["cp", "demo", str(target), "--overwrite"]).exit_code == 0
    assert not target.is_symlink()
    assert elsewhere.exists() == there
    assert not there or elsewhere.read_text(encoding="utf-8") == "precious"
    assert {path.name for path in tmp_path.iterdir()} == {"demo.yaml", *(["elsewhere"] if there else [])}


def test_cp_copies_and_refuses_to_replace(tmp_path: Path) -> None:
    copied = document("cp", "demo", str(tmp_path))
    target = tmp_path / "demo.yaml"
    assert copied["destination"] == str(target)
    target.write_text("mine", encoding="utf-8")
    assert "exists" in refused("cp", "demo", str(target))
    assert target.read_text(encoding="utf-8") == "mine"
    assert runner.invoke(cli.app, ["cp", "demo", str(target), "--overwrite"]).exit_code == 0
    assert target.read_text(encoding="utf-8").startswith("# lowmem finetune --config")
    assert "there is no folder" in refused("cp", "demo", str(tmp_path / "absent" / "demo.yaml"))
    assert "did you mean 'demo'?" in refused("cp", "demmo", str(tmp_path))


def test_a_missing_config_names_the_shipped_ones() -> None:
    assert "demo" in refused("validate", "absent.yaml")


def test_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no calibration of this machine
    cards = {card["name"]: card for card in document("gpus")}
    assert 20 * 2**30 < cards["rtx4090"]["capacity"] < cards["rtx4090"]["usable"] < 24 * 2**30
    assert not any(card["calibrated"] for card in cards.values())
    assert "rtx4090" in runner.invoke(cli.app, ["gpus"]).stdout


def test_cp_lists_what_can_be_copied() -> None:
    listed = {entry["name"]: entry for entry in document("cp")}
    assert listed["finetune"]["kind"] == "recipe"
    assert listed["demo"]["kind"] == "config"
    assert all(entry["about"] for entry in listed.values())
    assert "missing argument DEST: lowmem cp finetune DEST" in refused("cp", "finetune")


def test_env_tells_versions_and_devices() -> None:
    from importlib.metadata import version

    import torch

    told = document("env")
    assert told["packages"]["torch"] == version("torch")
    assert told["packages"]["lowmem"] == lowmem.__version__
    assert len(told["devices"]) == torch.cuda.device_count()
    assert told["memory_bytes"] > 2**30
    assert version("transformers") in runner.invoke(cli.app, ["env"]).stdout


def test_env_tells_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    told = document("env")
    assert told["variables"]["HF_HUB_OFFLINE"] == "1"
    assert "hf_secret" not in json.dumps(told)


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "lowmem", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, f"lowmem {lowmem.__version__}")
    wrong = subprocess.run([sys.executable, "-m", "lowmem", "palm"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lowmem ge", "generate"),
        ("lowmem cp fine", "finetune"),
        ("lowmem finetune --model smollm2-1", "smollm2-135m"),
        ("lowmem finetune --optim galo", "galore"),
        ("lowmem finetune --dtype bfl", "bfloat16"),
        ("lowmem finetune --gradient-ch", "--gradient-checkpointing"),
    ],
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    words = {"_LOWMEM_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    done = runner.invoke(cli.app, [], env=words, prog_name="lowmem")
    assert offered in done.stdout.split(), done.output


def test_a_rate_is_never_shown_as_zero(capsys):
    with Bars() as bars:
        bars.start("train", 2)
        bars.advance(1, {"loss": 1.5, "tokens_per_second": 0.01})  # the first step compiles
        bars.advance(2, {"loss": 1.5, "tokens_per_second": 0.34})
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first.endswith("loss 1.500")
    assert second.endswith("loss 1.500, 0.3 tokens/s")
