"""Slopes by forward differentiation: exact, from one pass, without a backward one (arXiv 2202.08587).

    c = d/dt L(w + t z) at t = 0,    G = c z,    E G = grad L

Each weight carries its direction z through the forward pass as a tangent, and the loss
arrives with its slope. There is no radius, so no bias and no difference of two nearly
equal numbers: a 16-bit loss will do. Nothing is saved for a backward pass, but every
operation works twice, and the directions of all weights are held while it runs.

A tangent belongs to the weight itself: whoever reads it, by whatever module, takes it along. Its values
are copied onto themselves, bit for bit. Operations without a rule for tangents (fused attention, 4-bit
products, an objective that is no arithmetic) are refused by name; attention is written out meanwhile.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowmem.errors import UserError, first_line
from lowmem.optim.source import Named, Query
from lowmem.sources.directions import Perturbation
from lowmem.sources.replicas import mean
from lowmem.sources.slopes import (
    NOISES,
    Along,
    Evidence,
    Slope,
    bounded,
    evaluating,
    is_hollow,
    one_number,
    refuse_compiled,
    values,
)
from lowmem.sources.spread import is_spread
from lowmem.sources.structures import Free, Structure


@dataclass(frozen=True)
class ForwardGradient(Along):
    """The loss's exact slope along random directions.

    Args:
        noise: gaussian, or rademacher (signs).
        queries: directions of one evaluation, averaged; a forward pass with tangents each.
        clip: a slope ends at plus and minus this; 0 for never.
        structure: which directions are drawn.

    Raises:
        UserError: a number outside its range, or unknown noise.

    Bytes while it runs: the size of all trainable weights for their directions, and two activations for one.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> params = list(model.named_parameters())
        >>> _, ((slope, z),) = ForwardGradient().backward(
        ...     params, lambda: model(torch.ones(1, 2)).sum(), model=model, query=Query(0, 0)
        ... )
        >>> abs(slope - float(z.draw("weight", params[0][1], 0, 2).sum())) < 1e-6
        True
    """

    noise: str = "gaussian"
    queries: int = 1
    clip: float = 0.0
    structure: Structure = field(default_factory=Free)
    needs_autograd: bool = False
    fused: bool = False

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise UserError(f"queries is a number of directions, at least 1, got {self.queries}")
        if self.noise not in NOISES:
            raise UserError(f"noise is {' or '.join(NOISES)}, got {self.noise!r}")
        if not 0.0 <= self.clip < math.inf:
            raise UserError(f"clip_slope bounds a slope, above 0, or is 0 for no bound; got {self.clip}")

    def unspread(self) -> str:
        """All of it: rows that ranks hold are gathered past their tangents."""
        return "forward_gradient: sharded weights take no tangents; use mezo"

    def backward(
        self, params: Named, loss_fn: Callable[[], Tensor], *, model: nn.Module | None, query: Query
    ) -> tuple[Tensor, Evidence]:
        """Evaluate the loss with a tangent, once for each direction.

        Args:
            params: names and trainable parameters; a tied one has one name and one z.
            loss_fn: a scalar made of the weights by operations that know tangents.
            model: is put into eval mode; without it turning dropout off is up to the caller.
            query: names the directions.

        Returns:
            The mean of the losses, and the slopes.

        Raises:
            UserError: a compiled model, sharded weights, a loss that is not a scalar, or an operation without
                tangents.
        """
        refuse_compiled(model)
        if is_spread(params):
            raise UserError(self.unspread())
        directions = [self.direction(query, k) for k in range(self.queries)]
        with torch.no_grad(), evaluating(model):
            found = torch.stack([_evaluated(params, loss_fn, z) for z in directions])
        both = mean(found.reshape(-1)).view(-1, 2)
        usable = all(map(math.isfinite, values(both[:, 0])))
        slopes = [bounded(c if usable else math.nan, self.clip) / self.queries for c in values(both[:, 1])]
        return both[:, 0].mean().float(), tuple(map(Slope, slopes, directions))


def _evaluated(params: Named, loss_fn: Callable[[], Tensor], z: Perturbation) -> Tensor:
    """Loss and slope along a direction, in double precision."""
    _load()
    with _written_out(), forward_ad.dual_level(), _tangents(params, z):
        try:
            loss = loss_fn()
        except (NotImplementedError, RuntimeError) as error:
            if "forward AD" not in str(error) and "forward mode" not in str(error):
                raise
            raise UserError(
                f"forward_gradient: {first_line(error)}; use mezo, which needs values of the loss alone"
            ) from error
        value, tangent = forward_ad.unpack_dual(one_number(loss))  # type: ignore[no-untyped-call]
        if tangent is None and is_hollow(value):
            tangent = torch.zeros_like(value)
        if tangent is None:
            raise UserError(
                "forward_gradient: the loss came without a slope, so it is not made of the weights by "
                "arithmetic; use mezo, which needs values of the loss alone"
            )
        return torch.stack([value.detach().double().reshape(()), tangent.detach().double().reshape(())])


@contextmanager
def _tangents(params: Named, z: Perturbation) -> Iterator[None]:
    """Meanwhile each weight carries its part of z; the level's end takes it off."""
    for name, p in params:
        tangent = z.draw(name, p.detach(), 0, p.numel()).view(p.shape).to(p.dtype)
        p.copy_(forward_ad.make_dual(p.detach().clone(), tangent))  # type: ignore[no-untyped-call]
    yield


@contextmanager
def _written_out() -> Iterator[None]:
    """Attention by its parts, which have rules for tangents; fused kernels have none."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


@functools.cache
def _load() -> None:
    """Let torch load its rules for tangents, at the first of which it warns of parts of its own."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore")
        forward_ad.make_dual(torch.zeros(1), torch.ones(1))  # type: ignore[no-untyped-call]
