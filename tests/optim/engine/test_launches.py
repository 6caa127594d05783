"""How often a step asks a card for something, counted on meta with its policy named.

A call of a compiled kernel is one launch, and so is every operation of torch that is not a view. What a
compiler makes of one kernel on a card is not seen here.
"""

from __future__ import annotations

import collections
import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowmem
import lowmem.optim
from lowmem.optim.engine import chunks, cutting, passes
from lowmem.optim.engine.cutting import policy
from lowmem.optim.terms.hyper import stagger

HIDDEN, INNER, VOCABULARY = 4096, 11008, 32000
PRODUCTS = ("aten.mm.default", "aten.addmm_.default")
META = torch.device("meta")
NAME = "model.layers.0.mlp.weight"
WALK = cutting.walk
ROOMS = pkgutil.walk_packages(lowmem.optim.__path__, "lowmem.optim.")
WALKING = [
    room for room in (importlib.import_module(m.name) for m in ROOMS) if getattr(room, "walk", 0) is WALK
]
NOTHING = ("aten.empty", "aten.new_empty", "aten.detach", "aten.lift_fresh", "aten._reshape_alias")


class Launches(TorchDispatchMode):
    """Counts what is asked of meta."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()
        self.kernels = self.uploads = 0

    def __enter__(self) -> Launches:
        self.counts.clear()
        self.kernels = self.uploads = 0
        return super().__enter__()

    @property
    def ages(self) -> int:
        return self.counts["aten._foreach_add_.Scalar"]

    @property
    def total(self) -> int:
        """Of tensors: the ages of a step, moved together, are launches beside."""
        return self.kernels + sum(self.counts.values()) - self.ages

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = [x.device for x in tree_leaves((args, kwargs or {})) if isinstance(x, Tensor)]
        made = [x.device for x in tree_leaves(out) if isinstance(x, Tensor)]
        name = str(func)
        if META in made and any(d != META for d in given) and "copy" in name:
            self.uploads += 1
        elif META in made + given and not func.is_view and not name.startswith(NOTHING):
            self.counts[name] += 1
        return out


def optimizer_of(name: str, dtype: torch.dtype, layers: int = 1) -> Any:
    """Some layers of Llama-7B, each like the others, at a step between refreshes."""
    shapes = {"embed.weight": (VOCABULARY, HIDDEN)}
    for i in range(layers):
        shapes |= {f"{i}.attention.{x}.weight": (HIDDEN, HIDDEN) for x in "qkvo"}
        shapes |= {f"{i}.mlp.{x}.weight": (INNER, HIDDEN) for x in ("gate", "up")}
        shapes |= {f"{i}.mlp.down.weight": (HIDDEN, INNER)}
    groups = [
        {
            "params": [(n, nn.Parameter(torch.empty(shape, dtype=dtype, device=META)))],
            "role": "embedding" if n.startswith("embed") else "matrix",
        }
        for n, shape in shapes.items()
    ]
    gap = {"update_proj_gap": 10**9} if name == "galore" else {}
    strategy = lowmem.create(name, **gap)
    return lowmem.LowMemOptimizer(groups, strategy, lr=1e-3, weight_decay=0.1, compile="on")


def advance(optimizer: Any, step: int) -> None:
    for group in optimizer.param_groups:
        group["step"], group["lr"] = step, 1e-3 / step
        for p in group["params"]:
            p.grad = torch.empty_like(p)
    optimizer.step()


def parameters(optimizer: Any) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """The policy of a card, kernels that only count, and no shortcut over blocks."""
    launches = Launches()

    def kernel(*_: Any) -> Any:
        def call(*_: Any) -> None:
            launches.kernels += 1

        return call

    def call(*_: Any) -> None:
        launches.kernels += 1

    for module in WALKING:
        monkeypatch.setattr(module, "walk", lambda blocks, device: blocks)
    monkeypatch.setattr(chunks.Chunks, "kernel", kernel)
    monkeypatch.setattr(passes.Passes, "call", call)
    with policy("cuda"):
        yield launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["adamw", "adamw_8bit", "lion"])
def test_a_large_tensor_is_one_launch_and_a_step_one_upload(
    name: str, dtype: torch.dtype, counted: Launches
) -> None:
    optimizer = optimizer_of(name, dtype)
    advance(optimizer, 1)
    with counted:
        advance(optimizer, 2)
    assert counted.kernels >= parameters(optimizer)
    assert counted.total <= 1.2 * parameters(optimizer)
    assert counted.ages <= 1
    assert counted.uploads <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_projected_matrix_is_few_launches(dtype: torch.dtype, counted: Launches) -> None:
    """Two products, the step inside, and a weight written as its product is made."""
    optimizer = optimizer_of("galore", dtype)
    advance(optimizer, 1)
    with counted:
        advance(optimizer, 3)  # at 2 a basis is looked for that was not found yet
    matrices = parameters(optimizer) - 1
    products = sum(counted.counts[name] for name in PRODUCTS)
    assert products >= 2 * matrices
    assert products + counted.kernels - 1 <= 6 * matrices
    assert counted.total - 1 <= 8 * matrices
    assert counted.uploads <= 1


def test_small_tensors_are_stepped_together(counted: Launches) -> None:
    """Norms and adapters: a few launches for many of them."""
    vectors = [(f"norm{i}", nn.Parameter(torch.empty(HIDDEN, device=META))) for i in range(128)]
    adapters = [(f"lora{i}", nn.Parameter(torch.empty(16, HIDDEN, device=META))) for i in range(64)]
    groups = [{"params": vectors, "role": "vector"}, {"params": adapters, "role": "matrix"}]
    optimizer = lowmem.LowMemOptimizer(groups, lowmem.create("adamw"), lr=1e-3, compile="on")
    advance(optimizer, 1)
    with counted:
        advance(optimizer, 2)
    assert counted.kernels == 1 + (64 * 16 * HIDDEN >> 21)
    assert counted.total <= 0.25 * parameters(optimizer)
    assert counted.uploads <= 1


GOES_BY_BLOCKS = {
    "adamw_4bit_rank1", "microadam", "smmf",
}  # fmt: skip
"""Methods whose launches still grow with the elements of a tensor.

A matrix that is as square as can be (smmf) and codes beside maxima of rows and columns (rank1) are cut where
bytes of bits begin, and stored by row blocks; the largest elements of blocks are looked for in 2^18 elements
at a time, for that is not compiled and takes eight times their memory (microadam).
"""
LAUNCHES = {
    "spam": 2, "adamw_4bit": 4, "adafactor": 7, "galore": 9, "golore": 9, "scale": 10, "gravity": 11,
    "adam_mini": 13, "grades": 13, "misa": 13, "apollo": 14, "dct": 14, "q_galore": 10, "mars": 16,
    "subset_norm": 17, "fira": 19, "grass_walk": 19, "novograd": 19, "subtrack": 19, "apollo_mini": 20,
    "ada_lomo": 21, "auon": 23, "lamb": 24, "tam": 24, "grass_jump": 30, "adam_cm": 31, "sm3": 31,
    "fadam": 32, "sgd_sai": 35, "subspace_momentum": 35, "came": 37, "ldog": 38, "lotus": 38,
    "stable_spam": 47, "dog": 50, "adamp": 51, "online_subspace": 56, "sinkgd": 25, "dion": 60,
    "frugal": 81, "sumo": 86, "fish_mask": 101, "muon": 112, "muon_8bit": 118, "ldadam": 139,
    "ada_muon": 160, "swan": 195, "mlorc": 239,
}  # fmt: skip
"""For a 4096 x 11008 gradient between refreshes, of vectors and numbers too; 1 for all others.

What is above 8: a product that is lifted has 90 MB in bf16, and is made and written in two pieces (galore, 4
of 9); a rest that is measured before it is a step takes the product twice (fira). An iteration of Newton and
Schulz is three products of the short side, each in two pieces and stored in place (muon, swan, sumo); X is
made in panels for the first product and the last. A basis or a moment that moves at every step takes QR and
products of its own (ldadam, mlorc, dion, online_subspace). Others work out numbers of a tensor one by one.
"""


def gradient_methods() -> list[str]:
    found = {name: lowmem.create(name) for name in lowmem.available()}
    return [name for name, one in found.items() if one.source.needs_autograd and not one.asks_loss]


@pytest.mark.parametrize("name", gradient_methods())
def test_every_method_keeps_to_its_launches(
    name: str, counted: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch for rules that go by elements; few, whatever the size, for those that measure first."""
    for module in WALKING if name in GOES_BY_BLOCKS else ():  # three blocks show what is uploaded
        monkeypatch.setattr(module, "walk", WALK)
    weight = nn.Parameter(torch.empty(HIDDEN, INNER, dtype=torch.bfloat16, device=META))
    group = {"params": [(NAME, weight)], "role": "matrix"}
    optimizer = lowmem.LowMemOptimizer([group], lowmem.create(name), lr=1e-3, weight_decay=0.1, compile="on")
    period = max(1, lowmem.create(name).rules["matrix"].period)
    between = next(t for t in range(17, 23) if period == 1 or (t + stagger(NAME, period)) % period)
    for step in (1, between - 1):
        advance(optimizer, step)
    with counted:
        advance(optimizer, between)
    assert max(counted.uploads, counted.ages) <= 1
    if name not in GOES_BY_BLOCKS:
        assert counted.total <= LAUNCHES.get(name, 1)
