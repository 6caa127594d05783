"""The plan for several cards: what divides, what is gathered, how many are needed, and how they start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lowmem.cli as cli
from lowmem.errors import UserError
from lowmem.memory.advice.cards import needed
from lowmem.memory.advice.levers import side
from lowmem.memory.count import model_state_bytes, state_bytes
from lowmem.memory.plan import plan
from lowmem.memory.trace.windows import Parameter
from lowmem.models.entries import skeleton
from lowmem.optim.shards import Shard
from lowmem.report.units import format_bytes
from lowmem.strategies import create
from tests.memory.families import FAMILIES

SMALL = {"batch_size": 1, "seq_len": 32, "device": "cpu", "advise": False, "eval_batch_size": 0}


def padded(params, ranks: int, size: int) -> int:
    return sum(-(-p.shape[0] // ranks) * (p.numel() // p.shape[0]) * size for p in params)


def test_rows_of_weights_gradients_and_state_are_those_of_a_rank():
    config, ranks = FAMILIES["llama"](), 3
    model = skeleton(config)
    found = [plan(config, "adamw_8bit,galore", **SMALL, ranks=n).plans for n in (1, ranks)]
    for one, many in zip(*(sorted(rows, key=lambda row: row.strategy) for rows in found), strict=True):
        buffers = one.at_peak["weights"] - padded(model.parameters(), 1, 2)
        assert many.at_peak["weights"] == padded(model.parameters(), ranks, 2) + buffers
        assert (
            many.state_bytes == model_state_bytes(create(many.strategy), model, ranks=ranks) < one.state_bytes
        )
        assert sum(many.at_peak.values()) == many.peak["allocated"] == many.events[many.event]
        assert set(many.certainty) >= set(many.at_peak)
        assert many.certainty["gather"] == many.certainty["unsharded"] == "bound"
        divided = many.events["optimizer step"] - many.at_peak["weights"] - many.state_bytes
        assert divided >= padded(model.parameters(), ranks, 2)  # gradients, and the workspace


def test_a_sharded_subspace_is_told_which_side_divides():
    shard = Shard.of((64, 256), 4, 0)
    wide = [Parameter("wide", (64, 256), torch.float32, "matrix", shard)]
    (told,) = side(create("galore", rank=16), wide)
    kept, better = (
        state_bytes(create("galore", rank=16, proj_type=t), (64, 256), ranks=4) for t in ("std", "right")
    )
    assert told.endswith(f"proj_type=right saves {format_bytes(kept - better)} of state.")
    assert side(create("galore", rank=16, proj_type="right"), wide) == []
    assert side(create("galore", rank=16), [replace(wide[0], shard=None)]) == []


def test_copies_hold_everything_and_a_bucket_of_gradients():
    one, many = (plan(FAMILIES["llama"](), "adamw", **SMALL, **how).plans[0] for how in ({}, DDP))
    assert many.state_bytes == one.state_bytes
    assert many.at_peak["weights"] == one.at_peak["weights"]
    assert many.at_peak["buckets"] == padded(skeleton(FAMILIES["llama"]()).parameters(), 1, 2)


DDP = {"ranks": 2, "shard": "none"}


def test_adapters_divide_with_the_frozen_model():
    found = [
        plan(FAMILIES["llama"](), "adamw", **SMALL, lora_rank=4, ranks=n).plans[0].at_peak for n in (1, 8)
    ]
    assert found[1]["weights"] < found[0]["weights"] / 4
    assert found[1]["optimizer_state"] < found[0]["optimizer_state"] / 4


def test_a_budget_says_how_many_cards_are_needed():
    config = FAMILIES["llama"]()
    fits = plan(config, "adamw", **SMALL, ranks=2, budget=1 << 30).plans[0]
    assert fits.fits
    assert fits.ranks_needed == fits.to_dict()["ranks_needed"] == 1
    run = plan(config, "adamw", **SMALL, ranks=2).run
    assert needed(config, run, create("adamw"), 1 << 16) == 0  # activations do not divide
    two = plan(config, "adamw", **SMALL, ranks=2).plans[0].peak["allocated"]
    assert needed(config, run, create("adamw"), two) == 2
    assert needed(config, run, create("adamw"), two - 1) != 2


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"ranks": 2, "lora_rank": 4, "quantize": "nf4"}, "4-bit weights whole"),
        ({"ranks": 6, "per_node": 4}, "make ranks a multiple"),
        ({"shard": "none"}, "there is one rank"),
        ({**DDP, "gradient_release": True}, "on one device"),
        ({"ranks": 2, "autocast": True, "autocast_dtype": "float16", "dtype": "float32"}, "float16"),
    ],
)
def test_what_ranks_do_not_do_is_refused(options, match):
    with pytest.raises(UserError, match=match):
        plan(FAMILIES["llama"](), "adamw", **SMALL, **options)


def test_probes_that_look_at_whole_weights_are_refused_on_rows():
    with pytest.raises(UserError, match="take mezo or fzoo"):
        plan(FAMILIES["llama"](), "lozo", **SMALL, ranks=2)


def test_accelerate_reads_what_is_emitted_beside_the_run(tmp_path: Path):
    from accelerate.commands.config.config_args import load_config_from_file

    FAMILIES["llama"]().save_pretrained(tmp_path / "model")
    words = f"plan --model {tmp_path / 'model'} --optim adamw --seq-len 32 --ranks 16 --per-node 8"
    done = CliRunner().invoke(
        cli.app, [*words.split(), "--budget", "2GiB", "--emit", str(tmp_path / "run.yaml")]
    )
    assert done.exit_code == 0, done.output
    assert "cards needed" in done.stdout
    assert "bound" in done.stdout
    assert "accelerate launch --config_file" in " ".join(done.stdout.split()) + done.stderr
    found = load_config_from_file(str(tmp_path / "run.accelerate.yaml"))
    assert (found.num_processes, found.num_machines, str(found.distributed_type.value)) == (16, 2, "FSDP")
    assert found.fsdp_config["fsdp_version"] == 2
    assert found.mixed_precision == "no"
