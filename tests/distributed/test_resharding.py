"""A checkpoint of two ranks is read by one, three and four, bit for bit."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import resharding
from tests.distributed.ranks import ROOT, together


def test_checkpoints_of_two_ranks_are_read_by_others(tmp_path: Path) -> None:
    assert together("save", 2, tmp_path) == []
    wrong = {ranks: together("load", ranks, tmp_path) for ranks in resharding.READERS}
    assert not any(wrong.values()), wrong


def test_the_guide_says_what_is_read() -> None:
    assert resharding.table() in (ROOT / "docs/guides/shard.md").read_text(encoding="utf-8")
