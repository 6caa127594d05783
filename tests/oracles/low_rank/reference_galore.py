"""GaLore, written out (arXiv 2403.03507, algorithm 2): Adam on an SVD-projected gradient.

Every `gap` steps, the first included: U, S, V^T = svd(G); the basis P is the first r
columns of U (m < n, "left") or of V (m >= n, "right"): the short side is projected.
    R = P^T G  (or G P);   N = Adam(R), the moments being kept over a refresh
    W <- W - lr scale P N  (or N P^T)
Epsilon is added after the bias correction (torch's convention); `official_eps=True`
gives the convention of the published code, and `decay_after=True` its order of decay.
`align=True` flips the columns of a new basis so that each agrees in sign with the same
column of the old one: an SVD fixes its vectors only up to sign, and the kept moments
refer to the old signs. `bases`, if given, replaces the SVD: one basis for each refresh.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


def svd_basis(g: Tensor, rank: int) -> Tensor:
    """The leading singular vectors of the short side, as columns."""
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    return u[:, :rank] if g.shape[0] < g.shape[1] else vt[:rank].mT


@dataclass
class GaLore:
    """One matrix under GaLore; `w` is the weight, `step(g)` moves it."""

    w: Tensor
    rank: int
    gap: int = 200
    scale: float = 1.0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    align: bool = False
    official_eps: bool = False
    decay_after: bool = False
    on_refresh: str = "keep"
    basis: Callable[[Tensor, int], Tensor] = svd_basis
    due: Callable[[int], bool] | None = None
    t: int = field(init=False, default=0)
    age: int = field(init=False, default=0)
    p: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.w = self.w.detach().clone()
        self.rank = min(self.rank, *self.w.shape)
        self.left = self.w.shape[0] < self.w.shape[1]

    def down(self, g: Tensor) -> Tensor:
        assert self.p is not None
        return self.p.mT @ g if self.left else g @ self.p

    def up(self, low: Tensor) -> Tensor:
        assert self.p is not None
        return self.p @ low if self.left else low @ self.p.mT

    def refresh(self, g: Tensor) -> None:
        new = self.basis(g, self.rank)
        if self.p is None:
            self.p = new
            self.m = self.v = torch.zeros_like(self.down(g))
            return
        change = self.p.mT @ new
        if self.align:
            new, change = new * change.diagonal().sign(), change * change.diagonal().sign()
        self.p = new
        if self.on_refresh == "reset":
            self.m, self.v, self.age = torch.zeros_like(self.m), torch.zeros_like(self.v), 0

    def step(self, g: Tensor) -> Tensor:
        g = g.to(self.w)
        due = self.due(self.t) if self.due else self.t % self.gap == 0
        if self.p is None or due:
            self.refresh(g)
        self.t, self.age = self.t + 1, self.age + 1
        (b1, b2), low = self.betas, self.down(g)
        self.m = b1 * self.m + (1 - b1) * low
        self.v = b2 * self.v + (1 - b2) * low * low
        root = (1 - b2**self.age) ** 0.5
        denominator = self.v.sqrt() / root + (self.eps / root if self.official_eps else self.eps)
        update = self.scale * self.up(self.m / (1 - b1**self.age) / denominator)
        decay = 1 - self.lr * self.weight_decay
        if self.decay_after:
            self.w = (self.w - self.lr * update) * decay
        else:
            self.w = self.w * decay - self.lr * update
        return self.w
