"""Plans of runs with int8 weights: exact rows, the peak of a real step, what fits small cards."""

from __future__ import annotations

import pytest
import torch

import lowmem
from lowmem.errors import UserError
from lowmem.memory.count import model_state_bytes
from lowmem.memory.footprint import LOAD
from lowmem.memory.plan import plan
from lowmem.models.computing.wide import wide
from lowmem.models.int8.convert import held_bytes, quantize_weights_
from tests.memory.families import FAMILIES, batch, loss, model

RUN = {"batch_size": 2, "seq_len": 48, "device": "cpu", "max_grad_norm": 0.0, "weights": "int8"}


@pytest.mark.parametrize(
    ("family", "name", "options", "embeddings"),
    [
        ("llama", "q_galore", {"update_proj_gap": 1}, False),
        ("gpt2", "adamw", {}, True),
        ("llama", "adamw", {"writer": "eco"}, True),
    ],
)
def test_plan_on_cpu_is_a_real_step_under_torchs_tracker(
    family: str, name: str, options: dict[str, object], embeddings: bool
) -> None:
    from torch.distributed._tools.mem_tracker import MemTracker

    made = quantize_weights_(model(family, torch.bfloat16), embeddings=embeddings)
    stepper = lowmem.optimizer(made, name, lr=1e-3, compile="off", **options)
    inputs, parts = batch(), [t for p in made.parameters() for t in (getattr(p, "codes", p),)]
    parts += [p.scale for p in made.parameters() if hasattr(p, "scale")]
    for _ in range(2):
        theirs = MemTracker()
        kept = [grid for grids in stepper.chunks.grids.values() for grid in grids]  # of the step before
        kept += list(stepper._constants.values())
        theirs.track_external(*parts, *made.buffers(), *kept, stepper, *inputs.values())
        with theirs, wide(made):
            loss(made, inputs).backward()
            stepper.step()
        stepper.zero_grad()
    snapshot = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]
    total = next(size for key, size in snapshot.items() if str(getattr(key, "value", key)) == "Total")
    planned = plan(FAMILIES[family](), name, options=options, advise=False, int8_embeddings=embeddings, **RUN)
    found = planned.plans[0]
    assert found.state_bytes == stepper.state_bytes() == model_state_bytes(stepper.strategy, made)
    buffers = sum(b.numel() * b.element_size() for b in made.buffers())
    assert found.at_peak["weights"] == held_bytes(made) + buffers
    assert found.peak["allocated"] == pytest.approx(total, rel=0.01)
    assert held_bytes(made) < found.events[LOAD]


def test_large_models_are_trained_whole_on_small_cards() -> None:
    lean = {"weights": "int8", "gradient_checkpointing": True, "gradient_release": True, "seq_len": 512}
    small = plan("llama-7b", "q_galore", budget="12GiB", advise=False, **lean).plans[0]
    assert small.fits
    assert small.headroom_bytes > 2 << 30


def test_what_is_not_planned_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match="take quantize: nf4"):
        plan("llama-7b", "adamw", weights="int8", lora_rank=8)
    with pytest.raises(UserError, match="take qzo"):
        plan("llama-7b", "mezo", weights="int8")
