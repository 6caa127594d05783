"""Calibration: refused without a GPU, kept beside other cards, and read by the planner's budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lowmem.errors import UserError
from lowmem.memory.device import gpus
from lowmem.memory.device.calibrate import Calibration, calibrate, card_name, save


def card(name: str, context: int = 300 << 20) -> Calibration:
    return Calibration(name, 24 << 30, context, 16 << 20, 8.9, "NVIDIA " + name, "2.13.0 (CUDA 13.0)", 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_way_out_is_named() -> None:
    with pytest.raises(UserError, match=r"torch finds none here; plan with --gpu NAME .* or with --budget"):
        calibrate()


def test_measurements_replace_the_table_s_assumptions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not gpus.gpu("rtx4090").calibrated
    path = save(card("rtx4090"))
    save(card("my-own-card", context=1 << 20))
    assert path == gpus.calibration_file()
    found = gpus.gpu("NVIDIA GeForce RTX 4090")
    assert found.calibrated
    assert (found.usable, found.outside, found.workspace) == (24 << 30, 300 << 20, 16 << 20)
    assert gpus.gpu("my-own-card").outside == 1 << 20
    save(card("rtx4090", context=400 << 20))
    assert gpus.gpu("rtx4090").outside == 400 << 20
    assert set(json.loads(path.read_text(encoding="utf-8"))) == {"rtx4090", "my-own-card"}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_damaged_file_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"is damaged .*: delete it and run `lowmem calibrate` again"):
        save(card("t4"), path)
    assert path.read_text(encoding="utf-8") == "{"


def test_names_follow_the_table() -> None:
    assert card_name("NVIDIA H100 80GB HBM3") == "h100-80gb"
    assert card_name("NVIDIA Imaginary 9000") == "imaginary-9000"


@pytest.mark.cuda
def test_a_gpu_is_measured_within_what_cards_take() -> None:
    found = calibrate()
    assert found.usable == torch.cuda.mem_get_info()[1]
    assert 50 << 20 < found.context < 2 << 30
    assert 0 < found.workspace < 512 << 20
