"""What lowmem did not write is never replaced or deleted, and links do not lead out of a run's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import trainer

from lowmem.errors import CheckpointError, UserError
from lowmem.models.sealed import MANIFEST, about, broken, seal
from lowmem.training.folder import checkpoint, output, staging

RUN: dict[str, Any] = {"optim": "adamw", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder beside the run's, with something in it."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "mine").write_text("precious")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / output.CONFIG).write_text("optim: adamw")
    return folder


def untouched(outside: Path) -> bool:
    return [p.read_text() for p in outside.iterdir()] == ["precious"]


def sealed(run: Path, step: int) -> Path:
    """A checkpoint with stand-in contents."""
    staged = staging.fresh(run) / f"checkpoint-{step}"
    staged.mkdir()
    for name in checkpoint.REQUIRED:
        (staged / name).write_text(name)
    seal(staged, {})
    staging.publish(staged, run / staged.name)
    staging.recover(run)
    return run / staged.name


def test_a_staging_folder_that_is_a_link_is_not_followed(run: Path, outside: Path) -> None:
    staging.staging(run).symlink_to(outside)
    trainer(run, **RUN).train()
    assert untouched(outside)
    staging.staging(run).symlink_to(outside)
    assert checkpoint.newest(run)[0] == run / "checkpoint-4"
    staging.staging(run).symlink_to(outside)
    with output.results(run, {}) as made:
        (made / "model.safetensors").write_text("weights")
    assert untouched(outside)
    assert not staging.staging(run).exists()


def test_results_and_settings_replace_links_and_not_what_they_point_to(run: Path, outside: Path) -> None:
    for name in ("model.safetensors", output.CONFIG):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / "mine")
    with output.claim(run, resume=False, overwrite=True):
        output.begin(run, "optim: galore", overwrite=True)
        with output.results(run, {}) as made:
            (made / "model.safetensors").write_text("weights")
    assert untouched(outside)
    assert (run / "model.safetensors").read_text() == "weights"
    assert not (run / output.CONFIG).is_symlink()


def test_a_checkpoint_that_is_a_link_is_neither_resumed_nor_deleted(run: Path, outside: Path) -> None:
    first = sealed(run, 2)
    link = run / "checkpoint-1"
    link.symlink_to(first)
    (run / "checkpoint-9").symlink_to(outside)
    assert checkpoint.newest(run) == (first, ["skipped checkpoint-9: it is a symbolic link"])
    sealed(run, 4)
    checkpoint.rotate(run, 1)
    assert not first.exists()
    assert link.is_symlink()
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(CheckpointError, match="checkpoint-9 was not written by lowmem"):
            output.claim(run, **how).__enter__()
    assert untouched(outside)


def test_a_manifest_cannot_name_what_lies_outside(run: Path, outside: Path) -> None:
    with output.results(run, {}) as made:
        (made / "model.safetensors").write_text("weights")
    manifest = json.loads((run / MANIFEST).read_text())
    for name in ("../outside/mine", str(outside / "mine"), "../outside"):
        manifest["files"][name] = manifest["files"]["model.safetensors"]
    (run / MANIFEST).write_text(json.dumps(manifest))
    output.begin(run, "", overwrite=True)
    assert untouched(outside)
    assert {p.name for p in run.iterdir()} == {output.CONFIG}


def test_a_foreign_checkpoint_ahead_is_refused_before_anything_is_done(run: Path) -> None:
    foreign = run / "checkpoint-4"
    foreign.mkdir()
    (foreign / "model.safetensors").write_text("of another program")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 was not written by lowmem and is in the way"):
        trainer(run, **RUN).train()
    for how in ({"resume": True, "overwrite": False}, {"resume": False, "overwrite": True}):
        with pytest.raises(UserError, match="checkpoint-4"), output.claim(run, **how):
            pytest.fail("claimed")
    with pytest.raises(CheckpointError, match="not written by lowmem"):
        sealed(run, 4)
    assert [p.name for p in foreign.iterdir()] == ["model.safetensors"]


def test_a_foreign_checkpoint_behind_is_left_alone(run: Path) -> None:
    foreign = run / "checkpoint-1"
    trainer(run, **RUN).train()
    foreign.mkdir()
    values = {"max_steps": 8, "save_total_limit": 1, "load_best_model_at_end": True, "eval_strategy": "steps"}
    again = trainer(run, held=trainer(run, **RUN).train_dataset, **RUN | values | {"eval_steps": 2})
    again.tell = [].append
    again.train(resume_from_checkpoint=True)
    assert foreign.is_dir()
    assert (run / "checkpoint-8").is_dir()


@pytest.mark.parametrize("form", [1, 2, 99, None, "3"])
def test_a_manifest_of_another_format_is_not_read(run: Path, form: object) -> None:
    folder = sealed(run, 2)
    assert about(folder) == {}
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": form}))
    said = broken(folder)
    assert said.startswith(
        f"its manifest has format {form!r}, this version of lowmem reads 3: go on with the"
    )
    assert said.endswith("start afresh in another folder")
    found, skipped = checkpoint.newest(run)
    assert found is None
    assert len(skipped) == 1


def test_checkpoints_without_an_optimizer_keep_their_limit(run: Path) -> None:
    values = RUN | {"max_steps": 8, "save_only_model": True, "save_total_limit": 2}
    trainer(run, **values).train()
    assert {p.name for p in run.iterdir()} == {"checkpoint-6", "checkpoint-8", output.CONFIG}
    with pytest.raises(CheckpointError, match=r"saved without optimizer\.pt"):
        trainer(run, **values).train(resume_from_checkpoint=True)
