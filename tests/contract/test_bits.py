"""Weights and states keep their bits from one version of the code to the next.

`bits.json` holds, for each kind of arithmetic that was at hand, a hash of all that 20 steps leave behind.
Another processor, torch or compiler rounds otherwise: where the fingerprint of its arithmetic is unknown,
nothing can be said and the test is skipped. A change of bits that is meant is recorded with

    python -m tests.contract.test_bits [NAME...]
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowmem

FILE = Path(__file__).with_name("bits.json")
STEPS = 20

OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw bf16": {"states": "bf16"},
    "adamw kahan": {"writer": "kahan"},
    "adamw split": {"writer": "split"},
    "adamw_8bit int8": {"states": "int8"},
    "adamw_8bit int4": {"states": "int4"},
    "adamw_8bit companded8": {"states": "companded8"},
    "adafactor": {},
    "adafactor momentum": {"beta1": 0.9},
    "adafactor momentum int8": {"beta1": 0.9, "states": "int8"},
    "adafactor relative": {"relative_step": True, "warmup": 10, "scale_parameter": True},
    "galore": {"rank": 4, "update_proj_gap": 6},
    "galore int8": {"rank": 4, "update_proj_gap": 6, "states": "int8"},
    "galore companded8 reset": {
        "rank": 4, "update_proj_gap": 6, "states": "companded8", "on_refresh": "reset",
    },
    "galore svd rotate": {"rank": 4, "update_proj_gap": 6, "projector": "svd", "on_refresh": "rotate"},
    "galore adafactor": {"rank": 4, "update_proj_gap": 6, "inner": "adafactor"},
    "frugal columns": {"update_proj_gap": 6},
    "frugal randk int8": {"update_proj_gap": 6, "split": "randk", "states": "int8"},
    "frugal svd": {"update_proj_gap": 6, "split": "svd", "residual": "sgd", "residual_scale": 0.1},
    "frugal blocks": {"update_proj_gap": 6, "split": "blocks", "density": 0.5},
    "frugal sign": {"density": 0.0},
    "microadam": {},
    "mezo": {"eps_perturb": 0.01},
    "mezo rademacher": {"eps_perturb": 0.01, "noise": "rademacher", "queries": 2},
}  # fmt: skip

COMPILED = (
    "adamw", "adamw bf16", "adamw_8bit int8", "adamw_8bit int4", "adamw_8bit companded8", "galore int8",
    "frugal columns", "adafactor momentum", "mezo",
)  # fmt: skip
IN_BF16 = ("adamw", "adamw_8bit companded8")

RUNS = [
    *((name, dtype, "off") for name in OPTIONS for dtype in ("float32", "bfloat16")),
    *((name, "float32", "on") for name in COMPILED),
    *((name, "bfloat16", "on") for name in IN_BF16),
]


def key(name: str, dtype: str, compile: str) -> str:
    return f"{name}, {dtype}, {'compiled' if compile == 'on' else 'eager'}"


class Net(nn.Module):
    """Matrices of both orientations, a convolution, vectors, an embedding and a head, large and small."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(130, 48)
        self.conv = nn.Conv1d(48, 24, 3)
        self.wide = nn.Linear(24, 200)
        self.tall = nn.Linear(200, 60, bias=False)
        self.norm = nn.LayerNorm(60)
        self.small = nn.Linear(60, 48)
        self.lm_head = nn.Linear(48, 130, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).transpose(1, 2)).transpose(1, 2)
        return self.lm_head(self.small(self.norm(self.tall(self.wide(x).tanh()))))


def normal(shape: Iterable[int], *seed: int) -> Tensor:
    """Normal enough, and the same wherever doubles are: no generator of torch is asked."""
    count = math.prod(shape)
    word = int.from_bytes(hashlib.blake2b(repr(seed).encode(), digest_size=4).digest(), "little")
    i = torch.arange(12 * count, dtype=torch.int64) + 12 * count * (word % 1009)
    i = ((i ^ (i >> 16) ^ word) * 0x45D9F3B) & 0xFFFFFFFF
    i = ((i ^ (i >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    i = ((i ^ (i >> 16)) & 0xFFFF).view(count, 12).sum(1)
    return ((i - 6 * 0xFFFF).double() / 0xFFFF).float().view(*shape)


def left(name: str, dtype: str, compile: str) -> str:
    """A hash of the weights and states after 20 steps, one of which has met a NaN."""
    with torch.random.fork_rng():
        model = Net().to(getattr(torch, dtype))
    for i, p in enumerate(model.parameters()):
        p.data.copy_(normal(p.shape, -1, i) * 0.1)
    method, options = name.split()[0], OPTIONS[name]
    hyper: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "compile": compile}
    if any("betas" in rule.uses for rule in lowmem.create(method, **options).rules.values()):
        hyper["betas"] = (0.9, 0.99)
    optimizer = lowmem.optimizer(model, method, **hyper, **options)
    tokens = torch.arange(60).view(4, 15) % 130
    for step in range(STEPS):
        if optimizer.strategy.source.needs_autograd:
            for i, p in enumerate(model.parameters()):
                p.grad = (normal(p.shape, step, i) * 0.1).to(p.dtype)
            if step == 7:
                model.wide.weight.grad.view(-1)[77] = math.nan
                model.norm.weight.grad[3] = math.inf
            optimizer.step()
        else:
            optimizer.step(lambda: model(tokens).float().square().mean())
    return digest(model, optimizer)


def digest(model: nn.Module, optimizer: Any) -> str:
    total = hashlib.blake2b(digest_size=12)
    for name, p in model.named_parameters():
        held = {"": p.detach(), **optimizer.state[p]}
        for part in sorted(held):
            tensor = held[part].contiguous()
            total.update(f"{name} {part} {tensor.dtype} {tuple(tensor.shape)}".encode())
            total.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _sample(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(-1, keepdim=True).sqrt() * torch.addcmul(y, x, x) / (y.abs() + 1e-3)).sum(-1)


@functools.cache
def fingerprint(compiled: bool) -> str:
    """A name of this machine's arithmetic: products, roots, factorizations and, if asked, compiled code."""
    total = hashlib.blake2b(torch.__version__.encode(), digest_size=8)
    x, y = normal((120, 96), 1), normal((96, 200), 2)
    q, r = torch.linalg.qr(x[:, :5])
    results = [
        x @ y, x.bfloat16() @ y.bfloat16(), x.t() @ x, q, r, *torch.linalg.svd(x), _sample(x, x + 1),
        x.tanh(), x.abs().pow(-0.8), x.exp().log().cos(), x.softmax(1), torch.linalg.vector_norm(x, dim=1),
        x.sum(0),
    ]  # fmt: skip
    if compiled:
        step = torch.compile(_sample, fullgraph=True)
        results += [step(normal((rows, 256), 3), normal((rows, 256), 4)) for rows in (1, 48)]
    for tensor in results:
        total.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own compiler
@pytest.mark.parametrize(("name", "dtype", "compile"), RUNS, ids=lambda value: value.replace(" ", "-"))
def test_bits_are_those_recorded(name: str, dtype: str, compile: str) -> None:
    machine, known = fingerprint(compile == "on"), json.loads(FILE.read_text())
    if machine not in known:
        pytest.skip(f"no bits are recorded for the arithmetic {machine} of this machine")
    assert left(name, dtype, compile) == known[machine][key(name, dtype, compile)]


def record(names: list[str]) -> None:
    """Write down the bits of this machine, all of them or those of some methods."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    for run in RUNS:
        if not names or run[0] in names:
            known.setdefault(fingerprint(run[2] == "on"), {})[key(*run)] = left(*run)
    FILE.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(sys.argv[1:])
