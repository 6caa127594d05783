"""The GPU script from end to end on a CPU, in small: what comes back is whole, what is left out is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(ROOT / "recipes" / "gpu"),
        "--device",
        "cpu",
        "--small",
        "--output",
        str(output),
    ]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=600)


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict:
    output = tmp_path_factory.mktemp("gpu") / "found" / "gpu.json"
    done = run(output, "--parts", "methods,calibrate,steps,plan,train,fit")
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text(encoding="utf-8"))


def test_every_part_comes_back_without_an_error(document: dict) -> None:
    assert set(document["parts"]) == {"methods", "calibrate", "steps", "plan", "train", "fit"}
    assert not [part["error"] for part in document["parts"].values() if "error" in part]
    assert document["machine"]["torch"]
    assert document["machine"]["date"]


def test_every_method_with_a_step_is_measured_or_named(document: dict) -> None:
    import lowmem

    steps = document["parts"]["steps"]
    told = {row["name"] for row in steps["rows"]} | {re.split("[,:]", line)[0] for line in steps["left_out"]}
    wanted = {f"lowmem {n}" for n in lowmem.available() if lowmem.create(n).source.needs_autograd}
    assert wanted <= told
    assert {"torch AdamW fused", "torchao AdamW8bit"} <= told
    assert all(row["milliseconds"] > 0 and row["state_bytes"] >= 0 for row in steps["rows"])


def test_every_method_is_stepped_or_named(document: dict) -> None:
    import lowmem

    found = document["parts"]["methods"]
    assert [row["name"] for row in found["rows"]] == ["adamw", "adamw_8bit"]
    assert all(row["not_finite_off"] == 0 for row in found["rows"])
    assert len(found["rows"]) + len(found["left_out"]) == len(lowmem.available())


def test_predicted_stands_beside_measured(document: dict) -> None:
    rows = document["parts"]["plan"]["rows"]
    assert {row["held_out"] for row in rows} == {True, False}
    for row in rows:
        assert row["predicted"]["allocated"] == pytest.approx(row["measured"]["allocated"], rel=0.005), row


def test_a_cap_needs_a_card(document: dict) -> None:
    assert any("a CPU has no cap" in line for line in document["parts"]["fit"]["left_out"])


def test_a_part_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--parts", "speed")
    assert done.returncode == 2
    assert "unknown part 'speed'" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


def test_a_method_that_is_none_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path / "gpu.json", "--methods", "galore,adamm")
    assert done.returncode == 2
    assert "unknown strategy 'adamm'" in done.stderr


def test_the_page_is_what_the_kept_documents_say(tmp_path: Path) -> None:
    """When this fails, run `python recipes/gpu --page docs/gpu.md`."""
    fresh = tmp_path / "gpu.md"
    command = [sys.executable, str(ROOT / "recipes" / "gpu"), "--page", str(fresh)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8") == fresh.read_text(encoding="utf-8")


def test_a_page_shows_each_part_and_lists_what_was_missed(document: dict) -> None:
    from lowmem.report.gpu import markdown

    document["parts"]["plan"]["rows"][0]["error_percent"] = {"allocated": 4.0}
    text = markdown([document])
    for told in (
        "lowmem adamw_8bit",
        "torch AdamW fused",
        "miss: small galore, allocated +4.00 %",
        "not run",
    ):
        assert told in text
