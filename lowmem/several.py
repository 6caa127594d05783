"""What does not go together where several processes do one run: every refusal once, with the remedy.

Arguments, plans and settings of a command ask for those that concern them; what only running
processes know (what accelerate made of them) is asked of the trainer, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

ALONE = (
    "fsdp: there is one process, which has nothing to shard over; start one for each card by torchrun "
    "--nproc-per-node N or accelerate launch, or leave fsdp out"
)
DEEPSPEED = "deepspeed: it flattens parameters, a strategy needs their shapes; shard with fsdp=True instead"
STAYS = "offload_state: rows that FSDP2 spreads keep their state on their card; leave it out, or add cards"
REFERRING = ("dpo", "kto")
"""Tasks that compare with the model as it was."""
_UNCUT = "adapter vectorfit: its frozen singular vectors are not sharded"
_UNSCALED = "a sharded step is not skipped where a scaled gradient overflows"


def unsharded(found: str) -> str:
    """What is said where accelerate would train copies, of what it found."""
    return (
        f"fsdp: accelerate shards between cards only, {found}; start it on cards, or leave fsdp out and "
        "train copies of the model"
    )


def flattens(version: Any) -> str:
    """What is said of another version of FSDP than the second."""
    return (
        f"version {version} (FullyShardedDataParallel) flattens parameters, and a strategy needs their "
        "shapes; take version 2"
    )


def one_device(what: str, found: int) -> str:
    """What is said of what runs on one device alone, of more that were found."""
    return (
        f"{what}: runs on one device for now, found {found}; start one process and make one GPU visible with "
        "CUDA_VISIBLE_DEVICES"
    )


def of_copies(what: str) -> str:
    """What is said of a plan whose copies would each step by themselves."""
    return f"{what}: copies of a model step on one device for now; take shard full, or one rank"


def of_settings(v: Mapping[str, Any]) -> list[str]:
    """Settings of a command that do not go with sharded weights."""
    adapts = v["lora_rank"] or v["adapter"]
    rules = [
        (v["offload_state"], STAYS),
        (
            v["quantize"] or v["weights"] or v["few_bit"],
            "fsdp: quantised weights and few_bit are for one device; leave one out",
        ),
        (
            (v["adapter"] or "").lower() == "vectorfit",
            f"{_UNCUT}; leave fsdp out, or give lora_rank",
        ),
        (
            v["task"] in REFERRING and adapts,
            f"fsdp: task {v['task']} computes its reference before the weights under adapters are sharded; "
            "train all weights, or leave fsdp out",
        ),
    ]
    return [text for broken, text in rules if broken and v["fsdp"]]


def of_arguments(args: Any, config: Mapping[str, Any]) -> list[str]:
    """Training arguments that do not go with their `fsdp`.

    Args:
        args: as they were given; config: their `fsdp_config`, without old prefixes.
    """
    on = {name for name in ("xla", "cpu_offload") if str(config.get(name, False)).lower() == "true"}
    on |= {"cpu_offload"} if "offload" in str(args.fsdp) else set()
    rules = [
        (str(config.get("version", 2)) != "2", f"fsdp_config: {flattens(config.get('version'))}"),
        ("xla" in on, "fsdp_config: xla shards by an engine of its own, not by DTensors; drop it"),
        (
            "cpu_offload" in on,
            "fsdp_config: with cpu_offload ranks would sum on the CPU, which the cards' backend cannot; "
            "drop it, states=int8 or galore hold less",
        ),
        (
            args.fp16,
            f"fp16: {_UNSCALED}; use bf16=True over float32 weights, or bfloat16 weights with bf16=False",
        ),
    ]
    return [text for broken, text in rules if broken]


def of_plan(run: Any) -> Iterator[str]:
    """What the cards of a planned run do not do."""
    cards = run.per_node or run.ranks
    rules = [
        (
            run.ranks % cards,
            f"per_node {cards}: {run.ranks} ranks do not fill machines of {cards}; make ranks a multiple",
        ),
        (
            run.weights and run.ranks > 1,
            "weights int8: they are not sharded yet (FSDP2); leave ranks or weights out",
        ),
        (run.offload_state and run.sharded, STAYS),
        (run.per_node and run.ranks == 1, "per_node: there is one rank; give ranks as well"),
        (run.shard == "none" and run.ranks == 1, "shard none: there is one rank; give ranks as well"),
        (
            run.sharded and run.quantize,
            "quantize: FSDP2 leaves 4-bit weights whole on every card; take shard none, or adapters over "
            "bfloat16 weights",
        ),
        (
            run.sharded and (run.adapter or "").lower() == "vectorfit",
            f"{_UNCUT}; take shard none, or give lora_rank",
        ),
        (
            run.sharded and run.autocast and run.autocast_dtype == "float16",
            f"autocast_dtype float16: {_UNSCALED}; use bfloat16",
        ),
    ]
    return (text for broken, text in rules if broken)
