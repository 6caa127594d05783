"""Tasks beside supervised fine-tuning: their steps are planned as TRL takes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import lowmem
from lowmem.errors import UserError
from lowmem.memory import predict
from lowmem.memory.advice.levers import waterfall
from lowmem.memory.advice.search import _Finder, search
from lowmem.memory.device.gpus import gpu
from lowmem.memory.gather import make_run
from lowmem.memory.trace.tasks.losses import Largest
from tests.memory import families

SMALL: dict[str, Any] = {"batch_size": 2, "seq_len": 48, "dtype": "float32", "advise": False, "device": "cpu"}


def planned(task: str, **options: Any) -> Any:
    config = families.FAMILIES[options.pop("family", "llama")]()
    return lowmem.plan(config, "adamw", task=task, **{**SMALL, **options})


def test_both_answers_of_a_row_are_held_and_no_reference() -> None:
    pairs, rows = planned("dpo"), planned("sft", loss="chunked", batch_size=4)
    for event in ("first layer backward", "layers backward"):
        assert pairs.plans[0].events[event] == pytest.approx(rows.plans[0].events[event], rel=2e-3)
    assert pairs.plans[0].at_peak["weights"] == rows.plans[0].at_peak["weights"]
    assert any("no reference model is held" in text for text in pairs.assumptions)


def test_dropout_is_taken_out_as_the_trainer_does() -> None:
    options = {"family": "gpt2"}
    pairs, rows = planned("dpo", **options), planned("sft", batch_size=4, loss="chunked", **options)
    held = [found.plans[0].at_peak["activations"] for found in (pairs, rows)]
    assert held[0] < 0.9 * held[1]


def test_what_depends_on_values_is_answered_by_the_largest_case() -> None:
    x, mask = torch.zeros(3, 4), torch.tensor([True, False, True])
    with Largest():
        assert x[mask].shape == (3, 4)
        assert torch.nonzero(mask).shape == (3, 1)
        assert x.sum().item() == 1
        assert bool(mask[1])


def test_a_score_takes_the_place_of_the_vocabulary() -> None:
    whole, adapted = planned("reward"), planned("reward", lora_rank=2)
    base = families.BASE
    assert whole.model.parameters == planned("orpo").model.parameters + base["hidden_size"] * (
        1 - base["vocab_size"]
    )
    assert whole.plans[0].events["loss forward"] < planned("orpo").plans[0].events["loss forward"]
    matrices = (64, 64), (64, 32), (64, 32), (64, 64), (64, 160), (64, 160), (160, 64)
    adapters = 3 * sum(2 * (m + n) for m, n in matrices)
    assert adapted.model.trainable == adapters + base["hidden_size"]  # the score is trained beside them
    with pytest.raises(UserError, match="plan it by the model's name"):
        lowmem.plan(families.model("llama"), "adamw", task="reward", batch_size=2, seq_len=48)


def test_the_second_pass_of_kto_keeps_nothing() -> None:
    event = "first layer backward"
    judged, paired = planned("kto", batch_size=4), planned("dpo", batch_size=2)
    assert judged.plans[0].events[event] == pytest.approx(paired.plans[0].events[event], rel=5e-3)


GROWN = {"batch_size": 4, "num_generations": 4, "max_completion": 32, "seq_len": 16}


def test_answers_grow_beside_their_keys_and_values() -> None:
    """Twice the rows hold twice the cache: keys and values of 3 layers, 2 heads of 16 numbers, 48 tokens."""
    one, two = (planned("grpo", **GROWN, accumulation=n).plans[0].events["generation"] for n in (1, 2))
    cache = 2 * 3 * 2 * 16 * 47 * 4 * 4
    assert cache < two - one < 2 * cache


def test_recomputation_waits_until_the_answers_are_there() -> None:
    plain, again = (planned("grpo", **GROWN, gradient_checkpointing=on).plans[0] for on in (False, True))
    assert again.events["generation"] == plain.events["generation"]
    assert again.events["recompute"] < plain.events["first layer backward"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"task": "grpo", "batch_size": 6}, "do not divide batch_size x accumulation = 6"),
        ({"max_completion": 32}, "for task grpo"),
        ({"loss": "plain"}, "a loss of its own"),
        ({"rows": "packed"}, "pads its rows"),
        ({"ranks": 2}, "planned on one card"),
        ({"task": "reward", "lora_rank": 2, "quantize": "nf4"}, "over 4-bit weights is not planned"),
        ({"task": "classify"}, "is not planned: how many candidates .* plan it as sft, each candidate"),
    ],
)
def test_what_a_task_does_not_do_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        planned(**{"task": "dpo", **options})


def test_methods_without_gradients_have_no_such_task() -> None:
    with pytest.raises(UserError, match="works without gradients, task dpo needs them"):
        lowmem.plan(families.FAMILIES["llama"](), "mezo", task="dpo", **SMALL)


def test_the_search_takes_a_task_and_refuses_one_before_it_traces() -> None:
    options = {**SMALL, "task": "dpo", "lora_rank": 4}
    del options["advise"], options["device"]
    found = search(families.FAMILIES["llama"](), gpu("4090"), options, among=("adamw", "mezo"))
    assert [row.strategy.name for row in found] == ["adamw"]
    modes = list(_Finder(families.FAMILIES["llama"](), gpu("4090"), {"task": "reward"}).modes(False))
    assert [run.quantize for run in modes] == [None, None, None]
    assert found[0].verdict == "fits"
    with pytest.raises(UserError, match="is not planned: it generates"):
        search(families.FAMILIES["llama"](), gpu("4090"), {"task": "answer"})


@pytest.mark.parametrize("computing", ["none", "bfloat16", "float16"])
def test_a_run_is_predicted_under_its_autocast(computing: str) -> None:
    settings = {"model": "gpt2", "optim": "adamw", "dtype": "float32", "autocast": computing}
    run = make_run(predict.run_options(lowmem.config.build(settings), {}))
    assert run.autocast == (computing != "none")
    assert run.autocast_dtype == ("float16" if computing == "float16" else "bfloat16")


@pytest.mark.parametrize("task", ["dpo", "kto", "reward", "grpo"])
def test_the_waterfall_of_a_task_keeps_its_loss(task: str) -> None:
    sizes = {"batch_size": 8, "max_completion": 8} if task == "grpo" else {}
    found = planned(task, **sizes)
    rows = waterfall(found.config, found.run, found.made[0])
    assert "+ chunked loss" not in [row["lever"] for row in rows]
    assert rows[0]["lever"] == "plain AdamW"
    assert all(row["peak"] > 0 for row in rows)


def test_a_run_is_predicted_for_the_rows_of_its_data() -> None:
    config = lowmem.config.build({"model": "gpt2", "optim": "adamw", "task": "dpo"})
    found = predict.run_options(
        config, {"batch": {"rows": 8, "tokens": 61, "kind": "full", "label_tokens": None}}
    )
    assert (found["batch_size"], found["seq_len"], found["task"]) == (4, 61, "dpo")
    assert "loss" not in found
    options = {"task": "grpo", "reward": "operator:length_hint", "num_generations": 4, "batch_size": 4}
    batch = {"rows": 4, "tokens": 40, "kind": "full", "label_tokens": None, "prompt_tokens": 11}
    config = lowmem.config.build({"model": "gpt2", "optim": "adamw", **options})
    found = predict.run_options(config, {"batch": batch})
    assert (found["seq_len"], found["max_completion"], found["num_generations"]) == (11, 29, 4)
    config = lowmem.config.build({"model": "gpt2", "optim": "adamw", **options, "beta": 0.1})
    entry, notes = predict.of_run(config)({"batch": batch}, lowmem.create("adamw"))
    assert entry is None
    assert "is not planned" in notes[0]
