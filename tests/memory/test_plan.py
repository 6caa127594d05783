"""The plan: published anchors, exact state, the document, levers, solving, emitting, refusals."""

from __future__ import annotations

import json
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from transformers import OpenAIGPTConfig

from lowmem import config as run_configs
from lowmem.errors import UserError
from lowmem.memory.advice import emit
from lowmem.memory.advice.levers import waterfall
from lowmem.memory.device.gpus import GIB
from lowmem.memory.pictures import extras, report_data
from lowmem.memory.plan import plan
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated, remembered
from lowmem.report import build
from lowmem.strategies import optimizer
from tests.enrolled import on_any_model
from tests.memory.families import FAMILIES, batch, loss, model

KEYS = {
    "strategy", "options", "state_bytes", "at_peak", "peak", "event", "events", "certainty", "fits",
    "headroom_bytes", "why",
}  # fmt: skip
SMALL = {"batch_size": 2, "seq_len": 48}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "gib", "event"),
    [
        ({}, 50.22, "embedding backward"),
        pytest.param(
            {"gradient_checkpointing": True}, 50.22, "embedding backward", marks=pytest.mark.thorough
        ),
        pytest.param({"gradient_release": True}, 49.83, "loss backward", marks=pytest.mark.thorough),
        ({"gradient_checkpointing": True, "gradient_release": True}, 38.95, "loss backward"),
        ({"attention": "eager"}, 74.58, "first layer backward"),
        pytest.param(
            {"dtype": "float32", "autocast": True}, 104.31, "loss backward", marks=pytest.mark.thorough
        ),
        pytest.param(
            {"lora_rank": 16, "adapter_dtype": "bfloat16"}, 23.90, "loss backward", marks=pytest.mark.thorough
        ),
        pytest.param({"lora_rank": 16, "autocast": True}, 26.20, "loss backward", marks=pytest.mark.thorough),
        ({"lora_rank": 16, "gradient_checkpointing": True}, 14.26, "loss backward"),
    ],
    ids=[
        "full",
        "checkpointing",
        "release",
        "both",
        "eager",
        "amp",
        "lora",
        "lora amp",
        "lora checkpointing",
    ],
)
def test_anchors_of_llama_7b(options, gib, event):
    """1 x 2048 tokens, without cuBLAS; moments in the dtype of what is trained."""
    states = "bf16" if options.get("dtype") != "float32" and not _wide_adapters(options) else "fp32"
    found = plan("llama-7b", "adamw", options={"states": states}, advise=False, **options).plans[0]
    assert round((found.peak["allocated"] - Run().library) / GIB, 2) == pytest.approx(gib, abs=0.0101)
    assert found.event == event


def _wide_adapters(options):
    return options.get("lora_rank") and options.get("adapter_dtype") != "bfloat16"


def test_document_has_the_promised_keys_and_is_plain():
    found = plan(FAMILIES["llama"](), "adamw,galore", budget="1GiB", **SMALL)
    document = json.loads(json.dumps(found.to_dict()))
    assert set(document) == {"model", "run", "budget_bytes", "plans"}
    assert set(document["model"]) == {"name", "parameters", "trainable"}
    assert document["budget_bytes"] == GIB
    for entry in document["plans"]:
        assert set(entry) == KEYS
        assert sum(entry["at_peak"].values()) == entry["peak"]["allocated"] == max(entry["events"].values())
        assert set(entry["certainty"]) >= set(entry["at_peak"])
        assert set(entry["certainty"].values()) <= {"exact", "bound", "estimate"}
        assert entry["peak"]["allocated"] <= entry["peak"]["reserved"] < entry["peak"]["device"]


@pytest.mark.parametrize("name", sorted(on_any_model()))
def test_every_strategy_is_planned_and_its_state_is_what_is_held(name):
    made = model("llama", torch.bfloat16)
    held = optimizer(made, name)
    held.init_state()
    found = plan(FAMILIES["llama"](), name, advise=False, **SMALL).plans[0]
    assert found.state_bytes == held.state_bytes()
    assert found.peak["allocated"] > found.state_bytes


def test_plan_on_cpu_is_a_real_step_under_torchs_tracker():
    from torch.distributed._tools.mem_tracker import MemTracker

    for name in ("adamw", "galore"):
        made, inputs = model("qwen3"), batch()
        stepper = optimizer(made, name)
        for _ in range(2):
            theirs = MemTracker()
            theirs.track_external(made, stepper, *inputs.values())
            with theirs:
                loss(made, inputs).backward()
                stepper.step()
            stepper.zero_grad()
        snapshot = theirs.get_tracker_snapshot("peak")[torch.device("cpu")]
        total = next(size for key, size in snapshot.items() if str(getattr(key, "value", key)) == "Total")
        found = plan(
            FAMILIES["qwen3"](), name, dtype="float32", device="cpu", max_grad_norm=0.0, advise=False, **SMALL
        )
        assert found.plans[0].peak["allocated"] == pytest.approx(total, rel=0.01)
        assert found.plans[0].peak["reserved"] is None


def test_depth_is_extrapolated_exactly():
    for family in ("llama", "gemma2"):
        config = FAMILIES[family]()
        config.num_hidden_layers = 8
        if getattr(config, "layer_types", None):
            config.layer_types = (config.layer_types[:2] * 4)[:8]
        for run in (
            Run(**SMALL, device="cpu"),
            Run(**SMALL, gradient_checkpointing=True, gradient_release=True),
        ):
            deep, quick = remembered(config, run), extrapolated(config, run)
            assert quick.tracker is None
            assert {n: m.total for n, m in quick.moments.items()} == {
                n: m.total for n, m in deep.moments.items()
            }
            assert sorted(p.name for p in quick.parameters) == sorted(p.name for p in deep.parameters)
            assert quick.total_parameters == deep.total_parameters


def test_levers_that_gain_nothing_are_named():
    why = " ".join(plan("llama-7b", "adamw", options="states=bf16").plans[0].why)
    assert "is at the embedding backward" in why
    assert "Gradient checkpointing gains nothing here" in why
    assert "Best lever: gradient checkpointing and release" in why
    assert "Closed form and trace agree" in why


RELEASE, CHECKPOINTING, CHUNKED = "gradient release", "gradient checkpointing", "chunked loss"


@pytest.mark.parametrize(
    ("family", "options", "left_out"),
    [
        ("openai-gpt", {}, CHECKPOINTING),
        ("llama", {"few_bit": 3}, CHECKPOINTING),
        ("llama", {"ranks": 2, "shard": "none"}, RELEASE),
        ("llama", {"dtype": "float32", "autocast": True, "autocast_dtype": "float16"}, RELEASE),
        ("llama", {"keep_output": True}, CHUNKED),
    ],
)
def test_levers_are_runs_that_can_be_planned(family, options, left_out):
    sizes = {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    config = OpenAIGPTConfig(**sizes) if family == "openai-gpt" else FAMILIES[family]()
    found = plan(config, "adamw", **{**SMALL, **options})
    steps = [row["lever"].removeprefix("+ ") for row in waterfall(found.config, found.run, found.made[0])]
    for names in ([lever.name for lever in found.plans[0].levers], steps):
        kept = {RELEASE, CHECKPOINTING, CHUNKED} - {left_out}
        assert kept <= set(names)
        assert left_out not in names


def test_fits_and_misses_are_ranked():
    found = plan("smollm2-135m", "adamw,galore", budget="2.2GiB", seq_len=512, advise=False)
    fits = [row.fits for row in found.plans]
    assert fits == sorted(fits, reverse=True)
    assert [row.headroom_bytes >= 0 for row in found.plans] == fits
    assert {row.verdict for row in found.plans} <= {"fits", "fits with retries", "out of memory"}


def test_a_budget_of_a_cpu_is_judged_by_the_tensors():
    on = {**SMALL, "device": "cpu", "advise": False}
    peak = plan(FAMILIES["llama"](), "adamw", **on).plans[0].peak["allocated"]
    whole, less = (plan(FAMILIES["llama"](), "adamw", budget=size, **on) for size in (peak, peak - 1))
    assert [(p.plans[0].verdict, p.plans[0].headroom_bytes) for p in (whole, less)] == [
        ("fits", 0),
        ("out of memory", -1),
    ]
    assert any("the budget is for tensors" in text for text in whole.assumptions)


def test_emitted_run_is_the_planned_one(tmp_path):
    found = plan(
        "smollm2-135m", "galore", options="rank=64", seq_len=128, gradient_release=True, advise=False
    )
    file = tmp_path / "run.yaml"
    file.write_text(emit.text("smollm2-135m", found.run, "galore", found.plans[0].options, "mine.jsonl"))
    run = run_configs.load(file)
    assert (run.model, run.optim, run.seq_len, run.gradient_release) == ("smollm2-135m", "galore", 128, True)
    assert "rank=64" in run.optim_args


OTHERWISE = {
    "dtype": "float16", "seq_len": 77, "batch_size": 3, "accumulation": 2, "gradient_checkpointing": True,
    "lora_rank": 4, "lora_alpha": 3.0, "lora_dropout": 0.25, "lora_targets": "q_proj", "quantize": "nf4",
    "adapter_args": "use_dora=true", "compile": "on", "steps": 9,
}  # fmt: skip


def test_every_option_is_emitted_or_refused_by_name():
    assert emit.known() == {f.name for f in fields(Run)}
    made = emit.run_config("gpt2", Run(**OTHERWISE), "adamw", {}, "mine.jsonl")
    assert {name: getattr(made, name) for name in OTHERWISE} == OTHERWISE
    assert made.data == "mine.jsonl"
    coded = emit.run_config("gpt2", Run(weights="int8", int8_embeddings=True, few_bit=4), "adamw", {})
    assert (coded.weights, coded.int8_embeddings, coded.few_bit) == ("int8", True, 4)
    assert emit.run_config("gpt2", Run(activation_offload=True), "adamw", {}).activation_offload
    assert emit.run_config("gpt2", Run(offload_state=True), "adamw", {}).offload_state
    with pytest.raises(UserError, match="its reward is a function of yours"):
        emit.run_config("gpt2", Run(task="grpo"), "adamw", {})
    apart = {
        "gradient_release",
        "adapter",
        "task",
        "weights",
        "int8_embeddings",
        "few_bit",
        "activation_offload",
        "offload_state",
    }
    assert {*OTHERWISE, *apart} == set(emit.SAME)
    released = emit.run_config(
        "gpt2", Run(gradient_release=True, max_grad_norm=0.0, adapter="ia3"), "adamw", {}
    )
    assert (released.gradient_release, released.clip, released.adapter) == (True, "auto", "ia3")
    mixed = Run(dtype="float32", autocast=True, autocast_dtype="float16")
    assert emit.run_config("gpt2", mixed, "adamw", {}).autocast == "float16"
    assert emit.run_config("gpt2", Run(max_grad_norm=0.0), "adamw", {}).clip == "none"
    assert emit.run_config("gpt2", Run(max_grad_norm=0.5), "adamw", {}).max_grad_norm == 0.5
    assert [
        emit.run_config("gpt2", Run(rows=r), "adamw", {}).packing for r in ("full", "packed", "padded")
    ] == [
        True,
        True,
        False,
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attention", "eager"),
        ("keep_output", True),
        ("eval_batch_size", 8),
        ("adapter_dtype", "float32"),
        ("double_quant", False),
        ("kbit_prepare", True),
    ],
)
def test_what_finetune_does_not_do_is_not_emitted(name, value):
    assert name in emit.NOT_DONE
    with pytest.raises(UserError, match=name):
        emit.run_config("gpt2", Run(**{name: value}), "adamw", {})


def test_report_data_has_every_picture():
    data = report_data(plan(FAMILIES["llama"](), "adamw,galore", budget="1GiB", **SMALL))
    json.dumps(data)
    assert data["waterfall"][0]["lever"] == "plain AdamW"
    assert all(row["peak"] > 0 for row in data["waterfall"])
    grid = data["grid"][0]
    assert len(grid["peak"]) == len(grid["seq_lens"])
    assert all(len(row) == len(grid["batch_sizes"]) for row in grid["peak"])
    assert all(low < high for row in grid["peak"] for low, high in pairwise(row))
    for entry in data["plans"]:
        line = entry["timeline"]
        assert len({len(values) for values in line["bytes"].values()}) == 1
        assert {"name", "start", "stop"} <= set(line["phases"][0])


def test_maps_of_one_method_are_told_apart():
    asked = "galore(rank=4),galore(rank=8)"
    data = report_data(plan(FAMILIES["llama"](), asked, budget="1GiB", advise=False, **SMALL))
    section = next(s for s in build(data).sections if s.title == "Sequence length and batch size")
    names = ["galore (rank=4)", "galore (rank=8)"]
    assert sorted(figure.title for figure in section.figures[1:]) == names
    assert sorted(row[0] for row in section.tables[0].rows) == names
    assert all(name in section.figures[0].svg for name in names)


@pytest.mark.parametrize("release", [False, True])
def test_the_picture_of_a_step_reaches_the_peak_of_the_table(release):
    found = plan(
        FAMILIES["llama"](), "galore", budget="1GiB", gradient_release=release, **SMALL, advise=False
    )
    line = extras(found, found.plans[0], found.made[0])["timeline"]
    totals = [sum(column) for column in zip(*line["bytes"].values(), strict=True)]
    names = [phase["name"] for phase in line["phases"]]
    assert ("optimizer step" in names) != release
    for phase in line["phases"]:
        shown = max(totals[phase["start"] : phase["stop"] + 1])
        assert shown == found.plans[0].events[phase["name"]], phase["name"]
    assert line["phases"][-1]["stop"] == len(totals) - 1


def test_beyond_the_models_length_is_a_warning_with_the_number():
    found = plan("gpt2", "adamw", seq_len=2048, advise=False)
    assert any("1024" in text and "2048" in text for text in found.warnings)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"gpu": "rtx9999"}, "unknown GPU"),
        ({"budget": "24GiB", "gpu": "t4"}, "one of the two"),
        ({"gpu": "t4", "device": "cpu"}, "gpu t4: device is cpu"),
        ({"dtype": "int3"}, "dtype"),
        ({"loss": "chunky"}, "did you mean 'chunked'"),
        ({"rows": "ragged"}, "rows"),
        ({"batch_size": 0}, "at least 1"),
        ({"batch_size": 0, "accumulation": 0}, "batch_size must be .*; accumulation must be"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"batch_size": 1.5, "seq_len": 2.5}, "batch_size must be .* got 1.5; seq_len must be .* got 2.5"),
        ({"gradient_checkpointing": "false"}, "gradient_checkpointing must be True or False, got 'false'"),
        ({"max_grad_norm": "1"}, "max_grad_norm must be a number, got '1'"),
        ({"loss": 3}, "loss must be text, got 3"),
        ({"quantize": "nf4"}, "lora_rank"),
        ({"sequence": 4}, "no option 'sequence'"),
        ({"options": "rank=4"}, "rank comes with projector="),
        ({"options": "rnk=4"}, "no option 'rnk'"),
    ],
)
def test_bad_input_is_one_line(arguments, match):
    with pytest.raises(UserError, match=match) as error:
        plan(FAMILIES["llama"](), "adamw", **{**SMALL, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("strategy", "options", "match"),
    [
        ("adamw", {"gradient_release": True, "accumulation": 2}, "needs the whole gradient of a window"),
        ("adamw", {"task": "kto", "batch_size": 1}, "batch_size: kto compares"),
        ("adamw", {"device": "cpu", "activation_offload": True}, "activation_offload: a CPU"),
        ("adamw", {"label_tokens": 8}, "label_tokens: of loss labels, loss is plain"),
        ("adamw", {"longest": 8, "rows": "padded"}, "longest: of packed rows, rows are padded"),
        ("adamw", {"typical": 8, "rows": "packed"}, "typical: packed rows are filled"),
        ("adamw", {"adapter_dtype": "bfloat16"}, "adapter_dtype: no adapter is trained"),
        ("adamw", {"device": "cpu", "compute_capability": 7.5}, "compute_capability: of a card"),
        ("adamw", {"device": "cpu", "workspace": 0}, "workspace: of a card, device is cpu"),
        ("adamw", {"gradient_release": True, "max_grad_norm": 0.5}, "max_grad_norm 0.5: with gradient_rel"),
        ("mezo", {"keep_output": True}, "no backward pass to keep the logits"),
        ("mezo", {"gradient_release": True}, "there are no gradients to release"),
        ("mezo", {"few_bit": 2}, "no backward pass to keep"),
    ],
)
def test_what_finetune_refuses_or_does_nothing_is_not_planned(strategy, options, match):
    with pytest.raises(UserError, match=match):
        plan(FAMILIES["llama"](), strategy, **{**SMALL, **options})


@pytest.mark.parametrize("strategy", ["adamw", "mezo"])
def test_a_run_on_a_cpu_keeps_its_levers_within_a_budget(strategy):
    found = plan(FAMILIES["llama"](), strategy, budget="1GiB", device="cpu", **SMALL).plans[0]
    assert "half the batch" in {lever.name for lever in found.levers}


def test_options_of_gradients_are_for_those_among_several_that_have_some():
    found = plan(FAMILIES["llama"](), "adamw,mezo", gradient_release=True, advise=False, **SMALL)
    assert {row.strategy for row in found.plans} == {"adamw", "mezo"}


def test_unknown_strategy_and_strange_models():
    with pytest.raises(UserError, match="did you mean 'galore'"):
        plan(FAMILIES["llama"](), "galor")
    with pytest.raises(UserError, match="cannot plan int"):
        plan(3, "adamw")
    import transformers

    with pytest.raises(UserError, match="experts"):
        plan(transformers.PhimoeConfig(num_hidden_layers=2), "adamw")
