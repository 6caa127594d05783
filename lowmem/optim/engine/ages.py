"""The numbers of an age, such as bias corrections.

Rules compute them in plain Python from an integer. On the CPU the age is at hand.
On a device it is not, as reading it would wait for everything before it: there a
table holds the numbers of all ages that a run can have reached, made by the same
Python, and a row of it is looked up on the device. So all devices step by the
same bits. Only what depends on the age is in the table, 8 bytes a step for Adam.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowmem.optim.hyper import Hyper

ROWS = 1024
"""The table grows by so many ages."""
HOST = ("cpu", "meta")
"""Where an age is at hand, or has no value."""


class Numbered(Protocol):
    """What has numbers of an age; hashable, for they are kept."""

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """The numbers of the step that makes moments t steps old."""


@dataclass(frozen=True)
class Table:
    """The numbers of all ages on one device.

    Args:
        fixed: (k,) the numbers; those that depend on the age hold anything.
        places: where those are, (v,) int64.
        rows: (ages, v), one for each age from 0 on.
    """

    fixed: Tensor
    places: Tensor
    rows: Tensor


def numbers_of(rule: Numbered, age: Tensor | None, hp: Hyper) -> Tensor:
    """The numbers of a tensor's step, fp32: (k,), or (k, columns) where each column has an age.

    Args:
        rule: whose numbers; frozen.
        age: with this step, at most `hp.step` + 1; 0-D, one for each column, or None for a rule without
            one. Moments that have not moved have no numbers of use, and get those of their first step.
        hp: of this step.
    """
    if age is None or (age.device.type in HOST and age.dim() == 0):
        t = 1 if age is None or age.is_meta else int(age)
        return hp.vector(*_row(rule, t, hp), dtype=torch.float32)
    if age.device.type in HOST:
        ages = [1] * age.numel() if age.is_meta else age.tolist()
        known = {t: _row(rule, t, hp) for t in set(ages)}
        return torch.tensor([known[t] for t in ages], dtype=torch.float32).t().contiguous().to(age.device)
    table = _table(rule, hp, age.device)
    rows = table.rows.index_select(0, age.view(-1))  # indexing by a 0-D tensor would read it
    if age.dim() == 0:
        return table.fixed.index_copy(0, table.places, rows[0])
    return table.fixed[:, None].repeat(1, age.shape[0]).index_copy(0, table.places, rows.t())


def _row(rule: Numbered, t: int, hp: Hyper) -> tuple[float, ...]:
    return rule.numbers(max(1, t), hp) or (0.0,)


def _table(rule: Numbered, hp: Hyper, device: torch.device) -> Table:
    """The table of a rule for the settings of a group, made anew where the run has outgrown it."""
    tables: dict[Hashable, Table] = hp.constant.tables
    key = (rule, hp.betas, hp.eps, device)
    if key not in tables or tables[key].rows.shape[0] < hp.step + 2:
        if len(tables) > 64:  # a scheduler that moves the betas makes one for every step
            tables.clear()
        tables[key] = _made(rule, hp, device, ((hp.step + 1) // ROWS + 1) * ROWS)
    return tables[key]


def _made(rule: Numbered, hp: Hyper, device: torch.device, count: int) -> Table:
    numbers = [_row(rule, t, hp) for t in range(count)]
    whole = torch.tensor(numbers, dtype=torch.float32)
    moves = (whole != whole[0]).any(0)
    return Table(whole[0].to(device), moves.nonzero()[:, 0].to(device), whole[:, moves].to(device))
