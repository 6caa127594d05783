"""The model card of a run: what was trained on what, how, in how much memory.

    card(config, result, profile, base) -> text of README.md

Everything in it is from the run's own record; what the run does not know, such as a licence, is left
for its author. A base or data on this machine is told by its last name, not by a path.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lowmem.config import RunConfig
from lowmem.data.mix import weights
from lowmem.report.units import format_bytes

_SETTINGS = (
    *("task", "beta", "reward", "objective"),
    *("optim", "optim_args", "lr", "schedule", "warmup", "weight_decay", "batch_size", "accumulation"),
    *(
        "seq_len",
        "packing",
        "dtype",
        "lora_rank",
        "adapter",
        "adapter_args",
        "neftune",
        "quantize",
        "weights",
        "gradient_checkpointing",
    ),
    *("gradient_release", "seed"),
)


def card(
    config: RunConfig, result: Mapping[str, Any], profile: Mapping[str, Any] | None, base: str | None
) -> str:
    """Markdown for the folder of a finished run.

    Args:
        config: the run's settings.
        result: what the recipe found: loss, steps, seconds, state_bytes, data, peak_bytes, ...
        profile: predicted beside measured memory, where it was measured.
        base: Hub id of the model, or a folder.
    """
    origin = base or config.model
    name = _last(str(config.output_path))
    sections = [
        _front(config, origin),
        f"# {name}\n",
        f"{_last(origin)}, fine-tuned with lowmem: {_method(config)}, {result['steps']} steps.\n",
        _held_out(result),
        _section(
            "Data", [f"- {kind.replace('_', ' ')}: {_local(text, config)}" for kind, text in _data(result)]
        ),
        _section("Settings", _settings(config)),
        _section("Memory", _memory(result, profile)),
        _section("Use", ["```", f"lowmem chat --model {name}", "```"]),
    ]
    return "\n".join(section for section in sections if section)


def _method(config: RunConfig) -> str:
    rank = f" of rank {config.lora_rank}" if config.lora_rank else f" ({config.adapter})"
    return f"`{config.optim}`" + (f" on adapters{rank}" if config.adapts else "")


def _front(config: RunConfig, base: str) -> str:
    """The block that the Hub reads."""
    import yaml

    fields: dict[str, Any] = {"library_name": "peft" if config.adapts else "transformers"}
    if not Path(base).exists():
        fields |= {"base_model": base, "base_model_relation": "adapter" if config.adapts else "finetune"}
    named = [name for name in weights(config.data) if not Path(name).expanduser().exists()]
    if hub := [name.partition(":")[0] for name in named if "/" in name]:
        fields["datasets"] = hub
    fields |= {"pipeline_tag": "text-generation", "tags": ["lowmem", config.optim]}
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---\n"


def _section(title: str, lines: Iterable[str]) -> str:
    body = "\n".join(lines)
    return f"## {title}\n\n{body}\n" if body else ""


def _held_out(result: Mapping[str, Any]) -> str:
    before, after = (result["held_out"][when] for when in ("before", "after"))
    rows = [f"| {name} | {before.get(name, math.nan):.4f} | {value:.4f} |" for name, value in after.items()]
    return "\n".join(["| held-out | before | after |", "|---|---|---|", *rows, ""]) if rows else ""


def _data(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    return list((result.get("data") or {}).items())


def _local(text: str, config: RunConfig) -> str:
    """A summary in which data of this machine is called by its last name."""
    for place in filter(None, (*weights(config.data), config.eval_data)):
        if Path(place).expanduser().exists():
            text = text.replace(place, _last(place))
    return text


def _settings(config: RunConfig) -> list[str]:
    """The settings that decide what was learned; those that are off are left out."""
    values = [(name, getattr(config, name, None)) for name in _SETTINGS]
    rows = [f"| {name} | {value} |" for name, value in values if value not in (None, "", False, 0)]
    return ["| | |", "|---|---|", *rows, "", "All of them are in `config.yaml`."]


def _memory(result: Mapping[str, Any], profile: Mapping[str, Any] | None) -> list[str]:
    """Planned beside measured."""
    measured, planned = ((profile or {}).get(side) or {} for side in ("measured", "predicted"))
    rows = [("optimizer state", planned.get("state_bytes"), result.get("state_bytes"))]
    if measured:
        peaks = [side.get("peak", {}).get("allocated") for side in (planned, measured)]
        rows.append(("peak of tensors in a step", *peaks))
    rows.append(("peak of the process", None, result.get("peak_bytes")))
    lines = [f"| {what} | {format_bytes(plan)} | {format_bytes(seen)} |" for what, plan, seen in rows if seen]
    return ["| | planned | measured |", "|---|---|---|", *lines] if lines else []


def _last(place: str) -> str:
    """The name of a Hub id as it is, of a path its last part."""
    return Path(place).resolve().name if Path(place).expanduser().exists() else place
