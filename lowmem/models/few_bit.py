"""Activation functions that keep a few bits for their backward pass (arXiv 2202.00441).

    y = f(x),    dL/dx = q(x) dL/dy,    q = the best step function of 2^bits levels for f'

f is exact, its derivative is one of a few levels: instead of x, in 16 bits, the number of the interval
that x lies in is kept. Borders and levels minimise the integral of (f' - q)^2 over [-10, 10] exactly, by
dynamic programming on a grid; beyond it the outermost levels go on. Of a piecewise linear f nothing is lost.

An activation of n elements keeps bits n / 8 bytes instead of 2 n (4 n in fp32). Where a product
follows, as in gated layers, its two factors are kept as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from lowmem.errors import UserError

BITS = (1, 2, 3, 4)
SPAN, POINTS = 10.0, 801
PIECE = 1 << 20
"""Elements that are packed at once."""


class FewBit(nn.Module):
    """An elementwise function whose backward pass reads `bits` per element.

    Args:
        function: the module that it takes the place of; without parameters.
        bits: 1 to 4.

    Example:
        >>> silu = FewBit(nn.SiLU(), bits=4)
        >>> x = torch.linspace(-3, 3, 5, requires_grad=True)
        >>> silu(x).sum().backward()
        >>> [round(float(g), 1) for g in (x.grad[0], x.grad[-1])]  # silu' is -0.09 and 1.09
        [-0.1, 1.1]
    """

    borders: Tensor
    levels: Tensor

    def __init__(self, function: nn.Module, bits: int) -> None:
        super().__init__()
        self.function, self.bits = function, bits
        borders, levels = table(function, bits)
        self.register_buffer("borders", torch.tensor(borders), persistent=False)
        self.register_buffer("levels", torch.tensor(levels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """f(x)."""
        out = _Kept.apply(x, self.function, self.borders, self.levels, self.bits)  # type: ignore[no-untyped-call]
        return cast(Tensor, out)


def keep_few_bits_(model: nn.Module, bits: int) -> int:
    """Put `FewBit` in the place of every activation function of a model; how many.

    Args:
        model: of transformers; bits: 1 to 4.

    Raises:
        UserError: it has none that is a module of its own.
    """
    kinds = _kinds()
    made: dict[nn.Module, FewBit] = {}
    for module in list(model.modules()):
        if isinstance(module, FewBit):
            continue
        for name, child in list(module.named_children()):
            if type(child) in kinds:
                setattr(module, name, made.setdefault(child, FewBit(child, bits)))
    if not made:
        raise UserError(
            "few_bit: this model's activation functions are no modules of their own; leave it out"
        )
    return len(made)


Table = tuple[tuple[float, ...], tuple[float, ...]]
_TABLES: dict[tuple[str, str, int], Table] = {}


def table(function: nn.Module, bits: int) -> Table:
    """Borders and levels of the best step function for a derivative.

    Args:
        function: elementwise; bits: 2^bits levels.
    """
    own = {name: value for name, value in vars(function).items() if name[0] != "_"}
    key = (type(function).__qualname__, repr(own), bits)
    if key not in _TABLES:
        with _disable_current_modes(), torch.enable_grad(), torch.device("cpu"):
            _TABLES[key] = _fitted(function, bits)
    return _TABLES[key]


def _fitted(function: nn.Module, bits: int) -> Table:
    x = torch.linspace(-SPAN, SPAN, POINTS, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x)
    starts, middle = steps(slope, 2**bits), (x[1:] + x[:-1]).detach() / 2
    ends = [*starts[1:], POINTS]
    levels = tuple(float(slope[i:j].mean()) for i, j in zip(starts, ends, strict=True))
    return tuple(float(middle[i - 1]) for i in starts[1:]), levels


def steps(values: Tensor, count: int) -> list[int]:
    """Where the pieces begin of the step function that is nearest to a sequence, in squares.

    Args:
        values: (n,) fp64; count: most pieces.

    Example:
        >>> steps(torch.tensor([0.0, 0.0, 1.0, 1.0, 5.0], dtype=torch.float64), 3)
        [0, 2, 4]
    """
    n = values.numel()
    one, two = (torch.cat([values.new_zeros(1), x.cumsum(0)]) for x in (values, values.square()))
    i, j = torch.arange(n + 1)[:, None], torch.arange(n + 1)[None]
    error = two[j] - two[i] - (one[j] - one[i]).square() / (j - i).clamp(min=1)
    error = torch.where(j > i, error.clamp(min=0), torch.inf)
    best, choices = error[0], []
    for _ in range(min(count, n) - 1):
        longer, at = (best[:, None] + error).min(0)
        keep = best <= longer + 1e-12
        choices.append(torch.where(keep, -1, at))
        best = torch.where(keep, best, longer)
    starts, end = list[int](), n
    for chosen in reversed(choices):
        if (at_end := int(chosen[end])) > 0:
            starts.insert(0, at_end)
            end = at_end
    return [0, *starts]


def packed(codes: Tensor, bits: int) -> Tensor:
    """Numbers below 2^bits, (n,), as bytes: `bits` for each eight of them.

    >>> packed(torch.tensor([1, 2, 3, 0, 0, 0, 0, 3]), 2).tolist()
    [57, 192]
    """
    short = -codes.numel() % 8
    groups = nn.functional.pad(codes.long(), (0, short)).view(-1, 8)
    word = (groups << (bits * torch.arange(8, device=codes.device))).sum(1)
    return (word[:, None] >> (8 * torch.arange(bits, device=codes.device)) & 255).to(torch.uint8).view(-1)


def unpacked(held: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` numbers of `packed`, int64."""
    word = (held.view(-1, bits).long() << (8 * torch.arange(bits, device=held.device))).sum(1)
    places = bits * torch.arange(8, device=held.device)
    codes: Tensor = (word[:, None] >> places & (2**bits - 1)).view(-1)
    return codes[:count]


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, function: nn.Module, borders: Tensor, levels: Tensor, bits: int
    ) -> Tensor:
        flat = x.detach().reshape(-1)
        ctx.save_for_backward(
            torch.cat([packed(torch.bucketize(part.float(), borders), bits) for part in _pieces(flat)]),
            levels,
        )
        ctx.bits = bits
        return cast(Tensor, function(x))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        held, levels = ctx.saved_tensors
        out, at = torch.empty_like(grad, memory_format=torch.contiguous_format), 0
        for part, into in zip(_pieces(grad.reshape(-1)), _pieces(out.view(-1)), strict=True):
            size = -(-part.numel() // 8) * ctx.bits
            codes = unpacked(held[at : at + size], ctx.bits, part.numel())
            torch.mul(part, levels[codes].to(part.dtype), out=into)
            at += size
        return out, None, None, None, None


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    yield from (flat[at : at + PIECE] for at in range(0, max(flat.numel(), 1), PIECE))


def _kinds() -> set[type[Any]]:
    """Classes of activation functions that transformers' layers are made with."""
    from transformers.activations import ACT2CLS

    found = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
    return {kind for kind in found if isinstance(kind, type) and issubclass(kind, nn.Module)}
