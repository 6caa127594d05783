"""Compositions drawn by lot: what can be made can be planned, stepped, guarded, saved and made again.

One short run of a composition answers all of it, so that many can be drawn; a part that is new is drawn too.
"""

from __future__ import annotations

import pytest
import torch

from lowmem.optim.writers import Stochastic
from lowmem.training.contract.check import check
from tests.contract import cases
from tests.contract.cases import Case


def dtype_of(case: Case) -> torch.dtype:
    """Writers differ in 16 bits alone; the others take turns."""
    plain = case.create().writer == Stochastic() and sum(map(ord, str(case))) % 2
    return torch.float32 if plain else torch.bfloat16


@pytest.mark.parametrize("drawn", cases.drawn(), ids=str)
def test_what_can_be_made_holds_together(drawn: Case) -> None:
    """Names stagger the refreshes: in these steps every tensor has had one."""
    found = check(drawn.create(), dtype_of(drawn), steps=cases.GAP + 3)
    assert not [finding for finding in found if finding.problem]


def test_every_part_is_drawn() -> None:
    """Whatever is registered has its turn without being named here."""
    told = [dict(one.options) for one in cases.drawn()]
    for kind in ("projector", "rule", "residual", "writer", "schedule", "source"):
        names = {options.get(kind, cases.AXES[kind]) for options in told}
        assert names >= set(cases.of_kind(kind)), kind
    chosen = {name for options in told for name in str(options.get("modifiers", "")).split("+")}
    assert chosen >= set(cases.parts("modifier"))
    assert len(set(cases.drawn())) >= cases.DRAWS


@pytest.mark.parametrize("lot", range(0, 300, 3))
def test_what_cannot_be_made_says_so_in_one_line(lot: int) -> None:
    for one in (cases.draw(i) for i in range(lot, lot + 3)):
        for _, error in cases.refused([one]):
            assert len(str(error).splitlines()) == 1
            assert any(word in str(error) for word in ("take ", "choose", "leave", "give", "needs")), error
