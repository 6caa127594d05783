"""What the card decides: attention kernels, bf16, the context and what cuBLAS takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.memory.device.gpus import MIB, budget, gpu
from lowmem.memory.plan import plan
from lowmem.memory.run import Run
from lowmem.memory.trace import kernels
from lowmem.memory.trace.replica import trace
from lowmem.models.computing import wide
from tests.memory.families import FAMILIES

FLASH, EFFICIENT = "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"
MATH = "_safe_softmax"  # the math attention is a composition: its softmax shows that it ran
HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32


class Names(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capability", "dtype", "key_heads", "masked", "expected"),
    [
        (None, BF16, 4, False, FLASH),
        (None, HALF, 2, False, FLASH),
        (8.0, BF16, 2, False, FLASH),
        (9.0, BF16, 4, True, EFFICIENT),
        (9.0, FULL, 4, False, EFFICIENT),
        (9.0, FULL, 2, False, MATH),
        (7.5, HALF, 4, False, EFFICIENT),
        (7.5, HALF, 4, True, EFFICIENT),
        (7.5, HALF, 2, False, MATH),
        (7.5, BF16, 4, False, MATH),
        (7.0, FULL, 4, False, EFFICIENT),
    ],
)
def test_kernel_of_a_card(capability, dtype, key_heads, masked, expected):
    with FakeTensorMode(), Names() as names:
        query = torch.empty(2, 4, 16, 8, dtype=dtype)
        key = torch.empty(2, key_heads, 16, 8, dtype=dtype)
        mask = torch.empty(2, 1, 16, 16, dtype=torch.bool) if masked else None
        out = kernels.attention_of(capability)(
            query, key, key, attn_mask=mask, is_causal=not masked, enable_gqa=key_heads < 4
        )
    assert out.shape == query.shape
    assert {FLASH, EFFICIENT, MATH} & names.seen == {expected}


def peak(family: str = "llama", **options: Any) -> int:
    run = Run(**{"batch_size": 2, "seq_len": 128, "dtype": "float16", "max_grad_norm": 0.0} | options)
    return max(moment.total for moment in trace(FAMILIES[family](), run).moments.values())


def test_grouped_queries_on_an_old_card_keep_their_scores():
    """Scores and probabilities of every layer, in fp32 as torch's math kernel makes them."""
    scores = 2 * 4 * 128 * 128 * 4
    assert peak(compute_capability=7.5) - peak(compute_capability=8.0) > 3 * scores
    # each query head has keys of its own: the memory-efficient kernel, which keeps no scores
    assert abs(peak("gpt2", compute_capability=7.5) - peak("gpt2", compute_capability=8.0)) < scores


def layer_backward(device: str, dtype: str) -> int:
    options = {"batch_size": 1, "seq_len": 512, "dtype": dtype, "attention": "eager", "max_grad_norm": 0.0}
    moments = trace(FAMILIES["llama"](), Run(**options, device=device)).moments
    return moments["first layer backward"].total - moments["optimizer step"].total


@pytest.mark.parametrize(("dtype", "more"), [("bfloat16", 4), ("float32", 4), ("float16", 2)])
def test_softmax_backward_of_eager_attention_takes_a_matrix_more_on_cuda(monkeypatch, dtype, more):
    """Its kernel multiplies gradient and output, in fp32, into a tensor of its own: 4 b a s^2 bytes.

    float16 scores are read as they are: no fp32 gradient of theirs, which saves half of that again.
    """
    elements = 4 * 512 * 512
    monkeypatch.setattr(wide, "native", lambda dtype: True)  # nor are products cast on this processor
    found = layer_backward("cuda", dtype) - layer_backward("cpu", dtype)
    assert found == pytest.approx(more * elements, abs=64 * 512)


def test_cublas_is_among_the_allocated_bytes():
    found = plan(FAMILIES["llama"](), "adamw", batch_size=2, seq_len=48, advise=False).plans[0]
    assert found.at_peak["workspace"] >= 2 * 8_519_680
    hopper = plan(FAMILIES["llama"](), "adamw", batch_size=2, seq_len=48, advise=False, gpu="h100-80gb")
    assert hopper.plans[0].peak["allocated"] - found.peak["allocated"] == 2 * (32 * MIB - 8_519_680)
    on_cpu = plan(FAMILIES["llama"](), "adamw", batch_size=2, seq_len=48, advise=False, device="cpu")
    assert on_cpu.plans[0].peak["allocated"] < 8_519_680


def test_context_is_that_of_the_architecture():
    assert gpu("t4").outside == gpu("rtx2080ti").outside == 141 * MIB
    assert gpu("a100-80gb").outside == budget("80GiB").outside == 425 * MIB
    assert budget("15GiB", 7.5).outside == 141 * MIB


@pytest.mark.parametrize("options", [{"gpu": "t4"}, {"gpu": "v100-16gb"}, {"compute_capability": 7.5}])
def test_bf16_on_a_card_without_it_is_warned_about(options):
    def warned(dtype: str) -> bool:
        found = plan(
            FAMILIES["gpt2"](), "adamw", batch_size=1, seq_len=32, dtype=dtype, advise=False, **options
        )
        return any("bf16" in text for text in found.warnings)

    assert (warned("bfloat16"), warned("float16")) == (True, False)


def test_a_recent_card_has_bf16():
    found = plan(FAMILIES["gpt2"](), "adamw", batch_size=1, seq_len=32, gpu="rtx4090", advise=False)
    assert not found.warnings
