"""Where a run may write is decided before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import SafetensorError

from lowmem.errors import UserError
from lowmem.models.sealed import MANIFEST, broken
from lowmem.training.folder.output import CONFIG, claim, results


def test_a_folder_that_stays_empty_is_taken_away_again(tmp_path: Path) -> None:
    with claim(tmp_path / "a" / "b", resume=False, overwrite=False) as claimed:
        assert claimed == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match="cannot be made"),
        claim(tmp_path / "file" / "run", resume=False, overwrite=False),
    ):
        pytest.fail("claimed")


@pytest.mark.parametrize(("resume", "overwrite"), [(False, False), (True, False), (False, True)])
def test_a_foreign_folder_is_given_only_advice_that_works(
    tmp_path: Path, resume: bool, overwrite: bool
) -> None:
    (tmp_path / "thesis.tex").write_text("")
    with (
        pytest.raises(UserError, match=r"holds no run of lowmem .*; name another folder") as caught,
        claim(tmp_path, resume=resume, overwrite=overwrite),
    ):
        pytest.fail("claimed")
    assert "thesis.tex" in str(caught.value)
    assert "--" not in str(caught.value)


def test_the_folder_of_a_run_may_be_resumed_or_replaced(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("")
    with (
        pytest.raises(UserError, match=r"--resume goes on .* --overwrite replaces it"),
        claim(tmp_path, resume=False, overwrite=False),
    ):
        pytest.fail("claimed")
    with claim(tmp_path, resume=False, overwrite=True) as claimed:
        assert claimed == (None, [])


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device"),
        Exception("No space left on device (os error 28)\nand more"),
    ],
)
def test_a_full_disk_is_one_line_whatever_its_class(tmp_path: Path, error: Exception) -> None:
    def fail(made: Path) -> None:
        (made / "model.safetensors").write_text("half")
        raise error

    words = r"No space left on device.*; make room, then --resume"
    with pytest.raises(UserError, match=words) as caught, results(tmp_path, {}) as made:
        fail(made)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_another_error_while_results_are_written_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="shapes"), results(tmp_path, {}):
        raise ValueError("shapes")
    assert list(tmp_path.iterdir()) == []


def test_results_are_listed_and_readable_by_all(tmp_path: Path) -> None:
    with results(tmp_path, {"steps": 4}) as made:
        (made / "model.safetensors").write_text("weights")
        (made / "model.safetensors").chmod(0o600)
        assert not (tmp_path / MANIFEST).exists()
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", MANIFEST}
    assert broken(tmp_path) is None
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044 == 0o044
    (tmp_path / "model.safetensors").write_text("others")
    assert "model.safetensors has 6 bytes of 7" in str(broken(tmp_path))
