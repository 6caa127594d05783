"""Strategies on one device: what ranks are compared with. And the loop that both go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lowmem
from lowmem.optim.contract import is_pointwise
from lowmem.optim.release import release
from tests.contract import cases
from tests.distributed.zoo import Zoo, gradient, loss_of
from tests.enrolled import FIRST, unlike

STEPS, BAD = 5, 2
LR = 0.02


def chosen(ranks: int = 3) -> list[tuple[cases.Case, torch.dtype]]:
    """A method of each make on two ranks, the first release's on more; in bf16 too where all is uneven."""
    dtypes = (torch.float32, torch.bfloat16) if ranks == 3 else (torch.float32,)
    names = unlike() if ranks == 2 else FIRST
    found = [case for case in cases.plain() if case.name in names]
    by_backward = [case for case in (*found, *EXTRA) if case.by_backward]
    summed = [(case, torch.float32) for case in SUMMED if ranks == 3]
    return [*((case, dtype) for case in by_backward for dtype in dtypes), *summed]


EXTRA = [
    cases.case("galore", proj_type="right", states="int8"),
    cases.case("galore", proj_type="left", on_refresh="rotate"),
    cases.case("galore", proj_type="right", rule="adafactor"),
    cases.case("galore", projector="svd"),
    cases.case("frugal", projector="randk"),
    cases.case("adafactor", beta1=0.9, scale_parameter=True),
    cases.case("adamw", modifiers="cautious+trust_ratio"),
    cases.case("adamw", states="bf16", writer="kahan"),
]


def walk(
    case: cases.Case, model: nn.Module, spread: Callable[[Tensor], Tensor], small: bool = False
) -> lowmem.LowMemOptimizer:
    """Take the steps; `spread` places a gradient as its parameter is placed; all tensors are `small`."""
    optimizer = case.optimizer(model, lr=LR)
    if small:
        rules = optimizer.strategy.rules
        optimizer.strategy = replace(optimizer.strategy, rules=dict.fromkeys(rules, rules["small"]))
    for step in range(STEPS):
        for i, p in enumerate(model.parameters()):
            p.grad = spread(gradient(tuple(p.shape), step, i, step == BAD).to(p.dtype))
        optimizer.step()
    return optimizer


def reference(case: cases.Case, dtype: torch.dtype) -> dict[str, Any]:
    """Weights of one device; under "small", those of tensors that follow the rule of small ones."""
    model = Zoo().to(dtype)
    optimizer = walk(case, model, lambda g: g)
    found: dict[str, Any] = {name: p.detach() for name, p in model.named_parameters()}
    found["nonfinite"] = torch.tensor(optimizer.nonfinite())
    found["decided"] = decided(optimizer)
    if "small" in case.create().rules:
        model = Zoo().to(dtype)
        walk(case, model, lambda g: g, small=True)
        found |= {f"small {name}": p.detach() for name, p in model.named_parameters()}
    return found


def decided(optimizer: lowmem.LowMemOptimizer) -> str:
    """What a schedule has decided; it follows from the gradients of all ranks."""
    return str(optimizer.param_groups[0]["decided"])


def alike(one: Any, other: Any) -> bool:
    """Whether two decisions are the same but for sums in another order."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    return bool(abs(one - other) <= REORDERED * abs(one)) if isinstance(one, float) else bool(one == other)


def exact(optimizer: lowmem.LowMemOptimizer, p: Tensor) -> bool:
    """Whether a tensor takes the bits of one device: by elements alone, or all of it on every rank."""
    seat, _ = optimizer.ready(p)
    rule = optimizer.strategy.rules[seat.rule_name]
    return seat.way != "rows" or (is_pointwise(rule) and not rule.measures)


def apart(optimizer: lowmem.LowMemOptimizer, p: Tensor, name: str) -> float:
    """How far steps may be apart, as a share of the way."""
    if exact(optimizer, p) and name not in TWO_PATHS:
        return 0.0
    return ROUNDED if dict(optimizer.strategy.options).get("products") == "bf16" else REORDERED


def cut(optimizer: lowmem.LowMemOptimizer, p: Tensor) -> bool:
    """Whether a tensor follows the rule of small ones because its shards do not start on a block."""
    ordinary = optimizer.strategy.rule_name(optimizer.place(p).role, p.shape)
    return optimizer.rule_name(p) == "small" != ordinary


SUMMED = [
    cases.case(name)
    for name in (
        "adamp",
        "came",
        "fadam",
        "gravity",
        "mars",
        "ada_muon",
        "adam_mini",
        "ldadam",
        "lotus",
        "sm3",
    )
] + [cases.case("muon", products="bf16")]
"""What is found of all rows by sums, maxima or products of a few columns, some ranks without any."""

REORDERED = 1e-4
"""How far apart fp32 steps may be whose sums have another order, as a share of the way."""
ROUNDED = 2e-2
"""The same of steps whose products are rounded to bf16."""
WORSE = 1.5
"""How much further from the steps in fp32 those in bf16 may be than on one device."""
TWO_PATHS = ("diffgrad",)
"""Torch's sigmoid takes another path for what is left of a vector, which differs in the last bit."""


def key(case: cases.Case, dtype: torch.dtype) -> str:
    """A file's name."""
    return f"{case!s}{str(dtype)[6:]}"


LOOPS = {
    "adamw": {},
    "galore": {"rank": 4, "update_proj_gap": 2},
    "muon": {},
    "mezo": {"eps_perturb": 0.01},
}
"""Methods that go through a whole loop, with a backward pass or without."""
RELEASED = ("adamw", "galore")
"""Those that step inside backward too."""


def advance(optimizer: lowmem.LowMemOptimizer, model: nn.Module, step: int) -> Tensor:
    """One step of a loop."""
    if optimizer.strategy.source.needs_autograd:
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()
    loss = optimizer.backward(lambda: loss_of(model, step), model)
    optimizer.step()
    return loss


def loop(name: str, model: nn.Module, clip: str) -> list[float]:
    """Losses, and the norms of gradients where each is clipped and released."""
    optimizer, told = lowmem.optimizer(model, name, lr=0.01, **LOOPS[name]), []
    handle = release(optimizer, clip=clip, max_norm=0.1) if clip else None
    for step in range(4):
        if handle is None:
            told.append(float(advance(optimizer, model, step)))
            continue
        loss = loss_of(model, step)
        loss.backward()
        assert all(p.grad is None for p in model.parameters()), "a gradient was not released"
        told += [float(loss.detach()), handle.grad_norm()]
        optimizer.step()
    return told
