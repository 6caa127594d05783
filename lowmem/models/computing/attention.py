"""Attention in packed rows: each example by itself.

TRL packs examples into one long row for each batch and says where they begin. Without
the FlashAttention package transformers then masks: it multiplies every token with every
other and throws away what lies between two examples. For b rows of s tokens that is a
mask of b^2 s^2 elements, and up to b s / n times the work where examples have n tokens. Here

    attention(row) = concat_i attention(example_i)

the same sums and gradients with torch's causal kernels, in memory linear in the tokens.

How the lengths reach the layers: transformers hands a mask of four dimensions on as it
is, so they travel in its place, int32 (1, 1, 1, examples), through gradient
checkpointing too. Any other mask goes to transformers' `sdpa`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

PACKED = "lowmem_packed"
"""The name under which transformers knows it; "flash" in a name would make it look on the Hub."""

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def by_example(attend: Attention, lengths: list[int] | None = None, *, widens: bool = True) -> Attention:
    """An attention that looks at the examples of a packed row one after the other.

    Args:
        attend: a causal attention with the interface of transformers.
        lengths: tokens of the examples, where they do not come in place of the mask.
        widens: to fp32 on a CPU: on short examples, which packing is for, torch's 16-bit kernels take up to
            twice as long there.

    Example:
        >>> rows = by_example(lambda module, q, k, v, mask, **_: (q.transpose(1, 2), None), lengths=[2, 3])
        >>> rows(None, *torch.zeros(3, 1, 4, 5, 8), None)[0].shape  # heads, tokens -> tokens, heads
        torch.Size([1, 5, 4, 8])
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        sizes = lengths or _lengths(attention_mask)
        if sizes is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        dtype = query.dtype
        if widens and query.device.type == "cpu":
            query, key, value = query.float(), key.float(), value.float()
        examples = zip(*(torch.split(x, sizes, dim=2) for x in (query, key, value)), strict=True)
        return torch.cat([attend(module, *one, None, **kwargs)[0] for one in examples], dim=1).to(dtype), None

    return attention


def sdpa(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """transformers' attention by `scaled_dot_product_attention`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    found: tuple[Tensor, Tensor | None] = sdpa_attention_forward(*args, **kwargs)
    return found


def _lengths(mask: Tensor | None) -> list[int] | None:
    """What travels in place of a mask."""
    if mask is None or mask.dtype != torch.int32:
        return None
    sizes: list[int] = mask.flatten().tolist()
    return sizes


def applies(model: nn.Module) -> bool:
    """Whether a model's packed rows can be attended to example by example.

    Args:
        model: unwrapped; a PEFT model is looked into.
    """
    inner = base(model)
    config = inner.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return (
        config._attn_implementation in ("sdpa", PACKED)
        and inner.is_backend_compatible()
        and inner._can_set_attn_implementation()
        and getattr(config, "attn_logit_softcapping", None) is None
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and not is_prompted(model)  # it lengthens the mask
    )


def reaches(model: nn.Module, length: int) -> bool:
    """Whether every layer of a model sees `length` tokens back: no window is shorter."""
    config = base(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return all(most is None or length <= most for most in windows)


def base(model: Any) -> Any:
    """The model under PEFT's adapters, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def is_prompted(model: nn.Module) -> bool:
    """Whether PEFT puts virtual tokens before a model's own."""
    adapters: Mapping[str, Any] = getattr(model, "peft_config", {})
    return any(adapter.is_prompt_learning for adapter in adapters.values())


def attend_by_example(model: nn.Module) -> None:
    """Switch a model to `by_example`: calls with `cu_seq_lens_q` and without a mask need none from now on.

    Args:
        model: one that `applies`; all other calls, and examples longer than a window, give what they gave.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED, by_example(sdpa))
    AttentionMaskInterface.register(PACKED, sdpa_mask)
    base(model).set_attn_implementation(PACKED)
    if _send_lengths not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_send_lengths, with_kwargs=True)


def _send_lengths(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Put the lengths of the examples where the mask would be."""
    starts = kwargs.get("cu_seq_lens_q")
    if base(module).config._attn_implementation != PACKED:
        return None  # it was given another attention since
    if starts is None or kwargs.get("attention_mask") is not None:
        return None
    lengths = starts.diff().to("cpu", torch.int32)  # read by every layer, so waited for once
    if not reaches(module, int(lengths.max())):
        return None
    return args, {**kwargs, "attention_mask": lengths.view(1, 1, 1, -1)}
