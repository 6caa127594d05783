"""What each task does with a batch, as `lowmem finetune` runs it.

A reference model is held by none: dpo and kto compute its log-probabilities once, before the first step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.errors import UserError, nearest


@dataclass(frozen=True)
class Task:
    """A task whose step is planned.

    Args:
        trainer: module and stem of TRL's classes, as in ("trl", "DPO") for DPOTrainer and DPOConfig.
        rows: that go through the model for each row of the batch.
        loss: as `Run.loss` calls what it does with logits.
        words: what a step computes, for the assumptions.
        outputs: of TRL's chunked loss, for each token.
        stilled: dropout is taken out of the model and its adapters.
        four_bit: a step of adapters over 4-bit weights is planned; TRL and peft convert them otherwise.
        renamed: attributes of the trainer that are not fields of its configuration.
    """

    trainer: tuple[str, str]
    rows: int
    loss: str
    words: str
    outputs: tuple[str, ...] = ()
    renamed: Mapping[str, Any] | None = None
    stilled: bool = True
    four_bit: bool = True


PLANNED: dict[str, Task] = {
    "dpo": Task(
        ("trl", "DPO"), 2, "chunked",
        "dpo: both answers of a row in one pass, TRL's chunked loss as if every token belonged to an answer; "
        "no reference model is held, its log-probabilities are computed before the first step",
        ("log_probs", "entropy", "mean_logits", "is_top1"),
        {"precompute_ref_logps": True, "loss_types": ["sigmoid"], "loss_weights": [1.0]},
    ),
    "orpo": Task(
        ("trl.experimental.orpo", "ORPO"), 2, "plain",
        "orpo: both answers of a row in one pass, logits for every token of them; there is no reference",
        renamed={
            "is_encoder_decoder": False, "padding_value": 0, "_peft_has_been_casted_to_bf16": False,
            "store_metrics": lambda *args, **kwargs: None,
        },
        four_bit=False,
    ),
    "reward": Task(
        ("trl", "Reward"), 2, "plain",
        "reward: both answers of a row in one pass; the head is a score of one number, there are no logits",
        four_bit=False,
    ),
    "kto": Task(
        ("trl", "KTO"), 1, "chunked",
        "kto: each row twice, as it is and, without gradients, with another row's answer; TRL's chunked loss "
        "as if every token belonged to an answer; no reference model is held, its log-probabilities are "
        "computed before the first step",
        ("log_probs", "entropy", "mean_logits"),
        {"precompute_ref_logps": True, "calculate_KL": True},
    ),
    "grpo": Task(
        ("trl", "GRPO"), 1, "chunked",
        "grpo: batch_size x accumulation answers grow side by side to their full length, with a cache of "
        "keys and values; then a step on prompts of seq_len tokens and their answers, TRL's chunked loss as "
        "if every token belonged to an answer; no pull towards a reference (beta 0)",
        ("log_probs", "entropy"),
        {
            "epsilon_low": 0.2, "epsilon_high": 0.2, "beta": 0.0, "_entropy_bonus_enabled": False,
            "current_gradient_accumulation_steps": 1,
        },
        stilled=False,
    ),
}  # fmt: skip
NOT_PLANNED = {
    "answer": "it generates answers, with a cache that grows; measure a few steps instead, with "
    "`lowmem finetune --objective accuracy --steps 3`",
    "classify": "how many candidates a row has is for the data to say; plan it as sft, each candidate being "
    "a row: --rows padded --loss labels --batch-size CANDIDATES --label-tokens TOKENS",
}
"""Tasks of `lowmem finetune` that are not planned: why, and what to do instead."""


def completed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run with those that follow from its task.

    Raises:
        UserError: a loss, which these tasks have themselves.
    """
    task = PLANNED.get(str(options.get("task")))
    if task is None:
        return dict(options)
    if options.get("loss", task.loss) != task.loss or options.get("label_tokens") is not None:
        raise UserError(f"task {options['task']} has a loss of its own: leave out loss and label_tokens")
    return {**options, "loss": task.loss}


def problems(run: Any) -> list[str]:
    """What of a run's task is not planned, as sentences.

    Args:
        run: a `Run`.
    """
    of_grpo = [name for name in ("num_generations", "max_completion") if getattr(run, name) is not None]
    if of_grpo and run.task != "grpo":
        return [f"{', '.join(of_grpo)}: for task grpo; leave it out, or give task grpo"]
    if run.task == "sft":
        return []
    if (why := NOT_PLANNED.get(run.task)) is not None:
        return [f"task {run.task} is not planned: {why}"]
    if run.task not in PLANNED:
        known = ["sft", *PLANNED, *NOT_PLANNED]
        return [f"task {run.task!r} is not allowed; {nearest(run.task, known)}"]
    rules = [
        (
            run.quantize is not None and not PLANNED[run.task].four_bit,
            f"quantize: task {run.task} over 4-bit weights is not planned, it computes more of them in fp32; "
            "leave quantize out",
        ),
        (
            run.task == "grpo" and run.batch_size * run.accumulation % (run.num_generations or 8),
            f"num_generations: {run.num_generations or 8} answers per prompt do not divide batch_size x "
            f"accumulation = {run.batch_size * run.accumulation}; make that a multiple",
        ),
        (
            run.task == "kto" and run.batch_size < 2,
            "batch_size: kto compares the rows of a batch with each other; make it 2 or more",
        ),
        (run.rows == "packed", f"rows packed: task {run.task} pads its rows; use full or padded"),
        (run.ranks > 1, f"ranks: task {run.task} is planned on one card; leave ranks out"),
        (run.keep_output, f"keep_output: the trainer of task {run.task} keeps no logits; leave it out"),
    ]
    return [text for broken, text in rules if broken]
