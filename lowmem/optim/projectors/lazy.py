"""A basis in 4 bits that is replaced less and less often (Q-GaLore, arXiv 2407.08296).

    of each 256 numbers of P in turn:  step = (max - min) / 15,  code = round((x - min) / step)
    similarity = |P_old' P_new|^2 / r  at a replacement,  likeness = (similarity - r / s) / (1 - r / s);
    the mean likeness of the last 5 at least `threshold`: the time to the next one doubles

The similarity is that of the two subspaces: 1 for the same, whatever the signs and the
order of their directions. The released code takes the cosine of the two first singular
vectors, whose signs are open, so that a subspace that has not moved may count as -1.
Subspaces that have nothing to do with each other have a similarity of r / s on average,
where s is the side: 0.4 or more at rank 128 of a side up to 320, and the basis would
stand still whatever comes. What counts is how far it lies beyond that. The code also
clamps the zero point, so that numbers of one sign lose their range; here the least
number itself is held. Two codes share a byte.

Whether it is time stands in the state, and nothing waits for the device to tell: a new
basis is found every `update_proj_gap` steps and dropped where it is not. What is saved is
bytes, not time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, matrix_shape
from lowmem.optim.engine.cutting import sizes
from lowmem.optim.projectors.dense import Orthonormal
from lowmem.optim.terms.changes import Change, Rotation, Unrelated
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import State, apply_in_place

GROUP = 256
"""Numbers of a basis that share a range."""
QUEUE = 5
"""Similarities that are remembered."""
LONGEST = 1 << 20
"""Gaps between replacements, at most."""


def quantized(basis: Tensor) -> State:
    """Codes, two in a byte, with the least number and the step of each group; vector by vector."""
    flat = basis.t().reshape(-1)
    groups = torch.nn.functional.pad(flat, (0, -flat.numel() % GROUP)).view(-1, GROUP)
    low, high = groups.aminmax(dim=1)
    step = (high - low).clamp(min=torch.finfo(torch.float32).tiny) / 15.0
    codes = ((groups - low[:, None]) / step[:, None]).round().to(torch.uint8).view(-1)
    codes = codes[: flat.numel() + flat.numel() % 2]
    return {"codes": codes[::2] * 16 + codes[1::2], "low": low, "step": step}


def dequantized(s: State, side: int, rank: int) -> Tensor:
    """The basis, (s, r) fp32."""
    codes = torch.stack((s["codes"] >> 4, s["codes"] & 15), dim=-1).view(-1)
    groups = torch.nn.functional.pad(codes, (0, -codes.numel() % GROUP)).view(-1, GROUP)
    values = torch.addcmul(s["low"][:, None], groups.float(), s["step"][:, None])
    return values.view(-1)[: side * rank].view(rank, side).t()


@dataclass(frozen=True)
class Lazy(Orthonormal):
    """A basis in 4 bits, replaced after 1, 2, 4, ... gaps once it no longer changes much.

    Holds ceil(s r / 2) + 8 ceil(s r / 256) + 28 bytes, s the side it spans. The basis is
    orthonormal up to the rounding. Workspace of a step beside R: 12 s r bytes.

    Args:
        frame, find, update_proj_gap: see `Orthonormal`.
        threshold: mean likeness from which the time to the next replacement doubles, above 0, at most 1.

    Raises:
        UserError: a number outside its range.

    Example:
        >>> from lowmem.optim.projectors.bases import Frame
        >>> Lazy(Frame(4)).init(torch.zeros(16, 64))["codes"].shape
        torch.Size([32])
    """

    threshold: float = 0.4
    orthonormal = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 < self.threshold <= 1.0:
            raise UserError(f"threshold must be above 0 and at most 1, got {self.threshold}")

    def init(self, x: Tensor) -> State:
        """The first r coordinate axes, to be replaced at once; similarities that no others make up for."""
        side, rank = self.frame.size(matrix_shape(x.shape))
        one = torch.ones((), dtype=torch.int32, device=x.device)
        return {
            **quantized(torch.eye(rank, side, device=x.device).t()),
            "similarity": torch.full((QUEUE,), -float(QUEUE), device=x.device),
            "gap": one,
            "left": one.clone(),
        }

    def store(self, s: State, new: Tensor, ok: Tensor, shape: tuple[int, int], *, say: bool) -> Change:
        """Hold a first basis where ok; what is known of those before it stays as it is."""
        held = {key: torch.where(ok, value, s[key]) for key, value in quantized(new).items()}
        apply_in_place(s, held)
        return Unrelated(ok)

    def renew(self, s: State, g: Blocks, hp: Hyper, inner: State, *, say: bool) -> Change:
        """Find a basis; take it if it is time."""
        old = self.opened(s, hp)["basis"]
        new, fine = self.find(self.frame, old, g, hp)
        ok = fine & (s["left"] <= 1)
        held = quantized(new)
        turn = dequantized(held, *old.shape).t() @ old
        similarity = s["similarity"]
        if not (hp.first or hp.step == 0):
            now = turn.square().sum() / turn.shape[0]
            similarity = torch.cat((similarity[1:], now[None]))
        alike = similarity.mean() >= self._least(*old.shape)
        doubled = torch.where(alike, s["gap"] * 2, s["gap"]).clamp(max=LONGEST)
        gap = torch.where(ok, doubled, s["gap"])
        left = torch.where(ok, gap, (s["left"] - 1).clamp(min=1))
        fresh = {**held, "similarity": similarity}
        fresh = {key: torch.where(ok, value, s[key]) for key, value in fresh.items()}
        apply_in_place(s, {**fresh, "gap": gap, "left": left})
        eye = torch.eye(turn.shape[0], device=turn.device)
        return Rotation(ok, torch.where(ok, turn, eye), self.axis(g.shape))

    def _least(self, side: int, rank: int) -> float:
        """The mean similarity at which the mean likeness is `threshold`; a whole side is always alike."""
        chance = rank / side if rank < side else 0.0
        return chance + self.threshold * (1.0 - chance)

    def opened(self, s: State, hp: Hyper) -> State:
        """The basis, decoded once for a step."""
        side, rank = self.frame.size(hp.weight.shape)
        if sizes(hp.weight.device).at_hand:
            return {"basis": dequantized(s, side, rank)}
        basis = torch.empty(rank, side, device=hp.weight.device).t()
        hp.reckon(_note_basis, (s["codes"], s["low"], s["step"], basis), (side, rank))
        return {"basis": basis}


def _note_basis(codes: Tensor, low: Tensor, step: Tensor, basis: Tensor, side: int, rank: int) -> None:
    basis.copy_(dequantized({"codes": codes, "low": low, "step": step}, side, rank))
