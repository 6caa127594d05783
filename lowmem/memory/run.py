"""The options of a run that its memory depends on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lowmem.memory.device import gpus

DTYPES = ("bfloat16", "float16", "float32")


def _option(
    default: Any, help: str, *, choices: tuple[str, ...] = (), least: float | None = None,
    below: float = 2**24, group: str = "Run",
) -> Any:  # fmt: skip
    """A field with what the command line and the checks need to know of it."""
    limits = {"least": least, "below": below}
    return field(default=default, metadata={"help": help, "choices": choices, "group": group, **limits})


@dataclass(frozen=True)
class Run:
    """Everything about a run that the trace depends on; sizes, batch_size too, are per device.

    rows    "full": one text per row, no mask; "padded": a mask of right padding; "packed": several texts
            share a row and each sees only itself; the rows of a micro-batch are laid end to end
    loss    "plain": the Trainer's own, logits for every token; "labels": logits for `label_tokens` positions
            only (all of them if None); "chunked": TRL's, never the whole logits
    compile "auto" as the optimizer decides, for a run of `steps` steps if known; "on"; "off"
    None    of `compute_capability`: 8.0 or more; of `workspace`: what cuBLAS takes at that capability; of
            `adapter_dtype`: as TRL has it, bfloat16 over a quantized base and float32 otherwise
    """

    batch_size: int = _option(1, "rows per forward pass", least=1, below=2**20)
    seq_len: int = _option(2048, "tokens per row", least=2)
    dtype: str = _option("bfloat16", "dtype of the weights", choices=DTYPES)
    autocast: bool = _option(False, "compute under autocast")
    autocast_dtype: str = _option(
        "bfloat16", "dtype of autocast; float16 scales the loss", choices=("bfloat16", "float16")
    )
    attention: str = _option("sdpa", "fused kernels, or eager", choices=("sdpa", "eager"))
    rows: str = _option("full", "what a row of the batch holds", choices=("full", "padded", "packed"))
    longest: int | None = _option(
        None, "tokens of the longest text in packed rows; seq_len if not given", least=1
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in backward")
    gradient_release: bool = _option(False, "step each tensor inside backward")
    activation_offload: bool = _option(False, "keep activations in host memory until backward")
    offload_state: bool = _option(False, "keep optimizer state in host memory between steps")
    few_bit: int | None = _option(
        None, "bits that activation functions keep of each number (1 to 4)", least=1, below=5
    )
    accumulation: int = _option(1, "forward passes per optimizer step", least=1)
    loss: str = _option(
        "plain", "the Trainer's, logits at labels only, or chunked", choices=("plain", "labels", "chunked")
    )
    label_tokens: int | None = _option(None, "label positions of a micro-batch; all if not given", least=1)
    eval_batch_size: int | None = _option(
        None, "rows per evaluation batch; batch_size if not given, 0 for none", least=0, below=2**20
    )
    typical: int | None = _option(
        None, "tokens of a typical row, where seq_len is the longest: its step is a row of its own", least=2
    )
    keep_output: bool = _option(False, "the loop keeps the logits through backward; the Trainer does not")
    max_grad_norm: float = _option(1.0, "clip gradients together; 0 does not", least=0.0)
    lora_rank: int = _option(0, "train adapters of this rank", least=0, below=2**16, group="Adapters")
    lora_alpha: float | None = _option(
        None, "scale of LoRA; twice the rank when not given", least=0, group="Adapters"
    )
    lora_dropout: float = _option(
        0.0, "share of the adapters' inputs left out", least=0, below=1, group="Adapters"
    )
    lora_targets: str = _option("all-linear", "modules that get adapters, with commas", group="Adapters")
    adapter: str | None = _option(None, "another method of PEFT by its name", group="Adapters")
    adapter_args: str = _option("", "options of PEFT's method, as in use_dora=true", group="Adapters")
    adapter_dtype: str | None = _option(
        None, "dtype of the adapters, if not TRL's choice", choices=DTYPES, group="Adapters"
    )
    quantize: str | None = _option(
        None, "quantise the weights under the adapters", choices=("nf4",), group="Adapters"
    )
    weights: str | None = _option(None, "hold the weights that train as codes of one byte", choices=("int8",))
    int8_embeddings: bool = _option(False, "embedding and head as int8 codes too")
    double_quant: bool = _option(True, "quantise the scales of 4-bit weights as well", group="Adapters")
    kbit_prepare: bool = _option(
        False, "peft's prepare_model_for_kbit_training: fp32 where nothing is packed", group="Adapters"
    )
    task: str = _option("sft", "what is learned, as finetune calls it: sft, dpo, orpo, kto, reward, grpo")
    num_generations: int | None = _option(None, "answers per prompt of grpo (8)", least=2)
    max_completion: int | None = _option(None, "tokens of an answer of grpo (256)", least=2)
    compile: str = _option(
        "auto", "compile the optimizer's step", choices=("auto", "on", "off"), group="Device"
    )
    steps: int | None = _option(
        None, "steps of the run, for compile=auto", least=1, below=2**31, group="Device"
    )
    device: str = _option("cuda", "where it will run", choices=("cuda", "cpu"), group="Device")
    ranks: int = _option(1, "cards that share the run", least=1, below=2**16, group="Ranks")
    shard: str = _option(
        "full", "FSDP2 spreads weights, gradients and state over the cards, or none: each has a copy",
        choices=("full", "none"), group="Ranks",
    )  # fmt: skip
    per_node: int | None = _option(None, "cards of one machine; all if not given", least=1, group="Ranks")
    compute_capability: float | None = _option(
        None, "of the card, as in 7.5: decides its attention kernels", least=3.0, group="Device"
    )
    workspace: int | None = _option(
        None, "bytes of cuBLAS inside the allocator", least=0, below=2**40, group="Device"
    )

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch."""
        return self.batch_size * self.seq_len

    @property
    def evaluation(self) -> Run | None:
        """The run with the batch of an evaluation; None where nothing is evaluated."""
        usual = (self.num_generations or 8) if self.task == "grpo" else self.batch_size
        rows = usual if self.eval_batch_size is None else self.eval_batch_size
        if not rows:
            return None
        labels = self.label_tokens and -(-self.label_tokens * rows // self.batch_size)
        return replace(self, batch_size=rows, label_tokens=labels)

    @property
    def evaluates_more(self) -> bool:
        """Whether an evaluation has more rows than a step: else it holds no more than a forward pass does."""
        return self.evaluation is not None and self.evaluation.batch_size > self.batch_size

    @property
    def sharded(self) -> bool:
        """Whether the rows of weights are spread over several cards."""
        return self.ranks > 1 and self.shard == "full"

    @property
    def forwards(self) -> Run:
        """The run of a strategy without gradients: nothing is kept for a backward pass, or let go in it."""
        both = gpus.library(self.compute_capability)  # what was measured or asked for stays
        usual = self.device == "cuda" and self.workspace in (None, both)
        one = both // gpus.HANDLES if usual else self.workspace
        return replace(
            self, gradient_checkpointing=False, activation_offload=False, few_bit=None,
            gradient_release=False, offload_state=False, accumulation=1, workspace=one,
        )  # fmt: skip

    @property
    def adapts(self) -> bool:
        """Whether adapters are trained and the model's own weights stay."""
        return bool(self.lora_rank or self.adapter)

    @property
    def dtype_of_adapters(self) -> str:
        """Dtype of the adapters, by name."""
        return self.adapter_dtype or ("bfloat16" if self.quantize else "float32")

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
