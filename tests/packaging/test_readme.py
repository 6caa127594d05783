"""The README keeps its promises: its table is the registry's, its commands are those that run."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

import lowmem.cli as cli

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_table_of_strategies_is_the_registry() -> None:
    """When this fails, put the output of `lowmem strategies --markdown` between the two comments."""
    block = re.search(r"<!-- strategies: .*? -->\n(.*?)<!-- end of strategies -->", README, re.DOTALL)
    assert block
    done = CliRunner().invoke(cli.app, ["strategies", "--markdown"])
    assert done.exit_code == 0, done.output
    assert block[1].strip() == done.stdout.strip()


def lowmem_commands() -> list[list[str]]:
    parts = [part for line in SHELL for part in line.split("#")[0].split("&&")]
    return [shlex.split(part)[1:] for part in parts if part.strip().startswith("lowmem ")]


def test_commands_use_flags_that_exist() -> None:
    assert len(lowmem_commands()) >= 5
    for name, *arguments in lowmem_commands():
        help_text = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "300"}).stdout
        for flag in (argument for argument in arguments if argument.startswith("--")):
            assert f"{flag} " in help_text, f"lowmem {name} has no {flag}"


def test_commands_are_short_and_need_no_input() -> None:
    """One line each: they are pasted, and .ci/run takes the second out of this file."""
    setups = [line for line in SHELL if line.startswith("python3 -m venv .venv ")]
    assert len(setups) == 2
    assert setups[0].endswith("lowmem finetune --model smollm2-135m --optim galore")
    assert setups[1].endswith("&& pytest -n 2")
    assert all("-c constraints.txt" in line for line in setups)


def test_ci_runs_the_test_command() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script
    pattern = re.search(r"grep -m 1 -E '(.*?)' README.md", script)
    assert pattern
    found = subprocess.run(
        ["grep", "-m", "1", "-E", pattern[1], "README.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.rstrip("\n").endswith("&& ruff format --check && ruff check && mypy && pytest -n 2")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_constraints_name_every_dependency() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {line.split("==")[0].lower() for line in lines if "==" in line}
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["docs"]]
    assert {re.split(r"[><=[]", name)[0].lower() for name in wanted} - {"lowmem"} <= pinned
    assert not [line for line in lines if "+cpu" in line], "PyPI has no +cpu builds"


@pytest.mark.parametrize("line", [line for line in README.splitlines() if "](" in line])
def test_links_are_absolute_or_lead_somewhere(line: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", line):
        assert target.startswith("https://") or (ROOT / target).exists(), target
