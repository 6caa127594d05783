"""Cards by name, budgets by unit, and a local calibration above both."""

from __future__ import annotations

import json

import pytest

from lowmem.errors import UserError
from lowmem.memory.device import gpus
from lowmem.memory.device.gpus import GIB, MIB, budget, gpu


@pytest.fixture(autouse=True)
def _no_calibration(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("rtx4090", "rtx4090"),
        ("RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("Tesla T4", "t4"),
        ("l40", "l40s"),
        ("4090", "rtx4090"),
        ("3060", "rtx3060"),
        ("7900 XTX", "rx7900xtx"),
        ("AMD Instinct MI300X", "mi300x"),
        ("Apple 16GB", "apple-16gb"),
    ],
)
def test_names_are_forgiving(asked, found):
    assert gpu(asked).name == found


@pytest.mark.parametrize(
    ("asked", "said"), [("24GB", "24 GB taken as"), ("8 GiB", "8 GB taken as"), ("24.0GB", "24 GB taken as")]
)
def test_a_size_is_the_smallest_card_of_it(asked, said):
    found = gpu(asked)
    nominal = float(asked.split("G")[0]) * 1024
    assert found.usable == min(
        row["usable"] * MIB
        for row in gpus._table()["gpus"].values()
        if row["nominal"] == nominal and row["arch"] not in ("ROCm", "Metal")
    )
    assert said in found.notes[0]
    with pytest.raises(UserError, match="--budget 7GiB"):
        gpu("7GB")
    with pytest.raises(UserError, match=r"no card with 23\.5 GB .* --budget 23\.5GiB"):
        gpu("NVIDIA 23.5 GB")


def test_cards_of_other_makers_are_estimates():
    for name in ("mi300x", "apple-32gb"):
        card = gpu(name)
        assert card.estimated
        assert "an estimate" in card.notes[0]
        assert card.capability is None
    assert not gpu("t4").estimated


def test_no_name_is_no_card():
    with pytest.raises(UserError, match="unknown GPU"):
        gpu("")


def test_unknown_card_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'rtx4090'"):
        gpu("rtx4091")


def test_a_family_of_several_sizes_asks_which():
    with pytest.raises(UserError, match="a100-40gb, a100-80gb"):
        gpu("A100")


@pytest.mark.parametrize(
    ("text", "size", "said"),
    [
        ("23.5GiB", int(23.5 * GIB), None),
        ("24564MiB", 24564 * MIB, None),
        ("24GB", 24 * 10**9, "10^9"),
        ("24", 24 * GIB, "taken as GiB"),
        ("25769803776", 25769803776, "taken as B"),
        ("24g", 24 * GIB, "taken as GiB"),
    ],
)
def test_budget_says_what_it_assumed(text, size, said):
    found = budget(text)
    assert found.usable == size
    assert (said is None and not found.notes) or said in found.notes[0]


@pytest.mark.parametrize("text", ["lots", "24GX", "-3GiB", "", "100MiB"])
def test_bad_budgets_are_refused(text):
    with pytest.raises(UserError, match="budget"):
        budget(text)


def test_every_card_leaves_room_and_is_smaller_than_its_box():
    table = gpus._table()["gpus"]
    for name, row in table.items():
        card = gpu(name)
        least = 0.55 if row["arch"] == "Metal" else 0.85  # Metal leaves a part of the memory to the processor
        assert least * row["nominal"] * MIB < card.capacity < card.usable < row["nominal"] * MIB, name
        assert card.context[0] < card.context[1]


def test_calibration_replaces_the_table(tmp_path):
    assert not gpu("t4").calibrated
    file = gpus.calibration_file()
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"t4": {"usable": 15 * GIB, "context": 150 * MIB, "workspace": 9 * MIB}}))
    card = gpu("t4")
    assert card.calibrated
    assert card.capacity == 15 * GIB - 150 * MIB
    assert (card.workspace, card.capability) == (9 * MIB, 7.5)
    assert card.outside == 150 * MIB


def test_damaged_calibration_is_named():
    file = gpus.calibration_file()
    file.parent.mkdir(parents=True)
    file.write_text("{")
    with pytest.raises(UserError, match="delete it"):
        gpu("t4")


def test_a_chip_of_apple_is_named_by_its_memory():
    assert gpu("Apple M3 Max 64GB").name == gpu("m2 64gb").name == "apple-64gb"
    with pytest.raises(UserError, match=r"several sizes: say which of apple-128gb"):
        gpu("M3 Max")
    assert gpu("apple-16gb").unified
    assert not gpu("mi300x").unified


def test_a_cpu_has_no_context_no_segments_and_no_card():
    host = gpus.limit_of(None, "100MiB", None, "cpu")
    assert (host.usable, host.capacity, host.room) == (100 * MIB,) * 3
    card = gpus.limit_of(None, "1GiB", None, "cuda")
    assert card.room < card.capacity < card.usable
    with pytest.raises(UserError, match=r"device is cpu.*give budget, or leave device out"):
        gpus.limit_of("t4", None, None, "cpu")
    with pytest.raises(UserError, match="nothing fits"):
        gpus.limit_of(None, 0, None, "cpu")
