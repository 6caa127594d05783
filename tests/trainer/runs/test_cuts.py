"""A run cut at every one of its file operations: its folder never mixes two runs, and can always be taken."""

from __future__ import annotations

import builtins
import io
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lowmem.models.sealed import MANIFEST, broken, seal
from lowmem.training.folder import checkpoint, output, staging

NOTES = "notes.md"
OWN = {NOTES, output.CONFIG, MANIFEST, *output.OWN}


class Cut(BaseException):
    """The end of the process."""


class Death:
    """Raises at the k-th operation that changes the disk, and at every one after it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.last = 0, None
        for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "chmod"):
            patch.setattr(os, name, self.wrapped(getattr(os, name)))
        patch.setattr(os, "fsync", self.wrapped(lambda handle: None))
        for module in (io, builtins):
            patch.setattr(module, "open", self.opening(io.open))

    def tick(self) -> None:
        self.now += 1
        if self.last is not None and self.now >= self.last:
            raise Cut

    def wrapped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            return original(*args, **kwargs)

        return call

    def opening(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """A file that was cut while it was written is there and empty."""

        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if mode.strip("rbt"):
                try:
                    self.tick()
                except Cut:
                    if self.now == self.last:
                        original(file, mode, *args, **kwargs).close()
                    raise
            return original(file, mode, *args, **kwargs)

        return call

    def at(self, last: int | None, run: Callable[[], None]) -> bool:
        """Run until the operation of this number; whether it was reached."""
        self.now, self.last = 0, last
        try:
            run()
        except Cut:
            return True
        finally:
            self.last = None
        return False


@pytest.fixture
def death(monkeypatch: pytest.MonkeyPatch) -> Iterator[Death]:
    with monkeypatch.context() as patch:
        yield Death(patch)


def train(folder: Path, tag: str, last: int = 4, **how: bool) -> None:
    """What a run does to its folder, with a word for each file."""
    with output.claim(folder, **{"resume": False, "overwrite": False} | how) as (start, _):
        output.begin(folder, tag, overwrite=how.get("overwrite", False))
        for step in range(checkpoint.step(start) + 2 if start else 2, last + 1, 2):
            staged = staging.fresh(folder) / f"checkpoint-{step}"
            staged.mkdir()
            for name in checkpoint.REQUIRED:
                (staged / name).write_text(tag)
            seal(staged, {})
            staging.publish(staged, folder / staged.name)
            checkpoint.rotate(folder, 1)
        with output.results(folder, {"steps": last}) as made:
            for name in ("model.safetensors", "loss.png", f"of_{tag}.json"):
                (made / name).write_text(f"{tag} {last}")


def results(folder: Path) -> dict[str, str]:
    """Name and content of all that is neither private nor a checkpoint."""
    return {p.name: p.read_text() for p in folder.iterdir() if p.name not in OWN and p.is_file()}


def check(folder: Path, notes: bool) -> None:
    """No two runs side by side, and what says that it is whole is."""
    assert not notes or (folder / NOTES).read_text() == "mine"
    found = results(folder) if folder.exists() else {}
    assert len(set(found.values())) <= 1, found
    if (folder / MANIFEST).exists():
        assert broken(folder) is None
        assert len(found) == 3
    tags = {text.split()[0] for text in found.values()}
    for saved in checkpoint.checkpoints(folder):
        assert checkpoint.damage(saved) is None, saved
        tags.add((saved / "optimizer.pt").read_text())
    assert len(tags) <= 1, tags
    if tags:
        assert (folder / output.CONFIG).read_text() in tags


def finish(folder: Path, how: str, last: int) -> None:
    """Take the folder and run to the end."""
    config = folder / output.CONFIG
    tag = config.read_text() if how == "resume" and config.is_file() else "c"
    train(folder, tag, last, **{how: True})
    assert results(folder) == dict.fromkeys(
        ("model.safetensors", "loss.png", f"of_{tag}.json"), f"{tag} {last}"
    )
    assert broken(folder) is None
    left = {p.name for p in folder.iterdir()} - {
        NOTES,
        "checkpoint-4",
    }  # cut before the last one's turn to go
    assert left == {*results(folder), MANIFEST, output.CONFIG, f"checkpoint-{last}"}


SECOND: dict[str, Callable[[Path], None]] = {
    "again": lambda folder: train(folder, "a", resume=True),
    "longer": lambda folder: train(folder, "a", 6, resume=True),
    "other": lambda folder: train(folder, "b", overwrite=True),
}


@pytest.mark.parametrize("case", ["first", *SECOND])
def test_a_cut_at_every_operation(tmp_path: Path, death: Death, case: str) -> None:
    before, folder = tmp_path / "before", tmp_path / "run"
    run = SECOND.get(case, lambda folder: train(folder, "a"))
    if case != "first":
        train(before, "a")
        (before / NOTES).write_text("mine")
    moment = 0
    while True:
        moment += 1
        shutil.rmtree(folder, ignore_errors=True)
        if before.exists():
            shutil.copytree(before, folder)
        if not death.at(moment, lambda: run(folder)):
            break
        check(folder, case != "first")
        for how in ("resume", "overwrite"):
            again = tmp_path / how
            shutil.copytree(folder, again) if folder.exists() else None
            # and once more, in the middle of what the first cut left to do
            death.at(1 + moment * 7 % 23, lambda again=again, how=how: finish(again, how, 6))
            check(again, case != "first")
            finish(again, how, 6)
            shutil.rmtree(again)
    assert moment > 30
