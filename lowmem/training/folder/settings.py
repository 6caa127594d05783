"""What a resumed run may change.

A checkpoint holds the settings it was trained with. Where those of the present run differ, numbers of
the optimizer and its schedule are taken over: from the next step on, at the place that the schedule has
reached. The rest decides which rows come next, or the bits of a step, so that a run that changed it
would be another run: it is refused. Nothing that differs is passed over, and nothing is announced
that will not be used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

from lowmem.config import RunConfig
from lowmem.errors import CheckpointError

HYPER = ("betas", "eps", "weight_decay")
SCHEDULED = ("lr", "schedule", "warmup", "steps", "epochs")
TUNED = (*HYPER, *SCHEDULED, "max_grad_norm", "clip", "gradient_release", "gradient_checkpointing")
LENGTH = ("steps", "epochs")
CONTENT = {"train_content": "the rows to train on", "eval_content": "the held-out rows"}
"""Digests of what the data said; a checkpoint from before they were kept has none, and goes on."""


def checkpointing() -> str:
    """The name that arguments have for activation checkpointing: another one before transformers 5.23."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if new in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def checkpoints(args: Any) -> bool:
    """Whether activations are made again in the backward pass, by either name."""
    return bool(getattr(args, "activation_checkpointing", None) or args.gradient_checkpointing)


def of_arguments(args: Any) -> dict[str, Any]:
    """Settings of a run that a checkpoint keeps, as plain values.

    Args:
        args: training arguments with the fields of `LowMemFields`.
    """
    limited = args.max_steps > 0
    more = f" {args.lr_scheduler_kwargs}" if args.lr_scheduler_kwargs else ""
    found = {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "weight_decay": args.weight_decay,
        "schedule": f"{getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)}{more}",
        "warmup": args.warmup_steps,
        "steps": args.max_steps if limited else None,
        "epochs": None if limited else args.num_train_epochs,
        "max_grad_norm": args.max_grad_norm,
        "clip": args.clip,
        "gradient_release": args.gradient_release,
        "gradient_checkpointing": checkpoints(args),
        "seed": args.seed,
        "data_seed": args.data_seed,
        "compile": args.compile,
        "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "seq_len": getattr(args, "max_length", None),
        "packing": getattr(args, "packing", None),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def place(name: str | None) -> str | None:
    """A model or data set as a checkpoint names it: where it lies, for what lies on this machine."""
    return str(Path(name).resolve()) if name and Path(name).exists() else name


def changes(
    saved: Mapping[str, Any], now: Mapping[str, Any], name: str, done: int, planned: int
) -> dict[str, str]:
    """Settings that a resumed run takes over, each with a sentence that says so.

    Args:
        saved: those of the checkpoint; now: those of the present run.
        name: of the checkpoint.
        done: steps that the checkpoint has taken; planned: of the present run.

    Raises:
        CheckpointError: naming every setting that cannot be changed, or has no step left to act on.
    """
    differ = {key for key in {*saved, *now} - set(CONTENT) if saved.get(key) != now.get(key)}
    moved = {key for key in differ - set(TUNED) if _gone(saved.get(key))}
    pairs = {key: f"{saved.get(key)!r} -> {now.get(key)!r}" for key in sorted(differ)}
    problems = [f"{key}: {pairs[key]}" for key in pairs if key not in TUNED and key not in moved]
    if problems:
        raise CheckpointError(
            f"cannot resume from {name} with other settings: {'; '.join(problems)}; the rows or the bits of "
            "each step depend on them: leave them as they were, or start afresh in another folder"
        )
    other = [what for key, what in CONTENT.items() if saved.get(key) not in (None, now.get(key))]
    if other:
        raise CheckpointError(
            f"cannot resume from {name}: {' and '.join(other)} say something else than when it was written "
            f"(data: {now.get('data')}); put them back as they were, or start afresh in another folder"
        )
    if planned < done:
        raise CheckpointError(f"steps: {name} has taken {done} already, this run has {planned}; give more")
    idle = [f"{key}: {pairs[key]}" for key in pairs if key not in LENGTH and key not in moved]
    if idle and planned == done:
        raise CheckpointError(
            f"{'; '.join(idle)}: {name} is the last of {planned} steps, none is left to train with it; "
            "give more steps, or leave it out"
        )
    said = {key: f"resuming with another {key}: {pairs[key]}" for key in pairs}
    return said | {key: f"{key}: {saved[key]} is gone, {now.get(key)} takes its place" for key in moved}


def _gone(saved: Any) -> bool:
    """Whether a setting names a place on this machine at which nothing lies any more."""
    return isinstance(saved, str) and Path(saved).is_absolute() and not Path(saved).exists()


@dataclass(frozen=True)
class Own:
    """The numbers that a run's optimizer and schedule were made with, before a checkpoint is loaded.

    Args:
        hyper: betas, eps and weight decay of each parameter group.
        lrs: learning rate of each, before the schedule.
    """

    hyper: Sequence[Mapping[str, Any]]
    lrs: Sequence[float]

    @classmethod
    def of(cls, optimizer: Any, scheduler: Any) -> Own:
        """Read them."""
        hyper = [{key: group[key] for key in HYPER} for group in optimizer.param_groups]
        return cls(hyper, list(getattr(scheduler, "base_lrs", ())))

    def restore_(self, optimizer: Any, scheduler: Any, changed: Mapping[str, str]) -> None:
        """Put those that are to change into the loaded optimizer and schedule; the others stay as loaded.

        Raises:
            CheckpointError: the schedule is none whose learning rate follows from the step alone.
        """
        for group, values in zip(optimizer.param_groups, self.hyper, strict=True):
            group.update({key: values[key] for key in HYPER if key in changed})
        moved = [key for key in SCHEDULED if key in changed]
        if not moved:
            return
        if not isinstance(scheduler, LambdaLR):
            raise CheckpointError(
                f"{', '.join(moved)}: {type(scheduler).__name__} goes by its own past, it cannot be changed "
                "on the way; leave it as it was, or start afresh"
            )
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler.base_lrs = list(self.lrs)
        scheduler._last_lr = [lr * factor for lr, factor in zip(self.lrs, factors, strict=True)]
        for group, first, lr in zip(optimizer.param_groups, self.lrs, scheduler._last_lr, strict=True):
            group.update(initial_lr=first, lr=lr)


def digest(rows: Iterable[Any]) -> str:
    """One word for what rows say, and for their order.

    Of their text, not of its tokens: a chat template may write the present day into each of them, and a
    run that goes on tomorrow would be another one.

    >>> digest([{"text": "a"}]) == digest([{"text": "a"}]) != digest([{"text": "b"}])
    True
    """
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()[:32]


def content(train: Iterable[Any], held_out: Iterable[Any]) -> dict[str, str]:
    """What the rows of a run say, as a checkpoint keeps it."""
    return dict(zip(CONTENT, (digest(train), digest(held_out)), strict=True))


def origin(config: RunConfig) -> dict[str, Any]:
    """What decides which rows a checkpoint has seen, and over which frozen weights."""
    places = {name: place(getattr(config, name)) for name in ("model", "data", "eval_data")}
    rows = ("task", "beta", "objective", "max_completion", "columns", "data_format", "eval_rows")
    weights = ("quantize", "few_bit", "lora_alpha", "lora_dropout", "adapter", "adapter_args", "neftune")
    coded = {"weights": config.weights, "int8_embeddings": config.int8_embeddings} if config.weights else {}
    return places | {name: getattr(config, name) for name in (*rows, *weights)} | coded
