"""The numbers of an age, such as bias corrections.

Rules compute them in plain Python from an integer. On the CPU the age is at hand.
On a card it is not, as reading it would wait for everything before it: there a
table holds the numbers of all ages that a run can have reached, made by the same
Python, and a row of it is looked up on the device. So all devices step by the
same bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

import torch
from torch import Tensor

from lowmem.optim.engine.cutting import sizes
from lowmem.optim.terms.hyper import Hyper

ROWS = 1024
"""Ages of the first table; when they are outgrown they double, as kernels are made for a length."""


class Numbered(Protocol):
    """What has numbers of an age; hashable, for they are kept."""

    def numbers(self, t: int, hp: Hyper) -> tuple[float, ...]:
        """The numbers of the step that makes moments t steps old."""


def numbers_of(rule: Numbered, age: Tensor | None, hp: Hyper) -> Tensor:
    """The numbers of a tensor's step, fp32: (k,), or (k, columns) where each column has an age.

    Args:
        rule: whose numbers; frozen.
        age: with this step, at most `hp.step` + 1; 0-D, one for each column, or None for a rule without
            one. Moments that have not moved have no numbers of use, and get those of their first step.
        hp: of this step.
    """
    if age is None or (sizes(age.device).at_hand and age.dim() == 0):
        t = 1 if age is None or age.is_meta else int(age)
        return hp.vector(*_row(rule, t, hp), dtype=torch.float32)
    if not sizes(age.device).at_hand:
        rows = table(rule, hp, age.device).index_select(0, age.view(-1))  # by a 0-D index it would be read
        return rows[0] if age.dim() == 0 else rows.t().contiguous()
    ages = [1] * age.numel() if age.is_meta else age.tolist()
    known = {t: _row(rule, t, hp) for t in set(ages)}
    return torch.tensor([known[t] for t in ages], dtype=torch.float32).t().contiguous().to(age.device)


def _row(rule: Numbered, t: int, hp: Hyper) -> tuple[float, ...]:
    return rule.numbers(max(1, t), hp) or (0.0,)


def table(rule: Numbered, hp: Hyper, device: torch.device) -> Tensor:
    """The numbers of a rule for the settings of a group, fp32, a row for each age from 0 on.

    Made anew where the run has outgrown it; on meta, where no age has a value, it does not grow.
    """
    tables: dict[Hashable, Tensor] = hp.constant.tables
    key, last = (rule, hp.betas, hp.eps, device), 0 if device.type == "meta" else hp.step + 1
    if key not in tables or tables[key].shape[0] <= last:
        if len(tables) > 64:  # a scheduler that moves the betas makes one for every step
            tables.clear()
        numbers = [_row(rule, t, hp) for t in range(max(ROWS, 1 << last.bit_length()))]
        tables[key] = torch.tensor(numbers, dtype=torch.float32).to(device, non_blocking=True)
    return tables[key]
