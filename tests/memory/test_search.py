"""What fits a card where no method was chosen: ranked, within wishes, with the way out where nothing does."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.errors import UserError
from lowmem.memory.advice import search as searching
from lowmem.memory.advice.beside import Beside
from lowmem.memory.advice.found import Found
from lowmem.memory.advice.kinds import KINDS
from lowmem.memory.advice.search import search
from lowmem.memory.advice.ways import LEVERS, refused, ways
from lowmem.memory.device.gpus import ROOM, Budget
from lowmem.memory.plan import plan
from lowmem.memory.run import Run
from lowmem.strategies import create
from tests.memory.families import FAMILIES

SHAPE = {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}
LLAMA = LlamaConfig(**SHAPE, num_attention_heads=16, max_position_embeddings=4096)
WISH = {"seq_len": 1024}
ONE: dict[str, Any] = {"among": ["adamw"], "top": 0}
"""Of one method, by its tensors."""
ORDER = ["fits", "fits with retries", "out of memory"]


def card(mib: int) -> Budget:
    """A card of which a run has all."""
    return Budget(mib << 20, (0, 0), 0)


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Methods of four kinds: what is ranked is the same for all."""
    monkeypatch.setattr(searching, "available", lambda: ["adamw", "adamw_8bit", "galore", "sgd"])


def test_with_room_the_best_kind_comes_first_without_recomputation() -> None:
    rows = search(LLAMA, card(1 << 14), WISH)
    assert (rows[0].strategy.name, rows[0].levers, rows[0].verdict) == ("adamw", (), "fits")
    kinds = [KINDS.index(row.kind) for row in rows]
    assert kinds == sorted(kinds)
    assert len(rows) == 4 + 2 * 2 + 4  # all weights, two sorts of LoRA, weights held in 8 bits
    assert rows[0].checked
    batch = rows[0].largest_batch
    most = plan(LLAMA, "adamw", **WISH, batch_size=batch, budget=card(1 << 14).usable, advise=False).plans[0]
    assert most.peak["allocated"] == pytest.approx(card(1 << 14).usable, rel=0.07)


@pytest.mark.parametrize(("mib", "best"), [(500, "adamw"), (260, "adamw_8bit"), (180, "sgd")])
def test_with_less_room_come_levers_and_then_lesser_kinds(mib: int, best: str) -> None:
    rows = search(LLAMA, card(mib), WISH, full=True)
    assert [row.verdict for row in rows] == sorted((row.verdict for row in rows), key=ORDER.index)
    first = rows[0]
    assert (first.strategy.name, first.verdict, first.checked) == (best, "fits", True)
    assert "checkpointing" in first.levers
    run = {name: getattr(first.run, name) for name in first.run.__dataclass_fields__}
    (full,) = plan(LLAMA, first.strategy, advise=False, **run).plans
    assert full.peak["allocated"] == first.peak.allocated
    assert full.peak["allocated"] + first.headroom_bytes == card(mib).capacity


def test_a_cpu_leaves_no_room_for_segments() -> None:
    wish = {**WISH, "device": "cpu", "lora_rank": 0, "gradient_checkpointing": True, "gradient_release": True}
    (most,) = search(LLAMA, Budget(1 << 34, (0, 0), 0, cached=False), wish, **ONE)
    verdicts = [
        search(LLAMA, Budget(most.peak.allocated - less, (0, 0), 0, cached=False), wish, **ONE)[0].verdict
        for less in (0, 1)
    ]
    assert verdicts == ["fits", "out of memory"]


def test_what_does_not_fit_says_what_would_help() -> None:
    found = search(LLAMA, card(180), WISH, full=True)
    assert {row.verdict for row in found if row.kind == "int8 weights"} >= {"fits"}  # what needs no more room
    rows = [row for row in found if row.kind != "int8 weights"][1:]
    assert {row.verdict for row in rows} == {"out of memory"}
    assert [row.headroom_bytes for row in rows] == sorted((row.headroom_bytes for row in rows), reverse=True)
    assert [row.needs.partition(",")[0] for row in rows] == [
        "--seq-len 512",
        "--seq-len 512",  # with activations in host memory
        "--lora-rank 16",
    ]
    shorter = search(LLAMA, card(180), {"seq_len": 512}, full=True)
    assert next(row for row in shorter if row.strategy.name == "adamw_8bit").verdict != "out of memory"


def test_levers_turn_from_the_cheapest_to_the_dearest() -> None:
    every = [names for _, names in ways(Run(), LEVERS)]
    assert every[:4] == [(), ("release",), ("checkpointing",), ("release", "checkpointing")]
    assert every[4:6] == [
        ("checkpointing", "activation offload"),
        ("release", "checkpointing", "activation offload"),
    ]
    assert every[6:] == [(*names, "state offload") for names in every[:6]]  # what costs most turns last
    alone = [names for _, names in ways(Run(), [LEVERS[2]])]  # the user has decided on the others
    assert alone == [(), ("activation offload",)]


def test_activations_leave_where_recomputing_them_is_not_enough() -> None:
    wish = {"seq_len": 4096, "batch_size": 2, "lora_rank": 8}
    computed, moved = (
        search(
            LLAMA, card(1 << 14), {**wish, "gradient_checkpointing": True, "activation_offload": off}, **ONE
        )
        for off in (False, True)
    )
    most, least = (rows[0].peak.allocated for rows in (computed, moved))
    assert least < most
    room = int((most + least) / 2 / (1 - ROOM))
    (row,) = search(LLAMA, Budget(room, (0, 0), 0), wish, **ONE)
    assert (row.levers, row.verdict) == (("checkpointing", "activation offload"), "fits")


def test_state_leaves_where_nothing_fits_without() -> None:
    wish: dict[str, Any] = {**WISH, "gradient_checkpointing": True, "gradient_release": True}
    (here,), (away,) = (
        search(LLAMA, card(1 << 14), {**wish, "offload_state": off, "lora_rank": 0}, **ONE)
        for off in (False, True)
    )
    assert away.peak.allocated < here.peak.allocated
    room = int((away.peak.allocated + here.peak.allocated) / 2 / (1 - ROOM))
    tight = Budget(room, (0, 0), 0)
    (row,) = search(LLAMA, tight, {**wish, "lora_rank": 0}, among=["adamw"], top=1)
    assert (row.levers[-1], row.verdict, row.checked) == ("state offload", "fits", True)
    rows = search(LLAMA, tight, wish, top=0)  # of which some need no transfers
    assert not any("state offload" in row.levers for row in rows)
    for run, device in ((Run(), replace(tight, unified=True)), (Run(device="cpu"), tight)):
        assert refused(LEVERS[-1], run, create("adamw"), device)
    assert "next to no state" in refused(LEVERS[-1], Run(), create("sgd"), tight)
    assert "adapters" in refused(LEVERS[-1], Run(lora_rank=8), create("adamw"), tight)


def test_a_refused_lever_says_why() -> None:
    rows = search(LLAMA, card(100), WISH, full=True, among=["adamw"])
    codes = next(row for row in rows if row.kind == "int8 weights")
    assert "int8 codes" in codes.refused["activation offload"]
    apple = replace(card(100), unified=True)
    assert "the same" in refused(LEVERS[2], Run(), create("adamw"), apple)
    released = refused(LEVERS[0], Run(ranks=2, shard="none"), create("adamw"), card(100))
    assert "copies of a model" in released
    modes = searching._Finder(LLAMA, apple, WISH).modes(full=False)
    assert not any(run.quantize for run in modes)  # bitsandbytes has none there


def test_several_cards_are_searched_and_counted() -> None:
    one, two = (search(LLAMA, card(260), WISH | {"ranks": ranks}, full=True) for ranks in (1, 2))
    named = {row.strategy.name: row for row in one}
    assert named["adamw"].ranks_needed
    assert f"--ranks {named['adamw'].ranks_needed}" in named["adamw"].needs
    assert {row.run.ranks for row in two} == {2}
    assert sum(row.verdict == "fits" for row in two) >= sum(
        row.verdict == "fits" for row in one if not row.run.weights
    )


def test_wishes_are_kept() -> None:
    decided = {**WISH, "batch_size": 2, "gradient_checkpointing": True, "gradient_release": False}
    rows = search(LLAMA, card(1 << 14), decided, full=True)
    assert {(row.run.batch_size, row.levers, row.run.adapts) for row in rows} == {
        (2, ("checkpointing",), False)
    }
    assert all(row.largest_batch is None for row in rows)
    adapted = search(LLAMA, card(1 << 14), {**WISH, "lora_rank": 8})
    assert {(row.run.lora_rank, row.kind) for row in adapted} == {(8, "LoRA")}
    with pytest.raises(UserError, match="--full"):
        search(LLAMA, card(1 << 14), {"lora_rank": 8}, full=True)


def test_the_command_line_searches_without_a_method(tmp_path: Path) -> None:
    FAMILIES["llama"]().save_pretrained(tmp_path)
    asked = ["plan", "--model", str(tmp_path), "--budget", "2GiB", "--seq-len", "48"]
    page, run = tmp_path / "page.html", tmp_path / "run.yaml"
    done = CliRunner().invoke(cli.app, [*asked, "--json", "--html", str(page), "--emit", str(run)])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    first = document["search"][0]
    assert (first["strategy"], first["fits"], first["checked"]) == ("adamw", True, True)
    assert document["plans"][0]["strategy"] == "adamw"
    again = CliRunner().invoke(cli.app, [*shlex.split(first["command"])[1:], "--json"])
    assert json.loads(again.stdout)["plans"][0]["peak"]["allocated"] == first["allocated"]
    assert "What fits, best first" in page.read_text()
    assert "optim: adamw" in run.read_text()
    shown = CliRunner().invoke(cli.app, asked).stdout
    assert "12 of 12 ways fit" in shown
    assert "lowmem compare" in shown


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--gpu", "t4", "--optim-args", "rank=4"], "--optim"),
        (["--full"], "leave out --optim"),
        (["--gpu", "t4", "--optim", "adamw", "--full"], "leave out --optim"),
    ],
)
def test_a_search_is_asked_for_rightly(flags: list[str], said: str) -> None:
    done = CliRunner().invoke(cli.app, ["plan", "--model", "gpt2", *flags])
    assert done.exit_code == 2
    assert said in done.stderr


def test_rows_of_a_second_process_are_those_that_one_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {
        "model": LLAMA,
        "limit": card(260),
        "options": WISH,
        "among": ["adamw", "galore"],
    }
    alone = search(**asked)
    beside = Beside(**asked)
    try:
        beside._process.join(timeout=300)
        given = beside.rows()
    finally:
        beside.stop()
    shares = {(row.trains, row.strategy.name) for row in given.values()}
    assert shares == {(row.trains, row.strategy.name) for row in alone if row.trains != "all weights"}
    looked: list[str] = []
    cheapest = searching._Finder.cheapest

    def counted(self: Any, run: Run, strategy: Any) -> Found:
        looked.append(strategy.name)
        return cheapest(self, run, strategy)

    monkeypatch.setattr(searching._Finder, "cheapest", counted)
    assert search(**asked, beside=lambda: given) == alone
    assert looked == ["adamw", "galore"]


def test_a_second_process_that_fails_leaves_all_to_the_first() -> None:
    asked: dict[str, Any] = {"limit": card(260), "options": WISH, "among": ["adamw"]}
    beside = Beside(model="no-such-model", **asked)
    try:
        beside._process.join(timeout=300)
        assert beside.rows() == {}
        assert search(LLAMA, **asked, beside=beside.rows) == search(LLAMA, **asked)
    finally:
        beside.stop()
