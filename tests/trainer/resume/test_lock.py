"""Two runs never write to one folder; a lock that nobody holds any more is taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import trainer

from lowmem.errors import UserError
from lowmem.training.folder import lock, staging
from lowmem.training.folder.output import claim

HOLDER = """
import sys, time
from pathlib import Path
from lowmem.training.folder.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    words = [sys.executable, "-c", HOLDER, str(tmp_path)]
    said = tmp_path.with_suffix(".stderr")  # beside the folder, which the tests list
    with (
        said.open("w") as stderr,
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=stderr, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()  # waits until the folder is held, or the process has ended
            assert line == "held\n", said.read_text()
            yield process
        finally:
            process.kill()


def owner(folder: Path) -> dict[str, object]:
    return json.loads((folder / lock.LOCK).read_text())


def test_a_second_run_is_refused_with_process_and_machine(
    tmp_path: Path, other: subprocess.Popen[str]
) -> None:
    (staging.staging(tmp_path) / "checkpoint-8").mkdir(parents=True)  # what the first is writing just now
    words = rf"in use by process {other.pid} on \S+; wait for that run, or name another folder"
    with pytest.raises(UserError, match=words), claim(tmp_path, resume=True, overwrite=False):
        pytest.fail("claimed")
    for resume in (True, None):
        with pytest.raises(UserError, match=words):
            trainer(tmp_path, optim="adamw", max_steps=1).train(resume_from_checkpoint=resume)
    assert owner(tmp_path)["pid"] == other.pid
    assert (staging.staging(tmp_path) / "checkpoint-8").is_dir()


def test_what_a_killed_run_left_is_taken(tmp_path: Path, other: subprocess.Popen[str]) -> None:
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert owner(tmp_path)["pid"] == other.pid
    with claim(tmp_path, resume=False, overwrite=False):
        assert owner(tmp_path)["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("written", "free"),
    [
        ("", True),
        ("{", True),
        ("[]", True),
        ({"pid": os.getpid()}, True),  # of this process before it was started anew: the number came back
        ({"boot": "another start of this machine"}, True),
        ({"host": "a container of this machine"}, True),
        ({"host": "elsewhere", "boot": "elsewhere"}, False),
    ],
)
def test_only_what_another_machine_has_written_counts(
    tmp_path: Path, written: str | dict[str, object], free: bool
) -> None:
    text = written if isinstance(written, str) else json.dumps(lock._owner() | {"pid": 7} | written)
    (tmp_path / lock.LOCK).write_text(text)
    if free:
        with lock.held(tmp_path):
            assert owner(tmp_path) == lock._owner()
        assert list(tmp_path.iterdir()) == []
        return
    words = rf"process 7 on elsewhere, another machine; .* delete .*{lock.LOCK}"
    with pytest.raises(UserError, match=words), lock.held(tmp_path):
        pytest.fail("held")
    assert (tmp_path / lock.LOCK).read_text() == text


def test_a_file_system_without_locks_goes_by_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    path = tmp_path / lock.LOCK
    path.write_text(json.dumps(lock._owner() | {"pid": os.getppid()}))
    with pytest.raises(UserError, match="wait for that run"), lock.held(tmp_path):
        pytest.fail("held")
    path.write_text(json.dumps(lock._owner() | {"pid": 1 << 30}))
    with lock.held(tmp_path):
        assert owner(tmp_path)["pid"] == os.getpid()


def test_a_lock_is_never_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / lock.LOCK).symlink_to(tmp_path / "mine")
    with lock.held(folder):
        assert owner(folder)["pid"] == os.getpid()
    assert (tmp_path / "mine").read_text() == "precious"


def test_one_run_holds_its_folder_once(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        with lock.held(tmp_path / "." / ""):
            pass
        assert owner(tmp_path)["pid"] == os.getpid()
