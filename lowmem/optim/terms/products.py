"""In which precision a device multiplies: 16 bits where it has instructions for them.

Without any, as on processors before AVX-512, torch multiplies bf16 and fp16 element by element: some
products take forty times as long as in fp32. Cast to fp32 they are as exact as with instructions, which
add up in fp32 and round once.
"""

from __future__ import annotations

import functools

import torch

from lowmem.optim.engine.cutting import sizes

HALF = (torch.bfloat16, torch.float16)


@functools.cache
def native(dtype: torch.dtype) -> bool:
    """Whether this machine's processor has instructions for products of a dtype."""
    if dtype not in HALF:
        return True
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    asked = getattr(torch.ops.mkldnn, name, None)
    if asked is None:  # no public name says it
        return torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    return bool(asked())


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The precision of matrix products with a tensor: bf16 where that is held and multiplied, else fp32."""
    at_hand = sizes(device).at_hand  # on the processor
    return dtype if dtype == torch.bfloat16 and (not at_hand or native(dtype)) else torch.float32
