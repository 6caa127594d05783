"""Where a run may write is decided before it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.errors import UserError
from lowmem.training.output import claim


def test_a_folder_that_can_be_made_is_left_unmade(tmp_path: Path) -> None:
    assert claim(tmp_path / "a" / "b", resume=False, overwrite=False) == (None, [])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        claim(tmp_path / "file" / "run", resume=False, overwrite=False)
