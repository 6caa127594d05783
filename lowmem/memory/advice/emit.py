"""From a plan to the run: the configuration that `lowmem finetune --config FILE` takes as it is.

For several cards there is a second file, by which `accelerate launch` starts them. Every option of a plan is
carried over, or describes the card or the data and not the run, or is one that finetune does not do, and
then refused by name: none is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem import several
from lowmem.config import RunConfig, build, dump
from lowmem.errors import UserError
from lowmem.memory.run import Run

SAME = (
    "task", "dtype", "seq_len", "batch_size", "accumulation", "gradient_checkpointing", "gradient_release",
    "activation_offload", "offload_state", "few_bit", "lora_rank", "lora_alpha", "lora_dropout",
    "lora_targets", "adapter", "adapter_args", "quantize", "weights", "int8_embeddings", "compile", "steps",
)  # fmt: skip
"""Options with the same name and meaning on both sides."""
LAUNCHED = ("ranks", "shard", "per_node")
"""Options that the second file carries."""
TRANSLATED = ("rows", "max_grad_norm", "autocast", "autocast_dtype")
REWARDED = ("num_generations", "max_completion")
"""Options of task grpo, whose run needs a reward that no plan knows."""
BESIDE = (
    "longest", "typical", "loss", "label_tokens", "device", "compute_capability", "workspace",
)  # fmt: skip
"""What a plan knows of data and card; finetune takes the cheaper loss of each batch by itself."""
NOT_DONE = {
    "attention": "the model's own choice of attention is used",
    "keep_output": "the logits are not kept",
    "eval_batch_size": "evaluations have the training's batch_size",
    "adapter_dtype": "adapters have the dtype that TRL gives them",
    "double_quant": "the scales of 4-bit weights are quantized",
    "kbit_prepare": "what is not packed stays in its dtype",
}
"""Options that finetune has no like of, and what it does instead."""
DATA = "data: ''"


def run_config(
    model: str,
    run: Run,
    strategy: str,
    options: Mapping[str, Any],
    data: str | None = None,
    plugin: str = "",
) -> RunConfig:
    """The fine-tuning run that was planned.

    Args:
        model, run, strategy, options: of the plan; data: as `lowmem finetune --data` takes it.
        plugin: modules that bring the strategy.

    Raises:
        UserError: the plan has something that `lowmem finetune` does not do.
    """
    default = Run()
    asked = [name for name in NOT_DONE if getattr(run, name) != getattr(default, name)]
    if strategy == "custom":
        raise UserError(
            "cannot emit a run of a strategy composed in Python: it has no name; plan one that has"
        )
    if run.task == "grpo":
        raise UserError(
            "cannot emit a run of task grpo: its reward is a function of yours; write a file with task: grpo "
            "and reward: MODULE:FUNCTION, or give both to `lowmem finetune`"
        )
    if asked:
        raise UserError(f"cannot emit a run with {asked[0]}: {NOT_DONE[asked[0]]}; plan without it")
    values: dict[str, Any] = {name: getattr(run, name) for name in SAME}
    values |= {"model": model, "optim": strategy, "packing": run.rows != "padded", "data": data}
    values["plugin"] = plugin
    values["optim_args"] = ",".join(f"{k}={_word(v)}" for k, v in options.items())
    values["lora_rank"] = run.lora_rank or None
    values["autocast"] = run.autocast_dtype if run.autocast else "none"
    if run.max_grad_norm > 0:
        values["max_grad_norm"] = run.max_grad_norm
    elif not run.gradient_release:  # under release it is 0 because nothing is clipped together
        values["clip"] = "none"
    return build({k: v for k, v in values.items() if v is not None})


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def text(
    model: str,
    run: Run,
    strategy: str,
    options: Mapping[str, Any],
    data: str | None = None,
    plugin: str = "",
) -> str:
    """The YAML of `run_config`; without data its line is left empty, and finetune asks for it."""
    written = dump(run_config(model, run, strategy, options, data, plugin))
    if data is not None:
        return written
    lines = [
        DATA + line[line.index("  #") :] if line.startswith("data:") else line
        for line in written.splitlines()
    ]
    return "\n".join(lines) + "\n"


def known() -> set[str]:
    """Every option that is carried, translated, beside the run or refused.

    >>> known() == {f.name for f in fields(Run)}
    True
    """
    return {*SAME, *TRANSLATED, *BESIDE, *NOT_DONE, *LAUNCHED, *REWARDED}


def accelerate(run: Run) -> dict[str, Any]:
    """The settings of `accelerate launch --config_file` for a run on several cards.

    Args:
        run: of the plan.

    Raises:
        UserError: processes on a CPU, which accelerate does not shard between.

    Example:
        >>> accelerate(Run(ranks=16, per_node=8))["num_machines"]
        2
    """
    if run.sharded and run.device == "cpu":
        raise UserError(f"cannot emit it: {several.unsharded('and this run is on the CPU')}")
    one = {"FSDP": run.sharded, "MULTI_CPU": run.device == "cpu", "MULTI_GPU": True}
    settings: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        "distributed_type": next(kind for kind, right in one.items() if right),
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": "no",  # the run's own file says it; here it would make fp32 copies of bf16 weights
        "num_machines": run.ranks // (run.per_node or run.ranks),
        "num_processes": run.ranks,
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": run.device == "cpu",
    }
    if run.sharded:
        settings["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": False,
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "SHARDED_STATE_DICT",
        }
    return settings


def launch(run: Run, file: str, settings: str) -> str:
    """The command that starts the run on all cards.

    Args:
        run: of the plan; file: of its configuration; settings: of accelerate's.
    """
    several = run.ranks > (run.per_node or run.ranks)
    where = "--machine_rank K --main_process_ip HOST --main_process_port 29500 " if several else ""
    return f"accelerate launch --config_file {settings} {where}-m lowmem finetune --config {file}"
