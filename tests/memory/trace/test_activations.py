"""What is done about activations is planned as it runs: few bits of them, or host memory in between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lowmem
from lowmem.combinations import of_activations, problems
from lowmem.config import RunConfig
from lowmem.errors import ConfigError, UserError
from lowmem.memory.gather import make_run
from lowmem.memory.plan import row as row_of
from lowmem.models.few_bit import keep_few_bits_
from tests.memory import families
from tests.memory.test_quantized import measured

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
SMALL: dict[str, Any] = {
    "batch_size": 2, "seq_len": 48, "device": "cpu", "max_grad_norm": 0.0, "advise": False, "dtype": "float32"
}  # fmt: skip
PHASES = ("loss backward", "first layer backward")


def planned(**options: Any) -> Any:
    adamw = lowmem.create("adamw", writer="nearest")
    return lowmem.plan(families.FAMILIES["gpt2"](), adamw, **SMALL, **options).plans[0]


def agree(row: Any, expected: Any, rel: float) -> None:
    for phase in PHASES:
        total = row.events[phase] - row.at_peak["optimizer_state"]
        assert total == pytest.approx(sum(expected[phase].values()), rel=rel), phase


def test_few_bits_are_planned_as_they_are_kept() -> None:
    made = families.model("gpt2")
    keep_few_bits_(made, 3)
    row = planned(few_bit=3)
    agree(row, measured(made), 0.005)
    assert row.events["loss backward"] < planned().events["loss backward"]


def test_activations_in_host_memory_are_not_on_the_device() -> None:
    """The real ones leave as arrays, which are no tensors, and come back."""
    made = families.model("gpt2")
    own = {x.untyped_storage().data_ptr() for x in made.parameters()}
    forward = made.forward

    def leave(x: Tensor) -> Any:
        small = x.numel() * x.element_size() < 1024
        return x if small or x.untyped_storage().data_ptr() in own else (x.numpy().copy(), x.stride())

    def come(held: Any) -> Tensor:
        if isinstance(held, Tensor):
            return held
        array, stride = held
        out = torch.empty_strided(array.shape, stride, dtype=torch.from_numpy(np.asarray(array)).dtype)
        return out.copy_(torch.from_numpy(array))

    def moved(*args: Any, **kwargs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(leave, come):
            return forward(*args, **kwargs)

    made.forward = moved
    adamw = lowmem.create("adamw", writer="nearest")
    run = replace(
        make_run({key: value for key, value in SMALL.items() if key != "advise"}), activation_offload=True
    )  # nobody may ask it of a CPU
    row = row_of(families.FAMILIES["gpt2"](), run, adamw, None, advise=False)
    agree(row, measured(made), 0.02)
    assert row.at_peak["activations"] < planned().at_peak["activations"] / 2


def test_what_spares_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="computed anew"):
        lowmem.plan(families.FAMILIES["gpt2"](), "adamw", few_bit=3, gradient_checkpointing=True, **SMALL)
    with pytest.raises(ConfigError, match="computed anew"):
        RunConfig(model="gpt2", optim="adamw", few_bit=3, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="not for task grpo"):
        RunConfig(model="gpt2", optim="adamw", task="grpo", reward="a:b", num_generations=2, batch_size=2,
                  activation_offload=True)  # fmt: skip
    run = vars(RunConfig(model="gpt2", optim="mezo", few_bit=3))
    assert problems(run) == of_activations(run, differentiates=True) == []
    assert "keeps no activations" in of_activations(run, differentiates=False)[0]
