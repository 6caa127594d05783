"""Gradients from values of the loss alone (SPSA; MeZO, arXiv 2305.17333).

    c = (L(w + eps z) - L(w - eps z)) / (2 eps),    G = c z,    E G = grad L + O(eps^2)

No backward pass: no activation is saved and no gradient is held. What is left
of an evaluation is the number c and the name of the direction z; z is drawn
again, piece by piece, where the gradient is looked at. Evaluations before a step
add up, as gradients of backpropagation do: whoever splits a batch divides the
loss by the number of parts. Slopes over the spread of losses do not see that
factor, and their mean is taken: the length of a step stays the learning rate.

The probes see the same batch in eval mode, without dropout. The loss must be
fp32: the two values differ by 2 eps c, which is below the spacing of 16-bit
numbers near 1. Where one of them is not finite the gradient is NaN, clipped or not,
so that the frame leaves every weight and counts it. Where several processes share a batch
they exchange the values of the loss, and nothing else.

Memory: one module's displaced copies at a time and a piece of noise; as many
copies as there are directions `at_once`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks
from lowmem.optim.source import Named, Query
from lowmem.sources.batched import evaluate_at_once
from lowmem.sources.directions import Perturbation
from lowmem.sources.estimators import Estimator, TwoSided
from lowmem.sources.probe import Prober, Shift
from lowmem.sources.replicas import mean
from lowmem.sources.slopes import (
    NOISES,
    Along,
    Evidence,
    Slope,
    bounded,
    checked,
    evaluating,
    refuse_compiled,
    values,
)
from lowmem.sources.spread import SpreadProber, is_spread, unspread
from lowmem.sources.structures import Free, Structure


@dataclass(frozen=True)
class SPSA(Along):
    """Differences of the loss along random directions.

    Args:
        eps: radius of the perturbation, for each unit of noise.
        noise: gaussian, or rademacher (signs).
        queries: directions of one evaluation, averaged.
        estimator: which points are evaluated, and what is made of the values.
        clip: a slope ends at plus and minus this; 0 for never. It bounds a step, and biases its length.
        at_once: points that one forward pass evaluates, each with its own displaced weights.
        structure: which directions are drawn.

    Raises:
        UserError: a number outside its range, or unknown noise.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> params = list(model.named_parameters())
        >>> loss, evidence = SPSA().backward(
        ...     params, lambda: model(torch.ones(1, 2)).sum(), model=model, query=Query(0, 0)
        ... )
        >>> [(p, g)] = SPSA().gradients(params, [evidence])
        >>> g.rows(0, 1).shape
        torch.Size([1, 2])
    """

    eps: float = 1e-3
    noise: str = "gaussian"
    queries: int = 1
    estimator: Estimator = field(default_factory=TwoSided)
    clip: float = 0.0
    at_once: int = 1
    structure: Structure = field(default_factory=Free)
    needs_autograd: bool = False
    fused: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.eps < math.inf:
            raise UserError(f"eps_perturb is the radius of a perturbation, above 0 (1e-3), got {self.eps}")
        for name in ("queries", "at_once"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is a number of directions, at least 1, got {getattr(self, name)}")
        if self.noise not in NOISES:
            raise UserError(f"noise is {' or '.join(NOISES)}, got {self.noise!r}")
        if not 0.0 <= self.clip < math.inf:
            raise UserError(f"clip_slope bounds a slope, above 0, or is 0 for no bound; got {self.clip}")
        self.estimator.check(self.queries)

    def backward(
        self, params: Named, loss_fn: Callable[[], Tensor], *, model: nn.Module | None, query: Query
    ) -> tuple[Tensor, Evidence]:
        """Evaluate the loss on the sides of each direction that the estimator asks for.

        Args:
            params: names and trainable parameters; a tied one has one name and one z.
            loss_fn: a scalar, of the same batch each time; it need not be differentiable.
            model: its modules are hooked and put into eval mode. Without it a second copy of all
                trainable weights is held during a probe, and turning dropout off is up to the caller.
            query: names the directions.

        Returns:
            The loss at the weights where it was evaluated, else the mean of the values, and the slopes.

        Raises:
            UserError: a compiled model, a loss that is not a scalar, or a model that cannot evaluate
                several points at once.
        """
        refuse_compiled(model)
        directions = [self.direction(query, k) for k in range(self.queries)]
        points = [_shift(z, side * self.eps) for z in directions for side in self.estimator.sides]
        with torch.no_grad(), evaluating(model):
            base = [checked(loss_fn())] if self.estimator.base else []
            probed = self._probe(params, model, loss_fn, points)
            losses = mean(torch.stack([x.double() for x in (*base, *probed)]))
        slopes = self._slopes(values(losses))
        told = losses[0] if base else losses.mean()
        return told.float(), tuple(map(Slope, slopes, directions))

    def _probe(
        self, params: Named, model: nn.Module | None, loss_fn: Callable[[], Tensor], points: list[Shift]
    ) -> list[Tensor]:
        """The loss at each point; the first one alone where it is not known how weights are read."""
        if is_spread(params):
            if problem := self.unspread():
                raise UserError(problem)
            rows = SpreadProber(params, model)
            return [checked(rows(loss_fn, shift)) for shift in points]
        prober = Prober(params, model)
        alone = len(points) if self.at_once == 1 else 1 - prober.known
        found = [checked(prober(loss_fn, shift)) for shift in points[:alone]]
        for i in range(alone, len(points), self.at_once):
            found += evaluate_at_once(prober, loss_fn, points[i : i + self.at_once])
        return found

    def _slopes(self, values: list[float]) -> list[float]:
        if not all(map(math.isfinite, values)):  # of which a bound or a curvature would make a number
            return [math.nan] * self.queries
        first, sides = int(self.estimator.base), len(self.estimator.sides)
        pairs = [values[i : i + sides] for i in range(first, len(values), sides)]
        slopes = self.estimator.slopes(values[0] if first else math.nan, pairs, self.eps)
        return [bounded(c, self.clip) / self.queries for c in slopes]

    def gradients(self, params: Named, evidence: Sequence[Evidence]) -> Iterator[tuple[nn.Parameter, Blocks]]:
        """The sum over evaluations; their mean where slopes do not grow with the loss, which was divided."""
        parts = 1 if self.estimator.scaled else max(1, len(evidence))
        shares = [tuple(slope._replace(c=slope.c / parts) for slope in slopes) for slopes in evidence]
        return super().gradients(params, shares)

    def unspread(self) -> str:
        """Directions that look at whole weights, and points that share a forward pass."""
        return unspread(self.structure.on_rows, self.at_once)

    def probe_bytes(self, modules: Mapping[str, Sequence[tuple[Sequence[int], torch.dtype]]]) -> int:
        """Bytes of displaced copies that live, at most, while a module runs.

        Args:
            modules: shapes and dtypes of the trainable parameters that each module owns itself;
                a tied one under each owner.

        Example:
            >>> SPSA().probe_bytes({"up": [((64, 16), torch.bfloat16), ((64,), torch.bfloat16)]})
            2176
        """
        sizes = [
            sum(math.prod(shape) * dtype.itemsize for shape, dtype in owned) for owned in modules.values()
        ]
        return max(sizes, default=0)


def _shift(z: Perturbation, distance: float) -> Shift:
    return lambda name, w, start=0: z.displaced(name, w, distance, start)
