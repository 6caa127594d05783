"""Training arguments: strategies by name, checked at once, and still ordinary arguments."""

import dataclasses
import json

import pytest
import torch
import transformers

from lowmem.errors import ConfigError, UserError
from lowmem.optim.writers import Halves
from lowmem.training.arguments import LowMemArguments, LowMemSFTConfig, build_strategy
from lowmem.training.factory import refuse_half

CPU = {"use_cpu": True, "report_to": "none"}


def problems(**values) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        LowMemArguments(output_dir="unused", **CPU, **values)
    return caught.value.problems


def test_strategy_comes_from_name_and_typed_options():
    args = LowMemArguments(
        output_dir="unused", optim="galore", optim_args="rank=16, update_proj_gap=3,scale=1", **CPU
    )
    options = args.strategy().options
    assert (options["rank"], options["update_proj_gap"], options["scale"]) == (16, 3, 1.0)
    assert type(options["scale"]) is float
    assert args.optim == "galore"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": "galor"}, ["unknown strategy 'galor'", "did you mean 'galore'"]),
        ({"optim_args": "rnak=4"}, ["no option 'rnak'", "did you mean 'rank'"]),
        ({"optim_args": "rank"}, ["key=value"]),
        ({"optim_args": "rank=many"}, ["rank is a whole number", "'many'"]),
        ({"clip": "globl"}, ["clip", "did you mean 'global'"]),
        ({"compile": "maybe"}, ["compile", "'maybe'", "auto, off, on"]),
        ({"optim_args": "writer=kahn"}, ["writer", "did you mean 'kahan'"]),
        ({"gradient_release": True, "clip": "global"}, ["clip", "'previous', 'tensor' or 'none'"]),
        ({"clip": "tensor"}, ["gradient_release=True"]),
        ({"clip": "global", "max_grad_norm": 0.0}, ["max_grad_norm above 0"]),
        ({"gradient_release": True, "fp16": True}, ["fp16", "bf16=True"]),
        ({"gradient_release": True, "auto_find_batch_size": True}, ["per_device_train_batch_size"]),
        ({"deepspeed": "zero.json"}, ["deepspeed", "shapes", "fsdp=True"]),
        ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, ["version 1", "take version 2"]),
        ({"fsdp": True, "fsdp_config": {"cpu_offload": True}}, ["cpu_offload", "drop it"]),
        ({"fsdp": True, "fp16": True}, ["fp16", "bf16=True"]),
        ({"gradient_sync": "low_rank"}, ["gradient_sync", "clip='none'"]),
        ({"gradient_sync": "low_rank", "clip": "none", "optim": "fira"}, ["fira needs whole gradients"]),
        ({"optim_target_modules": ["attn"]}, ["optim_target_modules", "leave it out"]),
        ({"push_to_hub": True}, ["hub_strategy", "use 'end'"]),
    ],
)
def test_each_problem_says_what_is_allowed(values, words):
    (problem,) = problems(**values)
    assert all(word in problem for word in words), problem
    assert "\n" not in problem


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"activation_checkpointing": True}, "activation_checkpointing"),
        ({"gradient_release": True}, "gradient_release"),
        ({"clip": "global"}, "clip"),
        ({"fp16": True}, "fp16"),
        ({"torch_compile": True}, "torch_compile"),
    ],
)
def test_what_a_strategy_without_gradients_would_ignore_is_refused(values, word):
    (problem,) = problems(optim="mezo", **values)
    assert problem.startswith(word)


def test_all_problems_are_told_at_once():
    found = problems(optim="galore", optim_args="rank=0x", clip="no", deepspeed="zero.json")
    assert [p.split(":")[0] for p in found] == ["optim", "clip", "deepspeed"]


def test_auto_clips_where_there_is_something_to_clip():
    def policy(**values):
        return LowMemArguments(output_dir="unused", **CPU, **values).clip_policy

    assert policy() == "global"
    assert policy(gradient_release=True) == "previous"
    assert policy(gradient_release=True, clip="none") == "none"
    assert policy(max_grad_norm=0.0) == policy(max_grad_norm=0.0, gradient_release=True) == "none"
    assert policy(optim="mezo") == "none"


def full(kind=LowMemArguments, **values):
    return kind(
        output_dir="unused",
        optim="galore",
        optim_args="rank=16,writer=kahan",
        gradient_release=True,
        clip="tensor",
        compile="off",
        learning_rate=3e-4,
        **CPU,
        **values,
    )


MINE = ("optim", "optim_args", "gradient_release", "clip", "compile", "learning_rate")


def mine(args):
    return {name: getattr(args, name) for name in MINE}


@pytest.mark.parametrize("kind", [LowMemArguments, LowMemSFTConfig])
def test_round_trips_keep_every_field(kind):
    args = full(kind)
    again = kind(**json.loads(args.to_json_string()))
    assert mine(again) == mine(args)
    changed = dataclasses.replace(args, learning_rate=1e-3)
    assert mine(changed) == mine(args) | {"learning_rate": 1e-3}


@pytest.mark.parametrize("kind", [LowMemArguments, LowMemSFTConfig])
def test_command_line_parser_of_transformers(kind):
    parser = transformers.HfArgumentParser(kind)
    line = "--output_dir out --optim galore --optim_args rank=8 --clip none --gradient_release --use_cpu"
    (args,) = parser.parse_args_into_dataclasses([*line.split(), "--bf16", "false"])
    assert (args.optim, args.optim_args, args.clip, args.gradient_release) == (
        "galore",
        "rank=8",
        "none",
        True,
    )
    assert "--update_proj" not in parser.format_help()
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", "out", "--clip", "some"])


def test_sft_config_checkpoints_activations_where_there_is_a_backward_pass():
    kind = {"output_dir": "unused", "bf16": False, **CPU}
    assert LowMemSFTConfig(**kind).activation_checkpointing is True
    assert LowMemSFTConfig(**kind, optim="mezo").activation_checkpointing is False
    assert LowMemSFTConfig(**kind, activation_checkpointing=False).gradient_checkpointing is False
    with pytest.raises(ConfigError, match="mezo takes no backward pass"):
        LowMemSFTConfig(**kind, optim="mezo", activation_checkpointing=True)


def test_a_pickled_config_is_found_again(tmp_path):
    import torch

    torch.save(full(LowMemSFTConfig, bf16=False), tmp_path / "args.bin")
    again = torch.load(tmp_path / "args.bin", weights_only=False)
    assert mine(again)["optim_args"] == "rank=16,writer=kahan"


def test_writer_reaches_the_strategy():
    assert build_strategy("adamw", "writer=split").writer == Halves()


def test_weights_in_float16_are_refused_before_the_scaler_does():
    model = torch.nn.Linear(2, 2).half()
    refuse_half(model, False)
    with pytest.raises(UserError, match=r"weight is trained in float16.*dtype=torch.float32"):
        refuse_half(model, True)
    refuse_half(model.requires_grad_(False), True)
