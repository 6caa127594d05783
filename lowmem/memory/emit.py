"""From a plan to the run: the configuration that `lowmem finetune --config FILE` takes as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.config import RunConfig, build, dump
from lowmem.errors import UserError
from lowmem.memory.run import Run


def run_config(model: str, run: Run, strategy: str, options: Mapping[str, Any]) -> RunConfig:
    """The fine-tuning run that was planned; data and steps are finetune's defaults.

    Raises:
        UserError: the plan has something that `lowmem finetune` does not do.
    """
    problems = {
        "attention": (run.attention == "eager", "the model's own choice of attention is used"),
        "strategy": (strategy == "custom", "a strategy composed in Python has no name"),
    }
    for name, (given, why) in problems.items():
        if given:
            raise UserError(f"cannot emit a run with {name}: {why}; plan without it")
    values: dict[str, Any] = {
        "model": model,
        "dtype": run.dtype,
        "autocast": run.autocast_dtype if run.autocast else "none",
        "optim": strategy,
        "optim_args": ",".join(f"{k}={_word(v)}" for k, v in options.items()),
        "seq_len": run.seq_len,
        "batch_size": run.batch_size,
        "accumulation": run.accumulation,
        "packing": run.rows == "packed",
        "gradient_checkpointing": run.gradient_checkpointing,
        "gradient_release": run.gradient_release,
        "lora_rank": run.lora_rank or None,
        "quantize": run.quantize,
    }
    return build({k: v for k, v in values.items() if v is not None})


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def text(model: str, run: Run, strategy: str, options: Mapping[str, Any]) -> str:
    """The YAML of `run_config`."""
    return dump(run_config(model, run, strategy, options))
