"""Settings of a run that exclude each other, each with the remedy; `config` asks for all of them at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any


def problems(v: Mapping[str, Any]) -> list[str]:
    """Settings that exclude each other."""
    rules = [
        (v["data"] == "", "data: none is named; give --data FILE, FOLDER or NAME"),
        (v["steps"] and v["epochs"], "steps and epochs: both given; give one of them"),
        (v["resume"] and v["overwrite"], "resume and overwrite: one keeps the earlier run, one replaces it"),
        (
            v["steps"] and v["warmup"] > v["steps"],
            f"warmup: {v['warmup']} steps of warm-up in a run of {v['steps']}; make it {v['steps']} or less",
        ),
        (
            v["gradient_release"] and v["clip"] == "global",
            "clip: with gradient_release the norm of all gradients is not known when the first tensor steps; "
            "use clip: previous, tensor or none",
        ),
        (
            not v["gradient_release"] and v["clip"] in ("tensor", "previous"),
            f"clip: {v['clip']} is for gradient_release; use clip: global, or set gradient_release",
        ),
    ]
    found = [text for broken, text in rules if broken]
    return found + _of_autocast(v) + _of_task(v) + of_adapters(v) + _of_evaluation(v)


def of_precision(v: Mapping[str, Any], *, differentiates: bool) -> list[str]:
    """Numbers of 16 bits that a run would lose; see `lowmem.optim.writers` for what keeps bf16 weights whole.

    Args:
        v: settings of a run.
        differentiates: whether its strategy takes backward passes.
    """
    half, scaled, adapts = v["dtype"] == "float16", v["autocast"] == "float16", v["lora_rank"] or v["adapter"]
    rules = [
        (
            half and differentiates and not adapts,
            "dtype: gradients in float16 vanish below 6e-8, and no loss scaler takes them; "
            "use dtype: float32 with autocast: float16 (needs a GPU), or dtype: bfloat16",
        ),
        (
            half and differentiates and adapts and not scaled,
            "dtype: gradients that pass float16 layers vanish unless the loss is scaled; "
            "set autocast: float16 as well (needs a GPU), or dtype: bfloat16",
        ),
        (
            scaled and not differentiates,
            f"autocast: {v['optim']} takes no backward pass to scale the loss for; use dtype: float16",
        ),
    ]
    return [text for broken, text in rules if broken]


def _of_autocast(v: Mapping[str, Any]) -> list[str]:
    """What autocast does not go with."""
    kind, adapts = v["autocast"], v["lora_rank"] or v["adapter"]
    rules = [
        (
            kind != "none" and v["dtype"] != "float32" and not adapts,
            f"autocast: over weights of {v['dtype']} it would only cost time; use dtype: float32, or none",
        ),
        (
            kind == "float16" and v["gradient_release"],
            "gradient_release: with autocast: float16 a step is skipped where any gradient overflows, which "
            "is not known when the first tensor steps; leave it out, or use autocast: bfloat16",
        ),
    ]
    return [text for broken, text in rules if broken]


def _of_task(v: Mapping[str, Any]) -> list[str]:
    """Settings that do not go with the task."""
    task, rows = v["task"], v["batch_size"] * v["accumulation"]
    count = v["num_generations"] or 8
    of_grpo = [name for name in ("reward", "num_generations", "max_completion") if v[name] is not None]
    pairs = [pair.partition("=") for pair in v["columns"].split(",") if pair]
    rules = [
        (task != "grpo" and of_grpo, f"{', '.join(of_grpo)}: for task grpo; leave it out, or set task: grpo"),
        (task == "grpo" and not v["reward"], "reward: task grpo needs one, as in reward: my_rewards:exact"),
        (
            task == "grpo" and rows % count,
            f"num_generations: {count} answers per prompt do not divide batch_size x accumulation = {rows}; "
            f"make that a multiple of {count}",
        ),
        (v["beta"] is not None and task in ("sft", "reward"), f"beta: task {task} has none; leave it out"),
        (
            task == "kto" and v["batch_size"] < 2,
            "batch_size: kto compares the rows of a batch with each other; make it 2 or more",
        ),
        (task == "reward" and v["prompt"], "prompt: a reward model gives no answers; leave it out"),
        (
            task == "reward" and (v["forgetting"] or v["eval"]),
            "forgetting, eval: a reward model predicts no text; leave them out",
        ),
        (
            any(not (new and old) for new, _, old in pairs),
            f"columns: {v['columns']!r} is not of the form field=column,field=column",
        ),
    ]
    return [text for broken, text in rules if broken]


def of_adapters(v: Mapping[str, Any]) -> list[str]:
    """Settings of adapters that are not trained."""
    lora = [
        name
        for name, off in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", "all-linear"))
        if v[name] != off
    ]
    other = v["adapter"] is not None and v["adapter"].lower() != "lora"
    rules = [
        (lora and not v["lora_rank"], f"{', '.join(lora)}: of LoRA; give lora_rank as well"),
        (other and v["lora_rank"], f"lora_rank: of LoRA, adapter is {v['adapter']}; give one of them"),
        (
            v["adapter_args"] and not (v["lora_rank"] or v["adapter"]),
            "adapter_args: no adapter is trained; give lora_rank or adapter as well",
        ),
    ]
    return [text for broken, text in rules if broken]


def _of_evaluation(v: Mapping[str, Any]) -> list[str]:
    """Settings that need evaluations or a schedule."""
    need = [name for name in ("keep_best", "early_stopping") if v[name]]
    kind, _, tasks = v["eval"].partition(":")
    rules = [
        (
            v["eval"] and (kind != "lm_eval" or not tasks.strip(" ,")),
            f"eval: {v['eval']!r} is not of the form lm_eval:TASK,TASK, as in lm_eval:arc_easy",
        ),
        (need and not v["eval_steps"], f"{', '.join(need)}: give eval_steps, the steps between evaluations"),
        (v["decay"] and v["schedule"] != "wsd", "decay: of schedule wsd; leave it out, or set schedule: wsd"),
        (
            v["decay"] and v["steps"] and v["decay"] + v["warmup"] > v["steps"],
            f"decay: {v['decay']} steps and warmup {v['warmup']} in a run of {v['steps']}; make them fewer",
        ),
    ]
    return [text for broken, text in rules if broken]


def missing_tracker(report_to: str) -> str | None:
    """What to do where the package that losses are logged to is not installed."""
    if report_to == "none" or importlib.util.find_spec(report_to) is not None:
        return None
    return f"report_to: {report_to} is not installed; pip install {report_to}"


def missing_harness(asked: str) -> str | None:
    """What to do where the package that benchmarks are asked of is not installed."""
    if asked and importlib.util.find_spec("lm_eval") is None:
        return "eval: lm-evaluation-harness is not installed; pip install 'lm_eval[hf]'"
    return None
