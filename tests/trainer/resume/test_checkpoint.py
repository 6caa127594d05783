"""Checkpoints are whole or absent, and say what is wrong with them."""

import json
import shutil
from pathlib import Path

import pytest

from lowmem import errors
from lowmem.errors import CheckpointError
from lowmem.models import sealed
from lowmem.training.folder import checkpoint, staging

ABOUT = {"strategy": "galore", "options": {"rank": 4}, "parameters": {"a": "float32[2, 3]"}}


def staged(output_dir: Path, step: int, *, without: tuple[str, ...] = ()) -> Path:
    """A checkpoint as the Trainer writes it, with stand-in contents."""
    folder = staging.staging(output_dir) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in (*checkpoint.REQUIRED, "model.safetensors"):
        if name not in without:
            (folder / name).write_bytes(f"{name} {step}".encode() * 9)
    return folder


def write(output_dir: Path, step: int, **options: tuple[str, ...]) -> Path:
    folder = staged(output_dir, step, **options)
    sealed.seal(folder, ABOUT)
    target = output_dir / f"checkpoint-{step}"
    staging.publish(folder, target)
    return target


def test_newest_takes_the_highest_number_not_the_last_written(tmp_path):
    write(tmp_path, 10)
    write(tmp_path, 9)
    (tmp_path / "checkpoint-12.tmp").mkdir()
    assert checkpoint.newest(tmp_path) == (tmp_path / "checkpoint-10", [])


@pytest.mark.parametrize("name", [*checkpoint.REQUIRED, "model.safetensors"])
def test_missing_or_cut_file_is_skipped_by_name(tmp_path, name):
    write(tmp_path, 8)
    folder = write(tmp_path, 16)
    (folder / name).write_bytes(b"x")
    found, skipped = checkpoint.newest(tmp_path)
    assert found == tmp_path / "checkpoint-8"
    assert skipped == [f"skipped checkpoint-16: {name} has 1 bytes of {len(name + ' 16') * 9}"]
    (folder / name).unlink()
    assert checkpoint.newest(tmp_path)[1] == [f"skipped checkpoint-16: {name} is missing"]


def test_changed_bytes_of_equal_length_are_noticed(tmp_path):
    folder = write(tmp_path, 16)
    path = folder / "scheduler.pt"
    path.write_bytes(path.read_bytes()[::-1])
    assert checkpoint.damage(folder) == "scheduler.pt is not what was written"


def test_an_edited_manifest_and_a_file_put_beside_are_noticed(tmp_path):
    folder = write(tmp_path, 16)
    (folder / ".DS_Store").write_bytes(b"a file manager's")
    assert checkpoint.damage(folder) is None
    text = (folder / "manifest.json").read_text()
    said = json.loads(text)
    said["about"]["options"]["rank"] = 8
    (folder / "manifest.json").write_text(json.dumps(said))
    assert checkpoint.damage(folder) == "manifest.json is not what was written"
    (folder / "manifest.json").write_text(text)
    (folder / "adapter_model.bin").write_bytes(b"")
    assert checkpoint.damage(folder) == "adapter_model.bin was added to it"


@pytest.mark.parametrize("place", [0, 1 << 20, (3 << 20) - 8])
def test_large_file_is_checked_everywhere(tmp_path, place):
    folder = staged(tmp_path, 3)
    big = folder / "model.safetensors"
    big.write_bytes(bytes(3 << 20))
    sealed.seal(folder, ABOUT)
    assert checkpoint.damage(folder) is None
    with big.open("r+b") as stream:
        stream.seek(place)
        stream.write(b"8 bytes!")
    assert checkpoint.damage(folder) == "model.safetensors is not what was written"


def test_save_without_optimizer_is_no_checkpoint_to_resume_from(tmp_path):
    folder = write(tmp_path, 16, without=("optimizer.pt", "scheduler.pt"))
    assert checkpoint.damage(folder) == "it was saved without optimizer.pt, scheduler.pt"
    with pytest.raises(CheckpointError, match=r"without optimizer\.pt, scheduler\.pt"):
        checkpoint.check_origin(folder, ABOUT)


def test_unsealed_and_unreadable_manifests(tmp_path):
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(staged(tmp_path, 5), folder)
    assert "no manifest.json" in str(checkpoint.damage(folder))
    for text in ("", "[]", '{"files": 3}', '{"files": {"model.safetensors": {}}}'):
        (folder / sealed.MANIFEST).write_text(text)
        assert "cannot be read" in str(checkpoint.damage(folder)), text


@pytest.mark.parametrize("moment", ["staged", "sealed", "aside", "renamed"])
def test_every_moment_of_an_interrupted_save_leaves_a_whole_newest(tmp_path, moment):
    """What a kill leaves at each step of a save is settled by the next start."""
    write(tmp_path, 8)
    target = tmp_path / "checkpoint-16"
    (write(tmp_path, 16) / "optimizer.pt").unlink()  # a damaged one that the new save replaces
    folder = staged(tmp_path, 16)
    if moment != "staged":
        sealed.seal(folder, ABOUT)
    if moment == "aside":
        target.rename(folder.with_name("replaced-checkpoint-16"))
    if moment == "renamed":
        target.rename(folder.with_name("replaced-checkpoint-16"))
        folder.rename(target)
    found, skipped = checkpoint.newest(tmp_path)
    assert found == (tmp_path / "checkpoint-8" if moment == "staged" else target)
    assert [s.split(":")[0] for s in skipped] == (["skipped checkpoint-16"] if moment == "staged" else [])
    assert not staging.staging(tmp_path).exists()


def test_origin_names_the_first_difference(tmp_path):
    folder = write(tmp_path, 16)
    checkpoint.check_origin(folder, ABOUT)
    with pytest.raises(CheckpointError, match="its strategy is 'galore', this run's is 'adamw'"):
        checkpoint.check_origin(folder, ABOUT | {"strategy": "adamw"})
    with pytest.raises(CheckpointError, match="its options 'rank' is 4, this run's is 8;"):
        checkpoint.check_origin(folder, ABOUT | {"options": {"rank": 8}})
    other = {"a": "float32[4, 3]", "b": "float32[1]"}
    with pytest.raises(CheckpointError, match=r"parameters 'a' is 'float32\[2, 3\]'.*\(2 differ\)"):
        checkpoint.check_origin(folder, ABOUT | {"parameters": other})


def test_rotation_keeps_the_newest_and_the_protected(tmp_path):
    folders = [write(tmp_path, step) for step in (2, 4, 6, 8)]
    checkpoint.rotate(tmp_path, None)
    assert all(f.exists() for f in folders)
    checkpoint.rotate(tmp_path, 2, protect=[folders[0]])
    assert [f.exists() for f in folders] == [True, False, True, True]


def test_rotation_never_counts_a_damaged_checkpoint_nor_deletes_it(tmp_path):
    folders = [write(tmp_path, step) for step in (2, 4, 6, 8)]
    for folder in folders[2:]:
        (folder / "optimizer.pt").unlink()
    checkpoint.rotate(tmp_path, 1)
    assert [f.exists() for f in folders] == [False, True, True, True]


def test_manifest_lists_every_file_with_size(tmp_path):
    folder = write(tmp_path, 4)
    listing = json.loads((folder / sealed.MANIFEST).read_text())["files"]
    on_disk = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != sealed.MANIFEST}
    assert {name: entry["bytes"] for name, entry in listing.items()} == on_disk


def test_a_full_disk_is_recognised_however_it_is_reported():
    assert errors.ran_out_of_room(OSError(28, "No space left on device"))
    assert errors.ran_out_of_room(
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter")
    )
    assert errors.ran_out_of_room(Exception("Disk quota exceeded (os error 122)"))
    assert not errors.ran_out_of_room(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
