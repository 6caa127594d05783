"""The frame around the commands: exit codes, one line on stderr, stdout kept for results."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.cli import render
from lowmem.errors import ConfigError, UserError

frame = importlib.import_module("lowmem.cli.app")  # as an attribute of the package, `app` is the Typer object
runner = CliRunner()


@pytest.fixture(autouse=True)
def unchanged_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in frame._ENVIRONMENT:
        monkeypatch.setenv(name, frame._ENVIRONMENT[name])


def application(command: Callable[..., None]) -> typer.Typer:
    """An app like lowmem's whose one command is `lowmem do`."""
    made = typer.Typer(cls=frame.Guarded, pretty_exceptions_enable=False)
    made.callback()(lambda: None)
    made.command("do")(frame._quiet(command))
    return made


def raising(error: BaseException) -> Callable[..., None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "stderr"),
    [
        (UserError("no model 'x';\n did you mean 'y'?"), 2, "error: no model 'x'; did you mean 'y'?\n"),
        (ConfigError(["lr: bad", "steps: bad"]), 2, "error: lr: bad\nerror: steps: bad\n"),
        (PermissionError(13, "Permission denied", "/out"), 2, "error: Permission denied: /out\n"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
    ],
)
def test_exit_codes(error: BaseException, code: int, stderr: str) -> None:
    done = runner.invoke(application(raising(error)), ["do"])
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", stderr)


def torch_save() -> BaseException:
    """What torch raises on a disk that is really full."""
    import torch

    try:
        torch.save({"a": torch.zeros(10**6)}, "/dev/full")
    except RuntimeError as error:
        return error
    pytest.fail("nothing was raised")


def wrapped(error: BaseException) -> BaseException:
    """As a compiler wraps what happened to it."""
    outer = RuntimeError("backend='inductor' raised:\nand many lines more")
    outer.__cause__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (lambda: OSError(28, "No space left on device"), "No space left on device"),
        (lambda: OSError(28, "No space left on device", "/out/loss.png"), "device: /out/loss.png"),
        (lambda: OSError(27, "File too large"), "File too large"),
        (
            lambda: FileNotFoundError(2, "No usable temporary directory found in ['/tmp']"),
            "No usable temporary",
        ),
        (lambda: RuntimeError("basic_ios::clear: iostream error"), "iostream error"),
        (
            lambda: RuntimeError("C++ compile error\n\nCommand:\ng++\ncc1plus: No space left on device"),
            "cc1plus: No",
        ),
        (lambda: wrapped(OSError(28, "No space left on device")), "No space left on device"),
        (torch_save, "inline_container"),
    ],
)
def test_a_full_disk_is_one_line_wherever_it_shows(error: Callable[[], BaseException], line: str) -> None:
    done = runner.invoke(application(raising(error())), ["do"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: out of room: ")
    assert line in done.stderr
    assert "TMPDIR" in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) <= 400


def test_a_damaged_file_is_no_full_disk() -> None:
    reader = "[enforce fail at inline_container.cc:230] . PytorchStreamReader failed reading zip archive"
    assert runner.invoke(application(raising(RuntimeError(reader))), ["do"]).exit_code == 1


def test_our_fault_shows_the_traceback() -> None:
    done = runner.invoke(application(raising(ZeroDivisionError("oops"))), ["do"])
    assert done.exit_code == 1
    assert done.stdout == ""
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: oops" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "stderr"),
    [
        (["stratgies"], "did you mean 'strategies'?"),
        (["strategies", "--jsn"], "--json"),
        (["cp", "demo"], "Missing argument"),
        (["models", "gpt2"], "unexpected extra argument"),
    ],
)
def test_usage_errors_are_one_line(arguments: list[str], stderr: str) -> None:
    done = runner.invoke(cli.app, arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert stderr.lower() in done.stderr.lower()
    assert done.stderr.count("\n") == 1


def test_stdout_holds_the_document_alone(capfd: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        print("third party")
        warnings.warn("deprecated", FutureWarning, stacklevel=1)
        render.emit({"nan": float("nan"), "path": os.devnull, "tuple": (1, True, None)}, None, True)
        print("more")

    done = runner.invoke(application(command), ["do"])
    assert json.loads(done.stdout) == {"nan": None, "path": os.devnull, "tuple": [1, True, None]}
    assert done.stderr == "third party\nmore\n"


def test_output_of_child_processes_and_c_code_goes_to_stderr() -> None:
    code = (
        "import importlib, os, subprocess, sys, typer\n"
        "from lowmem.cli import render\n"
        "frame = importlib.import_module('lowmem.cli.app')\n"
        "def command():\n"
        "    os.write(1, b'from C')\n"
        "    subprocess.run([sys.executable, '-c', 'print(\"from a child\")'], check=True)\n"
        "    render.emit({'a': 1}, None, True)\n"
        "made = typer.Typer(cls=frame.Guarded)\n"
        "made.callback()(lambda: None)\n"
        "made.command('do')(frame._quiet(command))\n"
        "made(['do'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"a": 1}
    assert "from C" in done.stderr
    assert "from a child" in done.stderr


def test_own_warnings_are_shown_as_one_line() -> None:
    def command() -> None:
        for module in ("lowmem.memory.plan", "transformers.trainer"):
            warnings.warn_explicit(f"from\n{module}", UserWarning, "file.py", 1, module=module)

    done = runner.invoke(application(command), ["do"])
    assert done.stderr == "warning: from lowmem.memory.plan\n"


def test_a_closed_pipe_is_no_fault() -> None:
    code = (
        "import os\nfrom lowmem.cli import app\n"
        "read, write = os.pipe()\nos.close(read)\nos.dup2(write, 1)\napp(['models'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "")


def test_threads_are_told_to_spin_briefly_before_torch_is_loaded() -> None:
    code = (
        "import os, sys\nfrom lowmem.cli import app\n"
        "try: app(['models', '--json'])\n"
        "except SystemExit: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules, file=sys.stderr)"
    )
    environment = {k: v for k, v in os.environ.items() if k not in frame._ENVIRONMENT}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "30000 False\n"
    environment["GOMP_SPINCOUNT"] = "1000"  # the user's own value wins
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == "1000 False\n"


def commands() -> Iterator[str]:
    yield from (info.name for info in cli.app.registered_commands if info.name)


@pytest.mark.parametrize("name", sorted(commands()))
def test_every_command_has_help_and_json(name: str) -> None:
    done = runner.invoke(cli.app, [name, "--help"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    assert "--json" in done.stdout
    assert done.stderr == ""


def test_the_commands_of_the_design_exist() -> None:
    expected = "finetune plan profile compare calibrate strategies models gpus cp validate env"
    expected += " merge chat generate export check replay"
    assert set(commands()) == set(expected.split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (1023, "1023 B"), (489245184, "466.6 MiB"), (2**40, "1.0 TiB"), (None, "-")],
)
def test_sizes(value: Any, text: str) -> None:
    assert render.size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.04, "0.0 s"), (59.4, "59.4 s"), (137.2, "2 min 17 s"), (7260, "2 h 1 min"), (None, "-")],
)
def test_durations(value: Any, text: str) -> None:
    assert render.seconds(value) == text


def test_a_document_takes_plain_values_only() -> None:
    with pytest.raises(TypeError, match="object does not belong in a JSON document"):
        render.plain({"a": object()})


def test_one_of_several_processes_leaves_without_the_interpreters_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads of a process group would abort it; what is registered for the end still runs."""
    app = importlib.import_module("lowmem.cli.app")
    seen: list[Any] = []
    monkeypatch.setattr(app, "_joined", True)
    monkeypatch.setattr(app.atexit, "_run_exitfuncs", lambda: seen.append("registered"))
    monkeypatch.setattr(app.os, "_exit", seen.append)
    app._leave(3)
    assert seen == ["registered", 3]


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", ["--version", "gpus", "gpus --json"])
def test_a_closed_output_is_no_fault(closed, words):
    command = f"{shlex.quote(sys.executable)} -m lowmem {words} {closed}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
