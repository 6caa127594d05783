"""A run as one document: what came out, its losses, an example, its memory, its settings, its command."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

from lowmem.config import RunConfig
from lowmem.report.document import plain


def document(
    config: RunConfig, trainer: Any, result: Mapping[str, Any], profile: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What `memory_report.json` holds, and `lowmem.report` draws.

    Args:
        config: the run; trainer: after it; result: what the recipe returns.
        profile: the document of its memory, where it was measured.
    """
    found: dict[str, Any] = plain(
        {
            **(profile or {}),
            "result": result,
            "log": trainer.state.log_history,
            "example": getattr(trainer, "example", None),
            "settings": dataclasses.asdict(config),
            "command": command(config),
        }
    )
    return found


def history(result: Mapping[str, Any], log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The Trainer's log with the evaluations before and after; without those that have no loss (grpo)."""
    first, last = ({"eval_loss": result["loss"][when]} for when in ("before", "after"))
    found = [{"step": 0, **first}, *log, {"step": result["steps"], **last}]
    return [entry for entry in found if entry.get("eval_loss", 0.0) is not None]


def command(config: RunConfig) -> str:
    """The command that does a run again, with every setting that is not a default.

    >>> command(RunConfig(model="gpt2", optim="adamw", lr=3e-5, packing=False))
    'lowmem finetune --model gpt2 --optim adamw --lr 3e-05 --no-packing'
    """
    words = ["lowmem", "finetune"]
    for f in dataclasses.fields(config):
        value, flag = getattr(config, f.name), f.name.replace("_", "-")
        if value == f.default or f.name in ("resume", "overwrite"):
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif f.name == "prompt":
            words += [word for prompt in value for word in ("--prompt", prompt)]
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join(words)
