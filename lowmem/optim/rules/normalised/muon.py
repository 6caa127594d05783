"""Muon: the momentum, with its singular values made equal (arXiv 2502.16982).

    M <- M + (1 - momentum)(G - M)
    X = M, or (1 - momentum) G + momentum M (Nesterov), over its Frobenius norm
    5 times:  A = X X',  X <- (a + b A + c A^2) X,   (a, b, c) = (3.4445, -4.7750, 2.0315)
    W <- (1 - lr wd) W - lr s X,   s = 0.2 sqrt(max(m, n)) or sqrt(max(1, m / n))

Every X on the way is a polynomial T of the first Gram matrix times the first X. So the
iteration runs on matrices of the short side alone, and the last product, T X, is made
block by block while it is written: no copy of the weight's size exists. The momentum is
read by blocks as it is held, may have any precision, and is stored after the write:
the step is taken from the momentum before it is encoded.

Short sides without gradient are left alone: singular values below 1e-3 of the norm
are not raised to one in five iterations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.errors import UserError, nearest
from lowmem.optim.blocks import PANEL, Blocks, Dense, Direction, Slice
from lowmem.optim.codecs.blockwise import Codec, codec
from lowmem.optim.codecs.blockwise import Floats as Uncoded
from lowmem.optim.codecs.linear import Linear
from lowmem.optim.contract import SCRATCH, Rule
from lowmem.optim.engine.cutting import walk
from lowmem.optim.formulas import Formula, Made
from lowmem.optim.held import HeldMoment, tables
from lowmem.optim.rules.normalised import schulz
from lowmem.optim.shards import Shape, shard_in, total, whole
from lowmem.optim.terms.changes import Change, Rotation
from lowmem.optim.terms.fp32 import TINY
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Constants, State, part, prefixed

SCALES = ("rms", "aspect")
PRODUCTS = ("fp32", "bf16")
STEP = (3.4445, -4.7750, 2.0315)
"""(a, b, c): five such steps make all singular values above 1e-3 of the norm about one."""


@dataclass(frozen=True)
class Muon(Rule):
    """Momentum with equal singular values, for matrices.

    Bytes for an (m, n) weight: what the codec takes (4 m n in fp32, m n in 8 bits).
    Workspace: 12 s^2 bytes beside that of every step, s the short side, or 2 m n + 6 s^2 with products of
    bf16; where rows are spread, and there are no more of them than columns, 4 m n for all of X on every rank.

    Args:
        held: codec of the momentum.
        momentum: share of the old momentum, in [0, 1).
        nesterov: look ahead by the fresh gradient.
        iterations: of Newton and Schulz; 0 for the exact factor, by eigenvectors of the Gram matrix.
        scaling: rms (steps as long as AdamW's) or aspect (longer for tall matrices only).
        sign: make the signs of the momentum orthogonal, instead of itself.
        products: precision of those of Newton and Schulz, fp32 or bf16, see `schulz`.

    Raises:
        UserError: a number or word outside its range, or bf16 products where there are none.

    Example:
        >>> sorted(Muon.of("int8").init(torch.zeros(3, 5)))
        ['momentum.codes', 'momentum.scale']
    """

    held: Codec = field(default_factory=lambda: Uncoded(stream="momentum"))
    momentum: float = 0.95
    nesterov: bool = True
    iterations: int = 5
    scaling: str = "rms"
    sign: bool = False
    products: str = "fp32"
    reads_later: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        bad = {
            f"momentum must be in [0, 1), got {self.momentum}": not 0.0 <= self.momentum < 1.0,
            f"iterations must be at least 0, got {self.iterations}": self.iterations < 0,
            f"unknown scaling {self.scaling!r}; {nearest(self.scaling, SCALES)}": self.scaling not in SCALES,
            f"unknown products {self.products!r}; {nearest(self.products, PRODUCTS)}": (
                self.products not in PRODUCTS
            ),
            "products='bf16' has no effect on eigenvectors (iterations=0); leave one of the two out": (
                self.products == "bf16" and self.iterations == 0
            ),
        }
        if any(bad.values()):
            raise UserError("; ".join(sentence for sentence, wrong in bad.items() if wrong))

    @classmethod
    def of(
        cls, states: str, *, momentum: float = 0.95, nesterov: bool = True, iterations: int = 5,
        scaling: str = "rms", codes: str = "dynamic", sign: bool = False, products: str = "fp32",
    ) -> Muon:  # fmt: skip
        """Muon with its momentum held as `states` says, and 8-bit codes `dynamic` or `linear`.

        Raises:
            UserError: linear codes of another precision; a number or word outside its range.
        """
        held = codec(states, signed=True, stream="momentum")
        if codes == "linear":
            if states != "int8":
                raise UserError(f"codes='linear' are of states='int8', got {states!r}; take one of the two")
            held = Linear()
        return cls(held, momentum, nesterov, iterations, scaling, sign, products)

    @property
    def uses(self) -> frozenset[str]:
        """Neither."""
        return frozenset()

    def scratch(self, shape: tuple[int, int]) -> int:
        """Three matrices of the short side; with products of bf16 X, and three of half the size."""
        return SCRATCH + (schulz.scratch(shape) if self.products == "bf16" else 12 * min(shape) ** 2)

    def init(self, x: Tensor) -> State:
        """A momentum of zero."""
        return prefixed("momentum", self.held.init(x))

    def constants(self, shape: tuple[int, ...]) -> Constants:
        """The codec's tables."""
        return tables(self.held)

    def update(self, g: Blocks, s: State, hp: Hyper) -> Direction:
        """Find the polynomial; the product with X is left to the write."""
        moment = HeldMoment(self.held, part(s, "momentum"), s, g.shape, hp)
        seen: Blocks = Formula(Seen(self.momentum, self.nesterov), (g, moment))
        top = hp.peak(seen)
        ok = top <= torch.finfo(torch.float32).max
        # scaled by its largest element, so that no square overflows or vanishes
        x = Formula(torch.div, (seen,), across=(torch.where(ok & (top > TINY), top, 1.0),))
        if self.sign:  # once it is known to be finite: signs are
            x = Formula(torch.sign, (x,))
        commit = moment.following(g, 1.0 - self.momentum, ok)
        return Direction(self._made(hp.seen(x), ok), scale=self._scale(whole(g.shape)), ok=ok, commit=commit)

    def shards(self, shape: Shape) -> bool:
        """Where shards start on a block: Gram matrices of columns are summed, those of rows need all of X."""
        return self.iterations > 0 and shape.shard.starts_on(self.held.grain)

    def _made(self, x: Blocks, ok: Tensor) -> Blocks:
        """X with equal singular values; of the rows held here."""
        (m, n), shard = whole(x.shape), shard_in(x.shape)
        if not self.iterations:
            return Product(polar(x.map(lambda rows: torch.where(ok, rows, 0.0))), x)
        if shard is None or m > n:
            return self._factor(x, x.panel, functools.partial(total, x.shape))
        every = Dense(shard.gathered(torch.cat([x.rows(i, j) for i, j in x.ranges()])))
        return Slice(self._factor(every, x.panel, lambda found: found), shard.shape)

    def _factor(self, x: Blocks, panel: int, sums: Callable[[Tensor], Tensor]) -> Blocks:
        """X with equal singular values; `sums` adds up what was found of the rows here."""
        if self.products == "bf16":
            (m, n), steps = whole(x.shape), [STEP] * self.iterations
            return Dense(schulz.rounded(x, steps, panel, m > n, sums), shape=x.shape)
        return Product(self._polynomial(sums(gram(x)), panel), x)

    def _polynomial(self, a: Tensor, panel: int) -> Tensor:
        """T with X after the iterations = T X, from A = X X' (used up), and the division by |X|."""
        return schulz.polynomial(a, a.diagonal().sum().sqrt() + 1e-7, [STEP] * self.iterations, panel)[0]

    def check_rebase(self, kind: str) -> None:
        """A momentum is linear: it rotates, where it is held as it is."""
        if kind == "rotate" and self.held != Uncoded(stream="momentum"):
            raise UserError(
                "on_refresh='rotate' needs states='fp32'; take states='fp32' or on_refresh='keep'"
            )
        if kind != "rotate":
            super().check_rebase(kind)

    def rebase_(self, s: State, change: Change, shape: tuple[int, int], hp: Hyper) -> None:
        """Forget, or rotate."""
        if isinstance(change, Rotation):
            s["momentum"].copy_(change(s["momentum"]))
        else:
            super().rebase_(s, change, shape, hp)

    def _scale(self, shape: tuple[int, int]) -> float:
        m, n = shape
        return 0.2 * math.sqrt(max(m, n)) if self.scaling == "rms" else math.sqrt(max(1.0, m / n))


@dataclass(frozen=True)
class Seen:
    """What is made orthogonal: the momentum after this gradient, or a look ahead of it."""

    momentum: float
    nesterov: bool

    def __call__(self, new: Tensor, old: Tensor) -> Tensor:
        """Of rows of the gradient and of the momentum before it."""
        average = old + (1.0 - self.momentum) * (new - old)
        return new + self.momentum * (average - new) if self.nesterov else average


def panels(x: Blocks) -> list[tuple[int, int]]:
    """Row ranges of at most `PANEL` elements."""
    height = max(1, PANEL // x.shape[1])
    return [(i, min(x.shape[0], i + height)) for i in range(0, x.shape[0], height)]


def whole_rows(x: Blocks, i: int, j: int) -> Tensor:
    """Rows i..j as one tensor, looked at block by block."""
    out = torch.empty(j - i, x.shape[1], device=x.device)
    height = max(1, (1 << 20) // x.shape[1])
    for a in range(i, j, height):
        b = min(j, a + height)
        out[a - i : b - i] = x.rows(a, b)
    return out


def gram(x: Blocks) -> Tensor:
    """X X' of a wide matrix, X' X of a tall one; (s, s) fp32."""
    m, n = whole(x.shape)
    out = torch.zeros(min(m, n), min(m, n), device=x.device)
    if m > n:
        for i, j in walk(x.ranges(), x.device):
            rows = x.rows(i, j)
            out.addmm_(rows.t(), rows)
            del rows  # before the next ones are made
        return out
    strips = x.strips()
    for a, b in walk(strips, x.device):
        strip = x.columns(a, b)
        out.addmm_(strip, strip.t())
        del strip  # before the next one is made
    for i, j in walk([] if strips else panels(x), x.device):
        panel = whole_rows(x, i, j)
        for a, b in walk(x.ranges(), x.device):
            out[i:j, a:b] = panel @ x.rows(a, b).t()
    return out


class Product(Made):
    """T X of a wide matrix, X T of a tall one, made where it is looked at.

    A row of T X takes all of X: so many rows are made at once, and kept until others are asked for.

    Args:
        polynomial: T, (s, s); x: X, (m, n).
    """

    def __init__(self, polynomial: Tensor, x: Blocks) -> None:
        super().__init__(x.shape, None, x.device, takes=16 if x.panel == PANEL else 4)
        self.polynomial, self.x = polynomial, x
        self._first, self._panel = 0, torch.empty(0, x.shape[1], device=x.device)

    def rows(self, i: int, j: int) -> Tensor:
        """Rows i..j; cheap where they are asked for in order."""
        m, n = whole(self.shape)
        if m > n:
            return self.x.rows(i, j) @ self.polynomial
        if not self._first <= i <= j <= self._first + self._panel.shape[0]:
            self._make(i, j)
        return self._panel[i - self._first : j - self._first]

    def made(self, i: int, j: int) -> Tensor:
        """Rows i..j."""
        return self.rows(i, j)

    def most(self, made: int) -> int:
        """Elements that are made at once: two of three matrices of the short side are gone by then.

        Of a tall matrix as many of X are beside them; of a wide one, what `Seen` makes at once.
        """
        m, n = whole(self.shape)
        gone = 8 * self.polynomial.numel()
        return (max(made // 2, gone // 2) if m > n else max(made // 4, gone)) // self.takes

    def _make(self, i: int, j: int) -> None:
        self._panel = torch.empty(0, self.shape[1], device=self.device)  # before another is made
        most = PANEL if self.x.panel == PANEL else self.most(4 * self.x.panel)
        last = min(self.shape[0], max(j, i + max(1, most // self.shape[1])))
        self._first = i
        self._panel = torch.zeros(last - i, self.shape[1], device=self.device)
        for a, b in walk(self.x.ranges(), self.device):
            self._panel.addmm_(self.polynomial[i:last, a:b], self.x.rows(a, b))


def polar(x: Blocks) -> Tensor:
    """T with T X the orthogonal factor of X on its range, (s, s); X T of a tall one.

    A Gram matrix knows singular values below 3e-4 of the largest by rounding noise alone. They are raised
    as if they were that, and what comes out, in which they are large, is made orthogonal once more: they
    become one as well, and their directions mix a little.

    Args:
        x: finite; singular values below 3e-7 of the largest become 0.
    """
    first = _inverse_root(gram(x), 1e-7, 1.0)
    second = _inverse_root(gram(Product(first, x)), 1e-6, 0.0)
    whole: Tensor = second @ first if x.shape[0] <= x.shape[1] else first @ second
    return whole


def _inverse_root(a: Tensor, floor: float, below: float) -> Tensor:
    """A^(-1/2) of A (s, s); for eigenvalues below the floor, `below` times that of the floor.

    Args:
        floor: share of the largest eigenvalue.
    """
    values, vectors = torch.linalg.eigh(a)
    least = (floor * values[-1]).clamp(min=TINY)
    roots = torch.where(values > least, values, least).rsqrt()
    half = torch.where(values > least, roots, below * roots).sqrt()
    vectors.mul_(half)
    root: Tensor = vectors @ vectors.t()
    return root
