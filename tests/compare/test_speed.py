"""Every method's step beside its peers: fair contests, true ratios, reasons for what is slow."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lowmem
from lowmem.errors import UserError
from lowmem.report.speed import FUSED, UNKNOWN, markdown, peers, slow, step

ROOT = Path(__file__).resolve().parents[2]
recipe = importlib.import_module("lowmem.recipes.speed")
others = importlib.import_module("lowmem.recipes.peers")


def row(ours: float, *, refresh: tuple[int, float] | None = None, **theirs: float) -> dict[str, Any]:
    again = {"gap": refresh[0], "milliseconds": refresh[1]} if refresh else None
    times = {FUSED: 10.0, "lowmem": ours, **theirs}
    return {"method": "galore", "milliseconds": times, "refresh": again, "missing": {}}


def test_a_refresh_is_taken_in_at_its_gap() -> None:
    assert step(row(20.0)) == 20.0
    assert step(row(20.0, refresh=(200, 420.0))) == pytest.approx(22.0)
    assert step(row(20.0, refresh=(200, 15.0))) == 20.0  # noise does not make it faster


def test_what_is_slow_is_told_with_a_reason() -> None:
    fine, beaten, heavy = row(20.0, peer=30.0), row(20.0, peer=19.0), row(61.0)
    assert [slow(one) for one in (fine, beaten, heavy)] == [False, True, True]
    document = {
        "machine": recipe._machine("cpu"),
        "parameters": 10**6,
        "rows": [beaten | {"missing": {"x y": "gone"}}],
        "why": {"galore": "two products."},
        "left_out": {"lomo": "no step of its own"},
    }
    text = markdown(document)
    for told in (
        "| `galore` | 20.0 | 2.00 | peer, 19.0 ms | 1.05 |", "- `galore`: two products.", "- x y: gone",
        "- `lomo`: no step of its own",
    ):  # fmt: skip
        assert told in text


def test_adamw_is_its_own_peer() -> None:
    assert peers(row(20.0) | {"method": "adamw"}) == {FUSED: 10.0}
    assert peers(row(20.0)) == {}


def test_a_contest_has_all_that_run_and_names_the_rest(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[tuple[str, int]] = []

    class Theirs:
        def __init__(self, params: Any, lr: float, told: int = 0) -> None:
            self.params = list(params)

        def step(self) -> None:
            calls.append(("theirs", len(self.params)))

    def broken(kind: Any, params: Any) -> Any:
        raise ValueError("not today\nor ever")

    taking = others.Peer("torch", "nn.Linear", lambda kind, params: Theirs(params, 1.0))
    contest = (taking, others.Peer("torch", "nn.Conv1d", broken), others.Peer("no_such", "X", broken))

    monkeypatch.setattr(others, "peers", lambda rank: {"adan": contest})
    monkeypatch.setattr(recipe.bench, "MATRICES", [(24, 16)])
    monkeypatch.setattr(recipe.bench, "WIDTH", 16)
    monkeypatch.setattr(recipe.bench, "VOCABULARY", 40)
    found = recipe.speed(tmp_path, methods=["adan"], rounds=2, layers=2)
    (made,) = found["rows"]
    assert set(made["milliseconds"]) == {FUSED, "lowmem", "torch Linear"}
    assert made["missing"]["torch Conv1d"] == "ValueError: not today"
    assert "no_such X" in made["missing"]
    assert calls == [("theirs", 3)] * (1 + 2 + 2)  # tried, warmed up, measured
    assert made["refresh"] is None
    again = recipe.speed(tmp_path, methods=["galore"], rounds=1, layers=1)
    assert [one["method"] for one in again["rows"]] == ["adan", "galore"]
    assert again["rows"][1]["refresh"]["gap"] == dict(lowmem.create("galore").options)["update_proj_gap"]
    assert json.loads((tmp_path / "speed.json").read_text()) == again


def test_a_method_that_frees_gradients_leaves_them_to_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[int] = []

    def counting(params: Any, **_: Any) -> Any:
        kind = type("Fused", (), {"step": lambda self: seen.append(sum(p.grad is not None for p in params))})
        return kind()

    monkeypatch.setattr(torch.optim, "AdamW", counting)
    params = recipe.bench.weights([(24, 16), (16, 24), (40, 16)], "cpu")
    recipe.measured("badam", params, 2)
    assert set(seen) == {3}
    assert all(p.grad is not None for p in params)


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no 'adann' that trains by gradients; did you mean 'adan'"):
        recipe.speed(tmp_path, methods=["adann"])


@pytest.mark.parametrize("method", sorted(others.peers(8)))
def test_a_peer_takes_the_parameters_as_they_are_given(method: str) -> None:
    params = [nn.Parameter(torch.randn(32, 16)), nn.Parameter(torch.randn(40, 16))]
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in params]
    for peer in others.peers(8)[method]:
        try:
            with recipe._aside():
                peer.step(params)()
        except ImportError:
            continue
        assert not torch.equal(params[0], before[0]), peer.full
    assert method in lowmem.available()


def test_the_page_is_what_the_kept_document_says() -> None:
    """When this fails, run the recipe with --page docs/speed.md --of configs/measured/speed.json."""
    document = json.loads((ROOT / "configs" / "measured" / "speed.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "speed.md").read_text(encoding="utf-8") == markdown(document)
    assert UNKNOWN not in markdown(document)
