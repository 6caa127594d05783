"""Kernels for a processor work by whole vectors, and leave the same bits as those that Inductor writes."""

from __future__ import annotations

import contextlib
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import lowmem
from lowmem.optim.engine.compiling import kernel

CAPABILITY = torch.backends.cpu.get_cpu_capability()
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),  # torch's own compiler
    pytest.mark.filterwarnings("ignore:bf16 and fp16 are mixed"),  # Inductor of its own kernel
    pytest.mark.skipif("CAPABILITY not in ('AVX2', 'AVX512')", reason="another kind of processor"),
]
METHODS = {
    "sgd": ("sgd", {}),
    "adamw": ("adamw", {"states": "bf16"}),
    "companded8": ("adamw_8bit", {"states": "companded8"}),
    "int8": ("adamw_8bit", {"states": "int8"}),
    "int4": ("adamw_8bit", {"states": "int4"}),
    "lion": ("lion", {"modifiers": "cautious"}),
}
PAIRS = [
    *((torch.bfloat16, method) for method in ("adamw", "companded8", "lion")),
    (torch.float32, "int4"),
    (torch.float16, "int8"),
    (torch.float32, "sgd"),
]


def step(dtype: torch.dtype, method: str) -> tuple[list[Tensor], str]:
    """What two steps leave behind, by gradients of all kinds, and the code of their kernels."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(67, 83, generator=generator).to(dtype))
    name, options = METHODS[method]
    optimizer = lowmem.optimizer([p], name, lr=1e-2, weight_decay=0.1, compile="on", **options)
    p.grad = torch.randn(67, 83, generator=generator).to(dtype)
    p.grad[3, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])
    _, codes = run_and_get_code(optimizer.step)
    optimizer.step()
    held = [x for x in optimizer.state[p].values() if isinstance(x, Tensor)]
    return [p.detach(), *held], "\n".join(codes)


def words(x: Tensor) -> Tensor:
    """Its bits."""
    whole: Any = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return x.view(whole)


@pytest.mark.parametrize(("dtype", "method"), PAIRS, ids=str)
def test_vectors_stay_whole(dtype: torch.dtype, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, code = step(dtype, method)
    assert "Vectorized" in code
    assert "tmpbuf_out" not in code  # the elements of a vector, one by one
    if CAPABILITY == "AVX2" and dtype != torch.float32:
        loaded = re.findall(
            r"Vectorized<at::(?:BFloat16|Half)>::loadu\(.*?static_cast<int64_t>\((\d+)L?\)\)", code
        )
        assert loaded
        assert set(loaded) == {"16"}
    if CAPABILITY == "AVX2":
        assert not re.search(r"Vectorized<u?int8_t>::loadu\(.*static_cast<int64_t>\((8|16)L?\)\)", code)
        assert "convert<int8_t>" not in code
        assert "convert<uint8_t>" not in code
    monkeypatch.setattr(kernel, "whole_vectors", contextlib.nullcontext)
    theirs, other = step(dtype, method)
    assert other != code
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(words(a), words(b))
