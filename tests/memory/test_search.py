"""What fits a card where no method was chosen: ranked, within wishes, with the way out where nothing does."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.errors import UserError
from lowmem.memory.advice import search as searching
from lowmem.memory.advice.kinds import KINDS
from lowmem.memory.advice.search import search
from lowmem.memory.device.gpus import Budget
from lowmem.memory.plan import plan
from tests.memory.families import FAMILIES

SHAPE = {"vocab_size": 2000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 3}
LLAMA = LlamaConfig(**SHAPE, num_attention_heads=16, max_position_embeddings=4096)
WISH = {"seq_len": 1024}
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


def test_what_does_not_fit_says_what_would_help() -> None:
    found = search(LLAMA, card(180), WISH, full=True)
    assert {row.verdict for row in found if row.kind == "int8 weights"} >= {"fits"}  # what needs no more room
    rows = [row for row in found if row.kind != "int8 weights"][1:]
    assert {row.verdict for row in rows} == {"out of memory"}
    assert [row.headroom_bytes for row in rows] == sorted((row.headroom_bytes for row in rows), reverse=True)
    assert [row.needs.partition(",")[0] for row in rows] == [
        "--seq-len 512",
        "--seq-len 256",
        "--lora-rank 16",
    ]
    shorter = search(LLAMA, card(180), {"seq_len": 512}, full=True)
    assert next(row for row in shorter if row.strategy.name == "adamw_8bit").verdict != "out of memory"


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
