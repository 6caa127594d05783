"""What the benchmark runs of a whole model: layers as wide as SmolLM2-135M's, in bf16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lowmem

VOCABULARY = 32000
Step = Callable[[], object]


def llama(device: str, layers: int) -> Any:
    """A model with random weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        pad_token_id=0,
    )
    made = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # type: ignore[no-untyped-call]
    return made.to(device)


def both_ways(device: str, layers: int, tokens: int = 475) -> dict[str, Step]:
    """Forward and backward, with weights of two bytes and of one."""
    ids = torch.arange(tokens, device=device)[None] % VOCABULARY

    def both(coded: bool) -> Step:
        model = llama(device, layers)
        if coded:
            lowmem.quantize_weights_(model, "int8")

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad(set_to_none=True)

        return run

    return {f"forward and backward, {word} weights": both(word == "int8") for word in ("bf16", "int8")}


def by_values(
    device: str, layers: int, rows: int = 16, tokens: int = 256, *, lr: float = 1e-9, eps: float = 1e-3
) -> dict[str, Step]:
    """A step of MeZO, the two values of the loss in it, and a step as its authors take it.

    Theirs adds Gaussian noise to the weights in place, takes it off, and draws it four times.
    """
    model = llama(device, layers).eval()
    ids = torch.arange(rows * tokens, device=device).view(rows, tokens) % VOCABULARY
    optimizer = lowmem.optimizer(model, "mezo", lr=lr, eps_perturb=eps, noise="rademacher", compile="on")

    @torch.no_grad()
    def loss() -> Tensor:
        logits: Tensor = model(input_ids=ids, logits_to_keep=1).logits
        return -logits.float().log_softmax(-1)[..., 0].mean()

    @torch.no_grad()
    def shift(by: float) -> None:
        generator = torch.Generator(device).manual_seed(0)
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype, device=device), alpha=by)

    def in_place() -> None:
        shift(eps)
        high = loss()
        shift(-2 * eps)
        slope = float(high - loss()) / (2 * eps)
        shift(eps)
        shift(-lr * slope)

    def step() -> None:
        optimizer.backward(loss, model)
        optimizer.step()

    return {"mezo": step, "mezo in place": in_place, "two values of the loss": lambda: (loss(), loss())}
