"""Settings of a run that exclude each other, each with the remedy; `config` asks for all of them at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from lowmem import several

FEW_BIT = (
    "few_bit: with gradient_checkpointing activations are computed anew, not kept; leave one of them out"
)
OFFLOADING = ("sft", "classify", "dpo", "kto", "reward")
"""Tasks whose trainers of TRL can offload activations."""


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
    rules += [
        (v["few_bit"] and v["gradient_checkpointing"], FEW_BIT),
        (
            v["activation_offload"] and v["task"] not in OFFLOADING,
            f"activation_offload: not for task {v['task']}; leave it out, or set gradient_checkpointing",
        ),
    ]
    found = [text for broken, text in rules if broken]
    return (
        found
        + several.of_settings(v)
        + _of_autocast(v)
        + _of_task(v)
        + of_adapters(v)
        + of_weights(v)
        + _of_evaluation(v)
    )


def of_weights(v: Mapping[str, Any]) -> list[str]:
    """Settings that weights of one byte do not go with."""
    beside = [name for name in ("int8_embeddings", "keep_int8") if v.get(name)]
    if not v["weights"]:
        return [f"{', '.join(beside)}: of int8 weights; give weights: int8 as well"] if beside else []
    rules = [
        (
            v["lora_rank"] or v["adapter"],
            "weights: int8 is for weights that train, those under adapters are frozen; take quantize: nf4",
        ),
        (
            v["quantize"],
            f"weights, quantize: weights are int8 codes or {v['quantize']} ones; give one of them",
        ),
        (
            v["activation_offload"],
            "weights: activation_offload does not tell int8 codes from activations yet; take "
            "gradient_checkpointing",
        ),
        (
            v["dtype"] == "float16",
            "dtype: int8 weights compute in bfloat16 or float32; in float16 their gradients would vanish",
        ),
    ]
    return [text for broken, text in rules if broken]


def of_weights_and_method(v: Mapping[str, Any], *, differentiates: bool, writer: str) -> list[str]:
    """What a method does not go with.

    Args:
        v: settings of a run.
        differentiates: whether it takes backward passes; writer: its option of that name.
    """
    if v["weights"] and not differentiates:
        return [
            f"weights: {v['optim']} displaces weights and takes no backward pass, which codes cannot follow; "
            "take qzo, which trains the scales of 4-bit weights"
        ]
    if writer == "eco" and not v["weights"]:
        return ["optim: writer=eco is for int8 weights; give weights: int8, or take writer=kahan"]
    if v["weights"] and writer in ("kahan", "split"):
        return [
            f"optim: writer={writer} is for weights of 16 bits; take stochastic or eco, or leave weights out"
        ]
    return []


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


def no_gradient(optim: str) -> str:
    """What is said to a strategy that would differentiate a score."""
    return f"objective: no gradient goes through a score of answers, {optim} needs one; use mezo, fzoo or qzo"


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
    generates = v["objective"] and task == "sft"
    own = ("reward", "num_generations", *(() if generates else ("max_completion",)))
    of_grpo = [name for name in own if v[name] is not None]
    pairs = [pair.partition("=") for pair in v["columns"].split(",") if pair]
    rules = [
        (task != "grpo" and of_grpo, f"{', '.join(of_grpo)}: for task grpo; leave it out, or set task: grpo"),
        (task == "grpo" and not v["reward"], "reward: task grpo needs one, as in reward: my_rewards:exact"),
        (
            task == "grpo" and rows % count,
            f"num_generations: {count} answers per prompt do not divide batch_size x accumulation = {rows}; "
            f"make that a multiple of {count}",
        ),
        (
            v["objective"] and task not in ("sft", "classify"),
            f"objective: task {task} has its own; leave it out, or use task sft or classify",
        ),
        (
            v["beta"] is not None and task in ("sft", "classify", "reward"),
            f"beta: task {task} has none; leave it out",
        ),
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


def of_activations(v: Mapping[str, Any], *, differentiates: bool) -> list[str]:
    """Settings of activations that a run does not keep.

    Args:
        v: settings of a run; differentiates: whether its strategy takes backward passes.
    """
    given = [name for name in ("activation_offload", "few_bit") if v[name]]
    if differentiates or not given:
        return []
    return [f"{', '.join(given)}: {v['optim']} keeps no activations for a backward pass; leave it out"]


def of_noise(v: Mapping[str, Any], *, differentiates: bool) -> list[str]:
    """Settings of noise that a run does not make.

    Args:
        v: settings of a run; differentiates: whether its strategy takes backward passes.
    """
    pairs = [pair.partition("=") for pair in v["adapter_args"].split(",")]
    given = [name for name in ("neftune", "lora_dropout") if v[name]]
    given += [f"adapter_args {name}" for name, _, value in pairs if "dropout" in name and value.strip("0.")]
    if differentiates or not given:
        return []
    return [f"{', '.join(given)}: {v['optim']} evaluates the loss without noise and dropout; leave it out"]


def of_adapters(v: Mapping[str, Any]) -> list[str]:
    """Settings of adapters that are not trained."""
    lora = [
        name
        for name, off in (("lora_alpha", None), ("lora_dropout", 0.0), ("lora_targets", "all-linear"))
        if v[name] != off
    ]
    name = (v["adapter"] or "lora").lower()
    other, ours = name != "lora", name == "vectorfit"
    rules = [
        (
            ours and v["quantize"],
            f"adapter vectorfit: {v['quantize']} weights are codes, and singular vectors would take several "
            "times their memory; leave quantize out, or give lora_rank",
        ),
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
