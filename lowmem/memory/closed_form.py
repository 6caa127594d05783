"""The same peak by arithmetic: live bytes of a training step of a Llama-like decoder, event by event.

T = b s tokens; h hidden, a heads, k key-value heads, d head size, f feed-forward size, L layers, V
vocabulary; 16-bit weights and compute, one text per row, the model's own loss, full fine-tuning, a CUDA
card. Saved per token and layer:

    norm   8h + 4              fp32 input, normalised input, output, rstd      (Gemma 10h + 4: all in fp32)
    attn   2(2ad + 2kd) + 4a   q, out, k, v, log-sum-exp      (eager: 6as instead of 4a, k and v repeated)
    qk     (6d + 4)(a + k)     Qwen3's norms of q and k
    mlp    8f                  gate, act(gate), up, product
    A = 2 norm + attn + qk + mlp;      under checkpointing only the layer's input, 2h

The residual stream is not saved (its fp32 copy is); q, k, v and gate, up share one saved input; rope saves
cos and sin once. The peak is a maximum over events, each a sum below; the optimizer's state and scratch
come on top. Derived from the operations, then compared with traces: see tests/memory/test_closed_form.py
for how closely.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.memory.run import Run

SUPPORTED = {"llama", "mistral", "qwen2", "qwen3", "gemma"}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
"""Of which input and output are saved."""
WIDEST = 256
"""Head size up to which there is a flash kernel; transformers repeats grouped keys and values beyond."""


@dataclass(frozen=True)
class Shape:
    """A decoder in numbers; `weights` in bytes of 16-bit parameters, `grads` those of one layer."""

    h: int
    a: int
    k: int
    d: int
    f: int
    L: int
    V: int
    tied: bool
    norm: int
    qk: int
    bias: int

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        h, a, k, d, f = self.h, self.a, self.k, self.d, self.f
        return 2 * h * a * d + 2 * h * k * d + 3 * h * f + 2 * h + (2 * d if self.qk else 0) + self.bias

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.L * self.layer + self.h + self.V * self.h * (1 if self.tied else 2)


def shape_of(config: Any) -> Shape:
    """Read the numbers from a transformers configuration."""
    kind = config.model_type
    h, a = config.hidden_size, config.num_attention_heads
    k = getattr(config, "num_key_value_heads", None) or a
    d = getattr(config, "head_dim", None) or h // a
    bias = (a + 2 * k) * d if kind == "qwen2" else 0
    return Shape(
        h, a, k, d, config.intermediate_size, config.num_hidden_layers, config.vocab_size,
        bool(config.tie_word_embeddings), (10 if kind == "gemma" else 8) * h + 4,
        (6 * d + 4) * (a + k) if kind == "qwen3" else 0, bias,
    )  # fmt: skip


def supports(config: Any, run: Run) -> bool:
    """Whether the formulas describe this model and run."""
    shape = (run.loss, run.rows, run.adapts, run.ranks, run.weights, run.task, run.device)
    plain = shape == ("plain", "full", False, 1, None, "sft", "cuda")
    return (
        not hasattr(config, "skeleton")  # a model object need not be what its configuration says
        and config.model_type in SUPPORTED
        and plain
        and not (run.activation_offload or run.few_bit or run.keep_output)
        and not (run.gradient_release and run.accumulation > 1)
        and run.dtype != "float32"
        and not run.autocast
        and _plain_layers(config)
        and _plain_attention(config, run)
    )


def _plain_layers(config: Any) -> bool:
    """Nothing in the layers that was not derived."""
    biased = config.model_type != "qwen2" and getattr(config, "attention_bias", False)
    act = getattr(config, "hidden_activation", None) or config.hidden_act
    return act in ACTIVATIONS and not (
        biased or getattr(config, "mlp_bias", False) or getattr(config, "attention_dropout", 0.0)
    )


def _plain_attention(config: Any, run: Run) -> bool:
    """No mask, and a kernel that was derived: one that is fused, or eager's."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    shape = shape_of(config)
    if (window is not None and run.seq_len >= window) or shape.d > WIDEST:
        return False
    if run.attention == "eager":
        return run.dtype == "bfloat16" and _every_head_its_own(config)
    return not run.is_old or (run.dtype == "float16" and shape.k == shape.a)


def _every_head_its_own(config: Any) -> bool:
    """No grouped queries: eager attention repeats keys and values otherwise, which was not derived."""
    shape = shape_of(config)
    return shape.k == shape.a and shape.a * shape.d == shape.h


def saved_per_token(shape: Shape, run: Run) -> int:
    """A: bytes that one layer saves for backward, per token."""
    attn = 2 * (2 * shape.a * shape.d + 2 * shape.k * shape.d) + 4 * shape.a
    if run.attention == "eager":
        attn = 2 * 4 * shape.a * shape.d + 6 * shape.a * run.seq_len
    return 2 * shape.norm + attn + shape.qk + 8 * shape.f


def events(config: Any, run: Run) -> Mapping[str, int]:
    """Live bytes at each event, without the optimizer's.

    Args:
        config: of a model for which `supports` is true.
        run: the options.

    Example:
        >>> from transformers import LlamaConfig
        >>> seven = LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008)
        >>> round(max(events(seven, Run()).values()) / 2**30, 2)  # + 25.10 of AdamW in bf16 = 50.22
        25.12
    """
    s = shape_of(config)
    T = run.tokens
    A = saved_per_token(s, run)
    kept = 2 * s.h * s.L if run.gradient_checkpointing else A * s.L
    weights, head, layer = 2 * s.parameters, 2 * s.V * s.h, 2 * s.layer
    inputs = run.library + 16 * T + 4 * s.d * run.seq_len + 2 * s.d  # ids, labels, cos, sin, frequencies
    carried = weights if run.accumulation > 1 else 0  # gradients of the micro-batches before
    base = weights + inputs + carried
    # where gradients are released, or added to those before, a layer's are gone when the next one begins
    gone = _gone(run)
    held = head if (s.tied or not gone) else 0
    above = 0 if gone else (s.L - 1) * layer
    first = 2 * s.h * s.L if run.gradient_checkpointing else A * (s.L - 1)
    last = 2 * s.h if run.gradient_checkpointing else 0
    inside = layer_backward(s, run, A)
    word = "recompute" if run.gradient_checkpointing else "layer backward"
    embedding = 2 * s.h * T + head * (1 if gone and not s.tied else 2)
    if s.tied:  # the head's gradient, the embedding's, and their sum
        embedding = max(embedding, 3 * head)
    logits = max(12 * s.V * T, (2 * s.V + 2 * s.h) * T + head)
    return {
        "loss forward": base + (kept + s.norm + 10 * s.V) * T,
        "loss backward": base + (kept + s.norm) * T + logits,
        f"first {word}": base + held + first * T + inside,
        f"last {word}": base + held + above + last * T + inside,
        "embedding backward": base + embedding + (0 if gone else s.L * layer + 2 * s.h),
        **({} if run.gradient_release else {"optimizer step": base + weights - carried}),
    }


def _gone(run: Run) -> bool:
    """Whether a gradient is gone as soon as it is there."""
    return run.gradient_release or run.accumulation > 1


def layer_backward(s: Shape, run: Run, A: int) -> int:
    """Greatest bytes inside one layer's backward: saved tensors, gradients on the way and its own."""
    T, down = run.tokens, 2 * s.h * s.f
    own = 0 if _gone(run) else down
    instants = [
        (A + 2 * s.f + 2 * s.h) * T + down,  # the down projection's weight gradient appears
        (A + 4 * s.f + 2 * s.h) * T + own,  # both factors of the gated product
        (A - 8 * s.f + 18 * s.h) * T + 3 * own,  # the norm before the feed-forward, in fp32
        26 * s.h * T + (0 if _gone(run) else 2 * s.layer),  # the norm before the attention
    ]
    if run.attention == "eager":
        # gradients of the probabilities and the scores, and what the kernel multiplies into
        instants.append((A - 8 * s.f + 10 * s.a * run.seq_len) * T + 3 * own)
    return max(instants)
