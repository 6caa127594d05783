"""RunConfig: one declaration behind flags, YAML and checks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from lowmem.combinations import of_precision
from lowmem.config import RunConfig, build, dump, from_flags, load, read
from lowmem.errors import ConfigError, UserError

LEAST = {"model": "gpt2", "optim": "adamw"}
ROOT = Path(__file__).resolve().parents[2]
# A value other than the default for every field.
OTHER: dict[str, Any] = {
    "task": "grpo",
    "beta": 0.25,
    "reward": "my_rewards:exact",
    "objective": "accuracy",
    "num_generations": 3,
    "max_completion": 9,
    "model": "./my model",
    "dtype": "float32",
    "autocast": "bfloat16",
    "lora_rank": 8,
    "lora_alpha": 4.0,
    "lora_dropout": 0.05,
    "lora_targets": "q_proj,v_proj",
    "adapter": "lora",
    "adapter_args": "use_dora=true",
    "quantize": "nf4",
    "weights": "int8",
    "int8_embeddings": True,
    "data": "rows: all.jsonl",
    "data_format": "text",
    "columns": "prompt=question,answer=solution",
    "eval_data": "held # out.jsonl",
    "eval_rows": 7,
    "seq_len": 33,
    "packing": False,
    "optim": "galore",
    "plugin": "my_parts",
    "optim_args": "rank=4,states=int8,writer=kahan",
    "lr": 3e-5,
    "betas": (0.8, 0.95),
    "eps": 1e-6,
    "weight_decay": 0.1,
    "schedule": "wsd",
    "decay": 3,
    "warmup": 2,
    "max_grad_norm": 0.5,
    "clip": "tensor",
    "compile": "off",
    "neftune": 5.0,
    "gradient_checkpointing": True,
    "activation_offload": True,
    "few_bit": 3,
    "gradient_release": True,
    "offload_state": True,
    "fsdp": True,
    "steps": 9,
    "epochs": 0.5,
    "batch_size": 3,
    "accumulation": 4,
    "seed": 5,
    "nonfinite_limit": 3,
    "threads": 2,
    "output_dir": "~/out, put",
    "resume": True,
    "overwrite": True,
    "save_steps": 6,
    "save_total_limit": 3,
    "eval_steps": 4,
    "forgetting": True,
    "eval": "lm_eval:arc_easy",
    "keep_best": True,
    "early_stopping": 2,
    "report_to": "tensorboard",
    "logging_steps": 2,
    "prompt": ("Who's there?", "yes", "2015", "[a, b]"),
    "keep_int8": True,
    "report": False,
}
APART = (
    ("epochs", "overwrite", "objective", "activation_offload", "few_bit"),
    ("epochs", "fsdp"),
    ("epochs", "weights", "int8_embeddings", "keep_int8"),
)
"""Left out of the first part, and each beside little else."""


def halves() -> list[dict[str, Any]]:
    """All values of OTHER, in two configurations that may be written."""
    others = {key for part in APART for key in part}
    first = {k: v for k, v in OTHER.items() if k not in others}
    return [first, *({**LEAST, **{k: OTHER[k] for k in part}} for part in APART)]


def test_the_table_above_names_every_field() -> None:
    assert list(OTHER) == [f.name for f in dataclasses.fields(RunConfig)]
    for f in dataclasses.fields(RunConfig):
        assert OTHER[f.name] != f.default


@pytest.mark.parametrize("values", halves())
def test_dump_and_load_give_the_same_run(values: dict[str, Any], tmp_path: Path) -> None:
    config = RunConfig(**values)
    (tmp_path / "run.yaml").write_text(dump(config), encoding="utf-8")
    assert load(tmp_path / "run.yaml") == config
    assert {k: v for k, v in dataclasses.asdict(config).items() if k in values} == values


@pytest.mark.parametrize("values", halves())
def test_text_of_a_flag_means_the_same_as_the_value(values: dict[str, Any]) -> None:
    def as_flag(value: Any) -> Any:
        if isinstance(value, bool):
            return value
        if isinstance(value, tuple) and not isinstance(value[0], str):
            return ",".join(map(str, value))
        return list(value) if isinstance(value, tuple) else str(value)

    assert from_flags({k: as_flag(v) for k, v in values.items()}) == RunConfig(**values)


def test_a_flag_wins_over_the_file_and_none_is_not_a_flag(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: gpt2\noptim: adamw\nlr: 1e-3\nseed: 7\n", encoding="utf-8")
    config = from_flags({"lr": "2e-3", "seed": None}, tmp_path / "run.yaml")
    assert (config.lr, config.seed) == (2e-3, 7)
    assert from_flags({"lr": "2e-3"}, read(tmp_path / "run.yaml")) == config


@pytest.mark.parametrize(("flag", "other"), [("steps", "epochs"), ("epochs", "steps")])
def test_a_length_given_as_a_flag_replaces_that_of_the_file(flag: str, other: str) -> None:
    config = from_flags({flag: "3"}, {**LEAST, other: 7})
    assert (getattr(config, flag), getattr(config, other)) == (3, None)


def test_all_problems_are_reported_at_once() -> None:
    values = {
        "modle": 1,
        "lr": "fast",
        "steps": 0,
        "warmup": -1,
        "compile": "of",
        "eps": 0,
        "packing": "maybe",
    }
    with pytest.raises(ConfigError) as raised:
        build({**values, "betas": [0.9]}, check=lambda v: [f"checked {v['dtype']}"])
    text = "\n".join(raised.value.problems)
    assert len(raised.value.problems) == 11
    for expected in (
        "unknown setting 'modle'; did you mean 'model'?",
        "model is missing",
        "optim is missing",
        "lr: 'fast' is not a number",
        "steps: 0 is out of range; it must be at least 1",
        "warmup: -1 is out of range",
        "compile: 'of' is not allowed; did you mean 'off'?",
        "eps: 0 is out of range; it must be above 0",
        "packing: 'maybe' is not true or false",
        "betas: [0.9] is not a list of 2 values",
        "checked bfloat16",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("values", "differentiates", "problem"),
    [
        ({"dtype": "float16"}, True, "use dtype: float32 with autocast: float16"),
        ({"dtype": "float16", "lora_rank": 4}, True, "set autocast: float16 as well"),
        ({"dtype": "float32", "autocast": "float16"}, False, "use dtype: float16"),
        ({"dtype": "float16"}, False, ""),
        ({"dtype": "float16", "lora_rank": 4, "autocast": "float16"}, True, ""),
        ({"dtype": "float32", "autocast": "float16"}, True, ""),
        ({"dtype": "bfloat16"}, True, ""),
    ],
)
def test_float16_trains_with_a_scaled_loss_or_not_at_all(
    values: dict[str, Any], differentiates: bool, problem: str
) -> None:
    found = of_precision(dataclasses.asdict(build({**LEAST, **values})), differentiates=differentiates)
    assert len(found) == bool(problem)
    assert problem in "".join(found)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"steps": 10, "epochs": 1}, "steps and epochs: both given"),
        ({"resume": True, "overwrite": True}, "resume and overwrite"),
        ({"steps": 10, "warmup": 11}, "11 steps of warm-up in a run of 10; make it 10 or less"),
        ({"gradient_release": True, "clip": "global"}, "use clip: previous, tensor or none"),
        ({"clip": "previous"}, "clip: previous is for gradient_release; use clip: global"),
        ({"autocast": "float16"}, "autocast: over weights of bfloat16"),
        (
            {"dtype": "float32", "autocast": "float16", "gradient_release": True},
            "gradient_release: with autocast: float16 a step is skipped where any gradient overflows",
        ),
    ],
)
def test_settings_that_exclude_each_other(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        build({**LEAST, **values})
    with pytest.raises(ConfigError, match=problem):
        RunConfig(**{**LEAST, **values})


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("lr: 1e-4", "lr", 1e-4),  # text for YAML 1.1
        ("compile: on", "compile", "on"),  # true for YAML 1.1
        ("compile: off", "compile", "off"),
        ("steps: 1e3", "steps", 1000),
        ("quantize: none", "quantize", None),
        ("steps: null", "steps", None),
        ("prompt: one", "prompt", ("one",)),
        ("betas: 0.9,0.99", "betas", (0.9, 0.99)),
        (
            "optim_args:\n  rank: 4\n  exact: true\n  states: int8",
            "optim_args",
            "rank=4,exact=true,states=int8",
        ),
    ],
)
def test_how_yaml_is_read(line: str, name: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: gpt2\noptim: adamw\n{line}\n", encoding="utf-8")
    assert getattr(load(tmp_path / "run.yaml"), name) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lr: 1\nlr: 2\n", "sets lr more than once"),
        ("- lr\n", "must map names to values"),
        ("", "must map names to values"),
        ("lr: [1\n", "is not valid YAML"),
        ("lr: \x00\n", "is not valid YAML"),
        ("lr: {a: b}\nmodel: gpt2\noptim: adamw", "lr: {'a': 'b'} is not a number"),
        ("seed: true\nmodel: gpt2\noptim: adamw", "seed: True is not a whole number"),
        ("data: 2015\nmodel: gpt2\noptim: adamw", "data: 2015 is not a text; put it in quotes"),
        ("seq_len: null\nmodel: gpt2\noptim: adamw", "seq_len: no value given"),
    ],
)
def test_bad_files_are_one_line(text: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load(tmp_path / "run.yaml")
    assert problem in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_and_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "absent.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(UserError, match="not UTF-8 text"):
        read(tmp_path / "bytes.yaml")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", math.nan, math.inf])
def test_numbers_are_finite(value: Any) -> None:
    with pytest.raises(ConfigError, match="lr"):
        build({**LEAST, "lr": value})


def test_the_default_folder_is_named_after_model_and_strategy() -> None:
    assert build({"model": "HuggingFaceTB/SmolLM2-135M", "optim": "galore"}).output_path == Path(
        "outputs/smollm2-135m-galore"
    )


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "runs").glob("*.yaml")), ids=lambda f: f.name)
def test_shipped_configurations(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.splitlines()[0] == f"# lowmem finetune --config configs/runs/{file.name}"
    knobs = [line for line in text.splitlines() if ":" in line and not line.startswith("#")]
    assert [line for line in knobs if "#" not in line] == [], "each knob has a comment"
    load(file)
    assert set(yaml.safe_load(text)) <= set(OTHER)


def test_several_data_sets_are_one_value(tmp_path: Path) -> None:
    """Flags that are repeated, a list in YAML, and the text that both become."""
    text = "a.jsonl + b.jsonl=2"
    (tmp_path / "run.yaml").write_text(
        "model: gpt2\noptim: adamw\ndata:\n- a.jsonl\n- b.jsonl=2\n", encoding="utf-8"
    )
    assert load(tmp_path / "run.yaml").data == text
    assert from_flags({**LEAST, "data": ["a.jsonl", "b.jsonl=2"]}).data == text
    assert build({**LEAST, "data": text}).data == text


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optim": "galore(rank=8"}, "lacks a bracket"),
        ({"optim": "galore(rank=8)", "optim_args": "rank=4"}, "give them once"),
        ({"optim": "galore(rank=8),adamw(states=bf16)"}, "a run takes one"),
    ],
)
def test_options_in_brackets_are_whole_and_given_once(given: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build({"model": "gpt2", **given})


def test_options_may_stand_in_brackets_as_in_a_plan() -> None:
    made = build({"model": "gpt2", "optim": "galore(rank=8,states=int8)"})
    assert (made.optim, made.optim_args) == ("galore", "rank=8,states=int8")
