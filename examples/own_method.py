"""A rule of your own, with every projector, precision and modifier that lowmem has.

python examples/own_method.py
"""

from dataclasses import dataclass

import torch
from torch import nn

import lowmem
import lowmem.strategies as strategies
from lowmem.optim.elementwise import Elementwise, Moment


@dataclass(frozen=True)
class Heavy(Elementwise):
    """The sign of a heavy ball."""

    moments = {"exp_avg": Moment(signed=True)}  # noqa: RUF012
    ages, uses = False, frozenset({"betas"})

    def numbers(self, t, hp):
        """What the arithmetic needs of this step's settings."""
        return (hp.betas[0],)

    def move(self, g, m, x):
        """The new moments."""
        return {"exp_avg": m["exp_avg"] * x.numbers[0] + g}

    def direction(self, g, m, old, x):
        """The step, before the learning rate."""
        return m["exp_avg"].sign()


@strategies.part("rule")
def heavy():
    """The sign of a heavy ball."""
    return Heavy()


model = nn.Linear(64, 64)
optimizer = lowmem.optimizer(
    model, "galore", lr=1e-3, rule="heavy", states="int8", rank=8, modifiers="cautious"
)
model(torch.ones(2, 64)).square().sum().backward()
optimizer.step()
print(optimizer.strategy, f"holds {optimizer.state_bytes():,} bytes")
