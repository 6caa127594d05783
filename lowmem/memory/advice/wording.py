"""The sentences around a plan: what was assumed, what to beware of, and the command that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lowmem.memory.device.gpus import Budget
from lowmem.memory.run import Run
from lowmem.memory.trace.tasks.kinds import PLANNED
from lowmem.models.positions import longest
from lowmem.optim.strategy import Strategy
from lowmem.strategies import create


def warnings(config: Any, run: Run, name: str) -> tuple[str, ...]:
    """What the user should know before trusting the plan."""
    found = []
    most = longest(config)
    if most is not None and run.seq_len > most:
        found.append(
            f"seq_len {run.seq_len} is beyond the {most} positions of {name}: it was not trained for that"
        )
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap and run.attention == "sdpa":
        found.append(
            f"{name} soft-caps its attention scores, which no fused kernel of torch does: eager is planned"
        )
    if run.dtype == "float16" and not run.lora_rank:
        found.append(
            "gradients in float16 vanish below 6e-8, `lowmem finetune` refuses to train by them: plan with "
            "--dtype float32 --autocast --autocast-dtype float16, or a strategy without gradients"
        )
    if run.is_old and (run.dtype == "bfloat16" or (run.autocast and run.autocast_dtype == "bfloat16")):
        found.append(
            f"a card of compute capability {run.compute_capability} has no bf16 arithmetic: it is emulated, "
            "slowly, and no fused attention takes it; use --dtype float32 --autocast --autocast-dtype float16"
        )
    return tuple(found)


def assumptions(run: Run, limit: Budget | None) -> tuple[str, ...]:
    """What the numbers rest on."""
    import torch
    import transformers

    kernels = "the kernels of torch on a CPU" if run.device == "cpu" else _cuda_attention(run)
    attention = "eager attention (scores are materialised)" if run.attention == "eager" else kernels
    losses = {
        "plain": "the model's own loss: logits for every token (`lowmem finetune` makes them at labels only)",
        "labels": f"logits at {run.label_tokens or 'all'} label positions of a micro-batch",
        "chunked": "TRL's chunked loss: the whole logits never exist",
    }
    rows = {
        "full": "full rows, one text each, no mask",
        "padded": "padded rows: a mask is materialised and the flash kernel is not used",
        "packed": "packed rows: each text attends by itself, without a mask, where the model allows it",
    }
    found = [
        f"torch {torch.__version__}, transformers {transformers.__version__}; {attention}; model eager",
        f"{run.dtype} weights"
        + (f" under autocast in {run.autocast_dtype}" if run.autocast else ", no autocast"),
        PLANNED[run.task].words if run.task in PLANNED else losses[run.loss],
        rows[run.rows],
        "the peak of a step from the second on; a refresh of the basis is included",
        "sizes are binary (GiB = 2^30 bytes); kernels' inner scratch is counted of softmax and cuBLAS alone",
    ]
    if run.adapts:
        found.append(
            _adapters(run)
            + (
                f", NF4 base with {'doubly' if run.double_quant else 'singly'} quantized weights"
                if run.quantize
                else ""
            )
            + (", embeddings, head and norms in fp32" if run.kbit_prepare else "")
        )
    elif run.quantize:
        found.append(
            "NF4 weights, of which the scales are trained, in fp32; embeddings, head and norms frozen"
        )
    if run.weights:
        what = "matrices, embeddings and head" if run.int8_embeddings else "matrices"
        found.append(
            f"int8 codes and a scale for 256 of them for the {what}; one layer's weight is decoded at a time"
        )
    if run.ranks > 1:
        found.append(_over_ranks(run))
    if run.device == "cuda":
        found.append(
            "reserved and device are simulations of the caching allocator, not yet measured on a GPU"
        )
    if limit is not None and not limit.cached:
        found.append("the budget is for tensors; Python and its libraries take memory of the host besides")
    return (*found, *(limit.notes if limit else ()))


def _over_ranks(run: Run) -> str:
    """What is on each card."""
    if not run.sharded:
        return (
            f"each of {run.ranks} cards holds all weights, gradients and state, and a copy of the gradients "
            "in DDP's buckets; batch_size is that of one card"
        )
    held = "the frozen model and the adapters" if run.adapts else "weights, gradients and state"
    micro = (
        "; between micro-batches gradients stay whole, as the Trainer leaves them"
        if run.accumulation > 1
        else ""
    )
    return (
        f"the first of {run.ranks} ranks under FSDP2, which has most: rows of {held}, padded to equal "
        "chunks; layers and embedding are gathered in turn, norm and head are whole from forward to the end "
        f"of backward{micro}; batch_size is that of one card; buffers of NCCL are not counted"
    )


def _adapters(run: Run) -> str:
    dropout = f"dropout {run.lora_dropout:g}" if run.lora_dropout else "no dropout"
    more = f", {run.adapter_args}" if run.adapter_args else ""
    if run.lora_rank:
        where = f"on {run.lora_targets} in {run.dtype_of_adapters}"
        return f"LoRA of rank {run.lora_rank} {where}, {dropout}{more}"
    return (
        f"{run.adapter}{more}, as peft makes it; methods that gather or orthogonalise are off by up to 20 %"
    )


def _cuda_attention(run: Run) -> str:
    if not run.is_old:
        return "fused attention kernels of CUDA (flash: compute capability 8.0 or more)"
    return (
        f"attention at compute capability {run.compute_capability}: no flash; memory-efficient in fp16 and "
        "fp32 where each query head has its own keys, math elsewhere"
    )


def command(
    model: Any, run: Run, made: Sequence[Strategy], budget: str | int | None, gpu: str | None
) -> str | None:
    """The `lowmem plan` command that gives this plan again.

    None where there is none: a configuration or model object, or a strategy composed in Python, has no name.
    """
    if not (isinstance(model, str) or hasattr(model, "__fspath__")) or not all(s.name for s in made):
        return None
    words = ["lowmem", "plan", "--model", str(model), "--optim", ",".join(map(_named, made))]
    default = Run()
    for name in run.__dataclass_fields__:
        value = getattr(run, name)
        implied = (name == "max_grad_norm" and run.gradient_release) or (
            name == "loss" and run.task in PLANNED
        )
        if value == getattr(default, name) or implied:
            continue
        flag = name.replace("_", "-")
        words += (
            [f"--{flag}" if value else f"--no-{flag}"]
            if isinstance(value, bool)
            else [f"--{flag}", str(value)]
        )
    words += ["--gpu", gpu] if gpu else ["--budget", str(budget)] if budget else []
    return shlex.join(words)


def _named(strategy: Strategy) -> str:
    """A strategy with every option that is not its own default, as `--optim` takes it."""
    own = create(strategy.name).options
    options = {key: value for key, value in strategy.options.items() if own.get(key) != value}
    if not options:
        return strategy.name
    words = (str(v).lower() if isinstance(v, bool) else str(v) for v in options.values())
    return f"{strategy.name}({','.join(f'{k}={word}' for k, word in zip(options, words, strict=True))})"
