"""A checkpoint of two ranks is read by one, three and four, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import lowmem
from lowmem.errors import CheckpointError
from lowmem.training.folder import forms
from tests.distributed import resharding
from tests.distributed.ranks import ROOT, together


def test_checkpoints_of_two_ranks_are_read_by_others(tmp_path: Path) -> None:
    assert together("save", 2, tmp_path) == []
    wrong = {ranks: together("load", ranks, tmp_path) for ranks in resharding.READERS}
    assert not any(wrong.values()), wrong


def test_the_guide_says_what_is_read() -> None:
    assert resharding.table() in (ROOT / "docs/guides/shard.md").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("form", ["full", "sharded"])
def test_what_another_number_of_ranks_holds_otherwise_is_refused_in_words(form: str, tmp_path: Path) -> None:
    """45 rows of 100 numbers start on blocks of 256 on one rank, not on two, which hold them in fp32."""
    optimizer = lowmem.optimizer([("w", nn.Parameter(torch.zeros(45, 100)))], "adamw_8bit")
    optimizer.init_state()
    small = dict.fromkeys(("age", "exp_avg", "exp_avg_sq"), torch.zeros(1))
    for held, fine in ((optimizer.state_dict()["state"][0], True), (small, False)):
        state, folder = {"state": {"w": held}, "param_groups": []}, tmp_path / str(fine)
        folder.mkdir()
        if form == "full":
            torch.save(state, folder / "optimizer.bin")
        else:
            dcp.save({"optimizer": state}, checkpoint_id=folder / "optimizer_0", no_dist=True)
        if fine:
            forms.refuse_misfit(folder, form, optimizer)
            continue
        with pytest.raises(
            CheckpointError, match=r"exp_avg_sq of w \(45, 100\).*rows of every rank.* on 2 or"
        ):
            forms.refuse_misfit(folder, form, optimizer)
