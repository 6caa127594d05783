"""The frame around pure steps: cut, pad, guard, compile, write, commit.

Element-wise work is done on flat chunks, as large as the device's `Sizes` say; one
compiled kernel for each (rule, writer, dtypes) serves every tensor of a model. A
tensor is cut greedily, largest size first; the last piece is padded, so results do
not depend on the cutting. The length of a row is static: for a dynamic one, codecs
fall back to scalar code.

Everything that protects a step is here and in the kernels, and nothing waits for a
device. Where nobody judges the tensor as a whole, an element of the gradient that is
not finite leaves its weight and carries its moments over. Where a 0-D flag `ok`
judges it (a rule that reduces over the tensor, a projected gradient), a step that is
not ok leaves all of it. Both are counted, and so is an fp16 weight that would not be
finite, which stays.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Dense, Direction
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine import cutting
from lowmem.optim.engine.compiling.kernel import Kernel, compiled
from lowmem.optim.engine.cutting import LADDER, MOST, Span, sizes, walk
from lowmem.optim.engine.finite import Skipped, all_finite
from lowmem.optim.engine.kernels import Asks, Guard, body
from lowmem.optim.engine.layout import ROW
from lowmem.optim.engine.passes import Passes, alike, reading_first
from lowmem.optim.engine.run import Course, Pass, precision, rates
from lowmem.optim.engine.together import Together
from lowmem.optim.formulas import Leaf
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.terms.hyper import Hyper
from lowmem.optim.terms.state import Held, State
from lowmem.optim.writers import Nearest, Writer

log = logging.getLogger(__name__)

GRIDS = 64
"""Grids that are kept."""


@functools.cache
def keep_heap() -> None:
    """Let the C library keep freed blocks of a few MiB instead of handing their pages back at every step.

    glibc hands a freed block back to the system, to fetch it again page by page, as long as it
    has not seen a larger one freed (32 MiB at most). This one is never written to: it costs nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@dataclass
class Chunks:
    """Runs pure steps on tensors.

    Args:
        compile: compile the kernels (once for each rule, writer and dtypes).
    """

    compile: bool = False
    _kernels: dict[tuple[object, ...], Kernel] = field(default_factory=dict)
    skipped: Skipped = field(default_factory=Skipped)
    _ages: list[Tensor] = field(default_factory=list)
    _true: dict[torch.device, Tensor] = field(default_factory=dict)
    _grids: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_heap()
        self._small = Together(self)
        self._late = False
        self.passes = Passes(self.compile)

    @contextmanager
    def together(self, ages: bool = True) -> Iterator[None]:
        """Small tensors that are stepped inside may wait for each other, until the end of it at most.

        Args:
            ages: those that kernels do not move wait as well; False where states are elsewhere by then.
        """
        self._small.open, self._late = True, ages
        try:
            yield
            self._small.flush()
        finally:
            self._small = Together(self) if self._small.waits else self._small
            self._small.open = self._late = False
            self._move_ages()

    def apply_(
        self, rule: Pointwise, writer: Writer, p: Tensor, g: Blocks, s: State, extra: State, hp: Hyper
    ) -> None:
        """One step of a pointwise rule on a weight, each element judged for itself.

        Args:
            rule: what to do; writer: how to store the weight.
            p: the weight, any shape and layout; g: its gradient.
            s: the rule's state and constants; extra: the writer's state.
            hp: of this step.
        """
        policy = sizes(p.device)
        if policy.together and self._small.takes(rule, writer, p, g, s, extra, hp):
            return
        ok, speeds = self.true(p.device), hp.rates(dtype=precision(p))
        alone = not policy.at_hand and self._alone(rule, g, p.numel(), writer)
        table = self._table(rule, s, hp) if alone else None
        if table is None:
            _age(s, 1)
        if not self._again(rule, writer, p, g, s, hp, speeds, table):
            if rule.measures:
                speeds = self._measured(rule, p, g, s, hp, speeds, ok, "elements")
            weight, extra = opened(p, extra)
            run = Pass(self, rule, writer, s, extra, hp, speeds, ok, "elements", table=table)
            self._walk(run, weight, g)
            self._keep(run, s, p, g)
        if table is not None:
            self._ages.append(s["age"])
            if not self._late:
                self._move_ages()

    def _again(
        self, rule: Pointwise, writer: Writer, p: Tensor, g: Blocks, s: State, hp: Hyper, rates: Tensor,
        table: Tensor | None,
    ) -> bool:  # fmt: skip
        """Take a step by the launches of the one before, if they are the same."""
        course: Course | None = s.course if isinstance(s, Held) else None
        if course is None or not isinstance(g, Dense) or not course.fits(rule, writer, p, g, table):
            return False
        course.step(p, g, hp, rates, rule.scalars(s, hp) if table is None else table)
        return True

    def _keep(self, run: Pass, s: State, p: Tensor, g: Blocks) -> None:
        """Keep the launches of a step for the next one, where it will have the same."""
        if not isinstance(s, Held) or not isinstance(g, Dense) or not Course.serves(run, p, g):
            return
        spans = self.spans(run.rule, p.numel(), p.device, writer=run.writer)
        if all(length == size for _, length, size in spans):  # nothing is padded
            s.course = Course(run, p, g.tensor, spans)

    def advance_(self, rule: Pointwise, low: Tensor, s: State, hp: Hyper, ok: Tensor | None = None) -> Tensor:
        """Turn a projected gradient into its direction, in place, judged as a whole.

        Args:
            rule: what to do; low: contiguous fp32; s: the rule's state and constants.
            hp: of this step.
            ok: 0-D bool, False leaves the state as it is; if None, whether every element is finite.

        Returns:
            ok.
        """
        flat = low.view(-1)
        aged = "age" in s and s["age"].dim() > 0  # numbers for each element are five more temporaries
        most = LADDER[1 if aged else 0]
        cuts = list(walk(self.spans(rule, flat.numel(), low.device, most), low.device))
        guard: Guard = "given"
        alone = hp.shard is None and len(cuts) == 1
        if ok is None and alone and not rule.measures:  # the kernel that steps finds out on the way
            guard, ok = "found", torch.empty((), dtype=torch.bool, device=low.device)
        elif ok is None:
            ok = all_finite(low, hp)
        table = self._table(rule, s, hp) if len(cuts) == 1 else None
        if table is None:
            _age(s, 1 if guard == "found" else ok)
        asks: Asks = "both" if rule.measures else "step"
        run = Pass(self, rule, None, s, {}, hp, hp.rates(), ok, guard, asks, table)
        for start, length, size in cuts:
            run.step_low(flat if length == flat.numel() else flat[start : start + length], start, size)
        if rule.measures:
            low.mul_(rule.factor_(s, ok, hp))
        return ok

    def write_(self, writer: Writer, p: Tensor, direction: Direction, extra: State, hp: Hyper) -> None:
        """Take a step that a rule has decided."""
        ok = self.true(p.device) if direction.ok is None else direction.ok
        if direction.ok is not None:
            self.skipped.judge(ok, p.numel())
        plain = isinstance(writer, Nearest) and p.dtype == torch.float32 and p.dim() == 2
        if plain and direction.pair and direction.lr is None and direction.decay is None:
            _add_product_(p, direction.pair, -hp.lr * direction.scale, ok, hp)
            return
        rule, s = direction.then or (None, {})
        _age(s, ok)
        guard: Guard = "elements" if direction.ok is None else "given"
        speeds = rates(hp, direction, precision(p))
        if rule is not None and rule.measures:
            speeds = self._measured(rule, p, direction.blocks, s, hp, speeds, ok, guard)
        p, extra = opened(p, extra)
        run = Pass(self, rule, writer, s, extra, hp, speeds, ok, guard)
        self._walk(run, p, direction.blocks)

    def _measured(
        self, rule: Pointwise, p: Tensor, g: Blocks, s: State, hp: Hyper, rates: Tensor, ok: Tensor,
        guard: Guard,
    ) -> Tensor:  # fmt: skip
        """lr and decay, lr times the factor that takes a pass over the tensor to find."""
        run = Pass(self, rule, None, s, {}, hp, rates, ok, guard, "sums")
        self._walk(run, p, g)
        return torch.stack((rates[0] * rule.factor_(s, ok, hp), rates[1]))

    @functools.cached_property
    def aside(self) -> Chunks:
        """Another one, for steps that are counted elsewhere."""
        return Chunks(self.compile)

    def compiles(self, rule: Pointwise | None) -> bool:
        """Whether the kernels of a rule are compiled."""
        return self.compile and (rule is None or rule.compilable)

    def spans(
        self, rule: Pointwise | None, count: int, device: torch.device, most: int = LADDER[0],
        writer: Writer | None = None,
    ) -> tuple[Span, ...]:  # fmt: skip
        """Sizes of the device's policy where kernels are compiled; otherwise at most `most` elements."""
        grain, policy = _grain(rule, writer), sizes(device)
        if not self.compiles(rule):
            most = min(most, policy.eager)
            return cutting.eager_spans(count, min(most, rule.chunk) if rule else most, grain)
        if policy.ladder:
            return cutting.compiled_spans(count)
        most = policy.made // rule.spills if rule and rule.spills else MOST
        return cutting.whole_spans(count, grain if grain > 1 else ROW, most)

    def _walk(self, run: Pass, p: Tensor, g: Blocks) -> None:
        """Take the pass over a weight piece by piece, or in rows of which the kernel itself reads g."""
        if leaf := self._read_inside(run, p, g):
            for i, j in self.passes.ranges(g, leaf):
                run.rows(p, g.shape, leaf, i, j)
            return
        rule, writer, act = run.rule, run.writer, run.act
        look, count = self._look(rule, g), p.numel()
        if not look:
            for start, length, size in walk(self.spans(rule, count, p.device, writer=writer), p.device):
                act(p, self.passes.chunk(g, start, start + length), start, size)
            return
        width = math.lcm(_grain(rule, writer), ROW)
        for first, last in walk(cutting.look_ranges(count, g.shape[1], look, width), p.device):
            seen = self.passes.chunk(g, first, last)
            for start, length, size in walk(
                self.spans(rule, last - first, p.device, writer=writer), p.device
            ):
                act(p, seen[start : start + length], first + start, size)
            del seen  # before the next one is made

    def _read_inside(self, run: Pass, p: Tensor, g: Blocks) -> Leaf | None:
        """What the kernel reads of g, where a step goes by elements and a row may be of any length."""
        if not (p.is_contiguous() and self.compiles(run.rule) and run.any_rows and 0 < p.numel() <= MOST):
            return None
        return self.passes.read_by_a_kernel(g)

    def _look(self, rule: Pointwise | None, g: Blocks) -> int:
        """Elements of g that may be made at once; 0 for those of a piece."""
        return sizes(g.device).look(self.passes.takes(g), self.compiles(rule))

    def _alone(self, rule: Pointwise, g: Blocks, count: int, writer: Writer) -> bool:
        """Whether one kernel takes all of a step."""
        return not self._look(rule, g) and len(self.spans(rule, count, g.device, writer=writer)) == 1

    def _table(self, rule: Pointwise, s: State, hp: Hyper) -> Tensor | None:
        """The scalars of all ages, where one kernel takes all of a step: it looks up those that it needs."""
        elsewhere = not sizes(hp.weight.device).at_hand
        return rule.table(s, hp) if elsewhere and self.compiles(rule) and not rule.measures else None

    def kernel(
        self,
        rule: Pointwise | None, writer: Writer | None, keys: Sequence[str], w: Tensor, g: Tensor,
        live: bool, guard: Guard, asks: Asks, counts: bool, together: bool = False,
        leaf: Leaf | None = None, read: Sequence[Tensor] = (), order: tuple[int, ...] = (),
    ) -> Kernel:  # fmt: skip
        """The kernel for (rows, width) chunks like these: made once, compiled where `live`."""
        # rule and writer fix what the state looks like; both outlive the frame, so their ids name them;
        # a compiler takes a single row as something else than a number of rows
        name = (
            id(rule), id(writer), w.dtype, g.dtype, w.device, guard, asks, counts, together,
            w.shape[0] == 1, leaf and (leaf.name, order, alike((w, *read))), live,
        )  # fmt: skip
        if name not in self._kernels:
            held = (*writer.init(torch.empty(1, dtype=w.dtype)), *writer.beside) if writer else ()
            step = body(rule, writer, keys, held, guard, asks, counts)
            step = reading_first(step, leaf, order) if leaf else step
            if live and not any(known[-1] for known in self._kernels):
                log.info("compiling the optimizer's kernels: the first step takes some seconds more")
            self._kernels[name] = compiled(step) if live else step
        return self._kernels[name]

    def _move_ages(self) -> None:
        """One step more for all that have been stepped: a launch for hundreds."""
        ages, self._ages = self._ages, []
        for device in {age.device for age in ages}:
            torch._foreach_add_([age for age in ages if age.device == device], 1)

    def true(self, device: torch.device) -> Tensor:
        """A 0-D True, made once."""
        if device not in self._true:
            self._true[device] = torch.ones((), dtype=torch.bool, device=device)
        return self._true[device]

    def grid(self, rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """First elements of the rows, (rows, 1), and places in a row, (width,); int32."""
        key = (rows, width, device)
        if key not in self._grids:
            if len(self._grids) >= GRIDS:
                self._grids.clear()
            first = torch.arange(rows, dtype=torch.int32, device=device) * width
            self._grids[key] = (first[:, None], torch.arange(width, dtype=torch.int32, device=device))
        return self._grids[key]

    @property
    def grids(self) -> dict[tuple[int, int], tuple[Tensor, Tensor]]:
        """The grids made so far by (rows, width): they stay from one step to the next."""
        return {(rows, width): grid for (rows, width, _), grid in self._grids.items()}


def opened(p: Tensor, extra: State) -> tuple[Tensor, State]:
    """What chunks of a weight are cut from, and what the writer is given beside them."""
    return (p.codes, {**extra, "scale": p.scale}) if isinstance(p, Int8Weight) else (p, extra)


def _grain(rule: Pointwise | None, writer: Writer | None) -> int:
    """Elements that are stepped, and written, as one."""
    return math.lcm(rule.grain if rule else 1, writer.grain if writer else 1)


def _age(s: State, steps: int | Tensor) -> None:
    if "age" in s:
        s["age"].add_(steps)


def _add_product_(p: Tensor, pair: tuple[Tensor, Tensor], alpha: float, ok: Tensor, hp: Hyper) -> None:
    """W <- decay W + alpha A B in one pass; the product is never held. Not ok, it is 0."""
    if hp.weight_decay:
        p.mul_(torch.where(ok, hp.rates()[1], 1.0))
    p.addmm_(*pair, alpha=alpha)
