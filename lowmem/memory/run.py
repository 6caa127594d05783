"""The options of a run that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowmem.memory import gpus

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Run:
    """Everything about a run that the trace depends on; sizes are per device.

    rows    "full": one text per row, no mask; "padded": a mask of right padding; "packed": several texts
            share a row and each sees only itself; the rows of a micro-batch are laid end to end
    longest tokens of the longest text in packed rows; seq_len if None
    loss    "plain": the Trainer's own, logits for every token; "labels": logits for `label_tokens` positions
            only (all of them if None); "chunked": TRL's, never the whole logits
    compile "auto" as the optimizer decides, for a run of `steps` steps if known; "on"; "off"
    compute_capability  of the card, as in 7.5; it decides which attention kernels exist. None: 8.0 or more
    workspace  bytes that cuBLAS takes inside the allocator; None: what it takes at that capability
    """

    batch_size: int = 1
    seq_len: int = 2048
    dtype: str = "bfloat16"
    autocast: bool = False
    attention: str = "sdpa"
    rows: str = "full"
    longest: int | None = None
    gradient_checkpointing: bool = False
    gradient_release: bool = False
    accumulation: int = 1
    loss: str = "plain"
    label_tokens: int | None = None
    lora_rank: int = 0
    lora_targets: str = "all-linear"
    adapter_dtype: str = "float32"
    quantize: str | None = None
    max_grad_norm: float = 1.0
    compile: str = "auto"
    steps: int | None = None
    device: str = "cuda"
    compute_capability: float | None = None
    workspace: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def is_old(self) -> bool:
        """Whether the card has neither flash attention nor bf16 arithmetic: it is older than sm_80."""
        return self.device == "cuda" and self.compute_capability is not None and self.compute_capability < 8

    @property
    def library(self) -> int:
        """Bytes of cuBLAS inside the allocator, from its first product on."""
        if self.device != "cuda":
            return 0
        return gpus.library(self.compute_capability) if self.workspace is None else self.workspace

    @property
    def granularity(self) -> int:
        """Bytes to which the device's allocator rounds."""
        return 512 if self.device == "cuda" else 1
