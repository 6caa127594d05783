"""What lies outside torch's allocator is in the budget, and not in the room that there is for tensors."""

from __future__ import annotations

from typing import Any

from lowmem.report import plan as report

ROW: dict[str, Any] = {
    "strategy": "adamw", "options": {}, "state_bytes": 8, "event": "clip", "events": {"clip": 90},
    "at_peak": {"weights": 90}, "peak": {"allocated": 90, "reserved": 130, "device": 150}, "certainty": {},
    "fits": False, "verdict": "fits with retries", "headroom_bytes": -10, "why": [],
}  # fmt: skip
GRID = {"strategy": "adamw", "seq_lens": [128, 256], "batch_sizes": [1, 2], "peak": [[90, 110], [101, 140]]}


def test_a_map_counts_only_what_has_room_beside_the_context() -> None:
    data = {
        "model": {"name": "one"}, "run": {}, "plans": [ROW], "grid": GRID,
        "budget_bytes": 120, "gpu": {"name": None, "context": [10, 30]},
    }  # fmt: skip
    assert report.for_tensors(data) == 100
    built = report.build(data)
    (table,) = next(s for s in built.sections if s.title.startswith("Sequence length")).tables
    assert table.rows == [["adamw", 128, None]]
    assert built.verdict.startswith("Fits with retries, which does not count as fitting: 10 B more")
    assert built.tone == "warn"
    (ranked,) = next(s for s in built.sections if s.title == "Strategies").tables
    assert ranked.marks == ["warn"]
    assert "fits with retries" in ranked.rows[0]


def test_without_a_context_all_of_the_budget_is_for_tensors() -> None:
    assert report.for_tensors({"budget_bytes": 120}) == 120
    assert report.for_tensors({"budget_bytes": None}) is None
