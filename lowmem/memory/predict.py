"""What the plan says of a run that is being measured, so that the two stand side by side.

The tracked step saw one batch, and packing makes batches of uneven length: the plan is made for that batch,
and the note says so. What the configuration alone promises, full rows, is what `lowmem plan` shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lowmem.config import RunConfig
from lowmem.errors import UserError
from lowmem.memory.trace.tasks.kinds import PLANNED

ADAPTERS = ("lora_alpha", "lora_dropout", "lora_targets", "adapter", "adapter_args")
Prediction = tuple[dict[str, Any] | None, list[str]]


def of_run(config: RunConfig) -> Callable[[Mapping[str, Any], Any], Prediction]:
    """A predictor for the profiler.

    Args:
        config: the run's settings.

    Returns:
        (measured entry, strategy) -> (the plan's entry or None, notes); it costs a trace without weights.
    """

    def predict(measured: Mapping[str, Any], strategy: Any) -> Prediction:
        try:
            options = run_options(config, measured)
            advise = bool(measured.get("out_of_memory"))  # a run that fitted needs no levers
            return _entry(config.model, strategy, {**options, "advise": advise}), [_note(options)]
        except UserError as error:
            return None, [f"Nothing was predicted: {error}"]

    return predict


def run_options(config: RunConfig, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `plan` for a run, with the shape of the batch that was measured.

    Args:
        config: the run's settings.
        measured: an entry of the profiler; "batch" and "device" are read where they are there.
    """
    batch = measured.get("batch") or {}
    rows, length = batch.get("rows", config.batch_size), batch.get("tokens", config.seq_len)
    kind = batch.get("kind", "packed" if config.packing else "padded")
    return {
        "seq_len": max(batch.get("prompt_tokens", length), 2),
        "rows": kind,
        "longest": batch.get("longest") if kind == "packed" else None,
        **_loss(config, rows, length, batch.get("label_tokens"), length - batch.get("prompt_tokens", 0)),
        "dtype": config.dtype,
        **_autocast(config),
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_release": config.gradient_release,
        "activation_offload": config.activation_offload,
        "offload_state": config.offload_state,
        "few_bit": config.few_bit,
        "eval_batch_size": 0,  # what is measured is one step
        "accumulation": config.accumulation,
        "lora_rank": config.lora_rank or 0,
        **{name: getattr(config, name) for name in ADAPTERS},
        "quantize": config.quantize,
        "weights": config.weights,
        "int8_embeddings": config.int8_embeddings,
        "task": _planned(config),
        "max_grad_norm": config.max_grad_norm if _clips_together(config) else 0.0,
        "device": measured.get("device", "cpu"),
        "compute_capability": _capability(measured.get("device", "cpu")),
        "compile": config.compile,
        "steps": config.steps,
    }


def _clips_together(config: RunConfig) -> bool:
    return config.clip in ("auto", "global") and not config.gradient_release


def _autocast(config: RunConfig) -> dict[str, Any]:
    return {} if config.autocast == "none" else {"autocast": True, "autocast_dtype": config.autocast}


def _loss(config: RunConfig, rows: int, length: int, labels: int | None, answer: int) -> dict[str, Any]:
    """Rows of the data, and where their logits are made; a task has a loss of its own."""
    if (task := PLANNED.get(_planned(config))) is not None:
        if config.task == "grpo":
            return _grown(config, rows, answer)
        return {"batch_size": max(1, rows // task.rows)}
    loss = "chunked" if labels is None else "labels" if labels < rows * length else "plain"
    return {"batch_size": rows, "loss": loss, "label_tokens": labels if loss == "labels" else None}


def _grown(config: RunConfig, rows: int, answer: int) -> dict[str, Any]:
    if config.beta:
        raise UserError("task grpo with beta: the reference that it is pulled towards is not planned")
    return {
        "batch_size": rows, "num_generations": config.num_generations, "max_completion": max(2, answer)
    }  # fmt: skip


def _planned(config: RunConfig) -> str:
    """The task as `plan` calls it: candidates are rows whose labels are few."""
    if config.task == "classify":
        return "sft"
    return "answer" if config.objective else config.task


def _capability(device: str) -> float | None:
    """Compute capability of the card of this process."""
    import torch

    if device != "cuda" or not torch.cuda.is_available():
        return None
    return float("{}.{}".format(*torch.cuda.get_device_capability()))


def _entry(model: str, strategy: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    from lowmem.memory import pictures
    from lowmem.memory.plan import plan

    planned = plan(model, strategy, **options)
    row = planned.plans[0]
    return {**row.to_dict(), **pictures.extras(planned, row, planned.made[0])}


def _note(options: Mapping[str, Any]) -> str:
    what = f"{options['batch_size']} x {options['seq_len']} tokens ({options['rows']} rows)"
    if (task := PLANNED.get(options["task"])) is not None:
        return f"Predicted for the batch of the tracked step: {what}; {task.words}."
    losses = {
        "chunked": "chunked loss",
        "labels": f"logits at {options.get('label_tokens')} positions",
        "plain": "logits at all positions",
    }
    return f"Predicted for the batch of the tracked step: {what}, {losses[options['loss']]}."
