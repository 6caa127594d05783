"""The largest that fits, and the map over sequence and batch: what planning in full says at each point."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowmem import create
from lowmem.memory import gather
from lowmem.memory.advice import solve
from lowmem.memory.advice.levers import quick_peak
from lowmem.memory.device.gpus import budget
from lowmem.memory.footprint import footprint
from lowmem.memory.plan import row
from lowmem.memory.run import Run
from lowmem.memory.surface import Surface, traced_sizes
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.models.entries import resolve
from tests.memory.families import FAMILIES


@pytest.mark.parametrize(
    ("family", "options", "rows", "tokens"),
    [
        ("llama", {"loss": "chunked", "gradient_checkpointing": True}, 2, 768),
        ("llama", {"rows": "padded"}, 16, 48),
        ("gemma2", {}, 3, 96),  # windows
        ("llama", {"eval_batch_size": 64}, 3, 96),  # an evaluation that binds
    ],
)
def test_a_map_meets_the_plan_away_from_its_traces(family, options, rows, tokens):
    config, run = FAMILIES[family](), Run(**options)
    at = replace(run, batch_size=rows, seq_len=tokens)
    held = footprint(create("adamw"), extrapolated(config, at).parameters, run)
    assert rows not in traced_sizes(run, tokens)
    assert Surface(config, run, held).peak(rows, tokens) == pytest.approx(
        quick_peak(config, at, held).allocated, rel=0.01
    )


@pytest.mark.parametrize(
    ("unknown", "options"),
    [
        ("seq_len", {}),
        ("batch_size", {"rows": "padded"}),
        ("batch_size", {"loss": "chunked"}),
        ("seq_len", {"rows": "padded", "eval_batch_size": 16}),
    ],
)
def test_a_solution_fits_and_the_next_does_not(unknown, options):
    run, limit = Run(batch_size=1, seq_len=256, **options), budget("600MiB")
    config = FAMILIES["llama"]()
    config.max_position_embeddings = 1 << 20
    found = solve.largest(unknown, config, run, create("adamw"), limit)
    assert found.plan.fits
    assert found.value > 0
    more = replace(run, **{unknown: int(found.value * 1.02) + solve.GRAIN[unknown]})
    assert not row(config, more, create("adamw"), limit, advise=False).fits


def test_a_boundary_is_found_in_few_looks():
    def staircase(number):  # flat, then steep, then steeper
        looked.append(number)
        return max(1000, 90 * number, number**2)

    for limit in (999, 1000, 5000, 123_456, 10**8):
        looked = []
        found = solve.Boundary(staircase).below(limit, 5000)
        assert found == max((n for n in range(5001) if max(1000, 90 * n, n * n) <= limit), default=-1)
        assert len(looked) == len(set(looked)) < 20


@pytest.mark.parametrize(
    ("options", "least", "grain"),
    [
        ({"task": "kto", "batch_size": 4}, 2, 1),
        ({"task": "grpo", "batch_size": 16, "num_generations": 4, "accumulation": 2}, 2, 2),
        ({"batch_size": 3}, 1, 1),
    ],
)
def test_only_batches_that_a_task_takes_are_solved_for(options, least, grain):
    found = solve._grid("batch_size", gather.make_run(options), create("adamw"), 100)
    assert (found.least, found.grain) == (least, grain)


def test_nothing_fits_is_an_answer():
    found = solve.largest(
        "batch_size", resolve("smollm2-135m").config(), Run(seq_len=256), create("adamw"), budget("1GiB")
    )
    assert (found.value, found.plan) == (0, None)
