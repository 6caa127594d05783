"""The frame around pure steps: cut, pad, guard, compile, write, commit.

Element-wise work is done on flat chunks of at most `LADDER[0]` elements:
temporaries stay in cache, and one compiled kernel for each (rule, writer,
dtypes) serves every tensor of a model. A tensor is cut greedily, largest size
first; the last piece is padded, so results do not depend on the cutting. The
length of a row is static: for a dynamic one, codecs fall back to scalar code.

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
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.contract import Pointwise
from lowmem.optim.engine import cutting, noise
from lowmem.optim.engine.cutting import LADDER, Span, pad, read_flat, walk, write_flat
from lowmem.optim.engine.kernels import LARGEST, Asks, Guard, Kernel, body, compiled
from lowmem.optim.engine.layout import layout
from lowmem.optim.hyper import Hyper
from lowmem.optim.state import State
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
    _skipped: dict[torch.device, Tensor] = field(default_factory=dict)
    _judged: list[tuple[Tensor, int]] = field(default_factory=list)
    _true: dict[torch.device, Tensor] = field(default_factory=dict)
    _grids: dict[tuple[int, int, torch.device], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep_heap()

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
        _age(s, 1)
        ok, speeds = self.true(p.device), rates(hp, dtype=_precision(p))
        if rule.measures:
            speeds = self._measured(rule, p, g, s, hp, speeds, ok, "elements")
        run = _Run(self, rule, writer, s, extra, hp, speeds, ok, "elements")
        for start, length, size in walk(self.spans(rule, p.numel()), p.device):
            run.step_weight(p, g.chunk(start, start + length), start, size)

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
        cuts = list(walk(self.spans(rule, flat.numel(), LADDER[1 if aged else 0]), low.device))
        guard: Guard = "given"
        if ok is None and len(cuts) == 1 and not rule.measures:  # the kernel that steps finds out on the way
            guard, ok = "found", torch.empty((), dtype=torch.bool, device=low.device)
        elif ok is None:
            ok = all_finite(low, hp)
        _age(s, 1 if guard == "found" else ok)
        run = _Run(self, rule, None, s, {}, hp, rates(hp), ok, guard, "both" if rule.measures else "step")
        for start, length, size in cuts:
            run.step_low(flat if length == flat.numel() else flat[start : start + length], start, size)
        if rule.measures:
            low.mul_(rule.factor_(s, ok, hp))
        return ok

    def write_(self, writer: Writer, p: Tensor, direction: Direction, extra: State, hp: Hyper) -> None:
        """Take a step that a rule has decided."""
        ok = self.true(p.device) if direction.ok is None else direction.ok
        if direction.ok is not None:
            self._judged.append((ok, p.numel()))
            if len(self._judged) >= 4096:
                self._settle()
        plain = isinstance(writer, Nearest) and p.dtype == torch.float32 and p.dim() == 2
        if plain and direction.pair and direction.lr is None and direction.decay is None:
            _add_product_(p, direction.pair, -hp.lr * direction.scale, ok, hp)
            return
        rule, s = direction.then or (None, {})
        _age(s, ok)
        guard: Guard = "elements" if direction.ok is None else "given"
        speeds = rates(hp, direction, _precision(p))
        if rule is not None and rule.measures:
            speeds = self._measured(rule, p, direction.blocks, s, hp, speeds, ok, guard)
        run = _Run(self, rule, writer, s, extra, hp, speeds, ok, guard)
        for start, length, size in walk(self.spans(rule, p.numel()), p.device):
            run.step_weight(p, direction.blocks.chunk(start, start + length), start, size)

    def _measured(
        self,
        rule: Pointwise,
        p: Tensor,
        g: Blocks,
        s: State,
        hp: Hyper,
        rates: Tensor,
        ok: Tensor,
        guard: Guard,
    ) -> Tensor:
        """lr and decay, lr times the factor that takes a pass over the tensor to find."""
        run = _Run(self, rule, None, s, {}, hp, rates, ok, guard, "sums")
        for start, length, size in walk(self.spans(rule, p.numel()), p.device):
            run.measure(p, g.chunk(start, start + length), start, size)
        return torch.stack((rates[0] * rule.factor_(s, ok, hp), rates[1]))

    def spans(self, rule: Pointwise | None, count: int, most: int = LADDER[0]) -> tuple[Span, ...]:
        """Ladder sizes where kernels are compiled; otherwise at most `most` elements, padded to the grain."""
        if self.compile and (rule is None or rule.compilable):
            return cutting.compiled_spans(count)
        return cutting.eager_spans(count, min(most, rule.chunk) if rule else most, rule.grain if rule else 1)

    def kernel(
        self,
        rule: Pointwise | None,
        writer: Writer | None,
        keys: Sequence[str],
        w: Tensor,
        g: Tensor,
        live: bool,
        guard: Guard,
        asks: Asks,
    ) -> Kernel:
        """The kernel for (rows, width) chunks like these: made once, compiled where `live`."""
        # rule and writer fix what the state looks like; both outlive the frame, so their ids name them;
        # a compiler takes a single row as something else than a number of rows
        name = (id(rule), id(writer), w.dtype, g.dtype, w.device, guard, asks, w.shape[0] == 1, live)
        if name not in self._kernels:
            held = tuple(writer.init(torch.empty(1, dtype=w.dtype))) if writer else ()
            step = body(rule, writer, keys, held, guard, asks)
            if live and not any(key[-1] for key in self._kernels):
                log.info("compiling the optimizer's kernels: the first step takes some seconds more")
            self._kernels[name] = compiled(step) if live else step
        return self._kernels[name]

    def skipped(self) -> int:
        """Elements that were not stepped because of what was not finite, so far. Reads from the device."""
        self._settle()
        return sum(int(count) for count in self._skipped.values())

    def _settle(self) -> None:
        """Count the elements of the tensors whose step turned out not ok."""
        for device in {ok.device for ok, _ in self._judged}:
            here = [(ok, count) for ok, count in self._judged if ok.device == device]
            counts = torch.tensor([count for _, count in here]).to(device, non_blocking=True)
            self.counter(device).add_((~torch.stack([ok for ok, _ in here]) * counts).sum())
        self._judged.clear()

    def counter(self, device: torch.device) -> Tensor:
        """Elements skipped on a device."""
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

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


def all_finite(x: Tensor, hp: Hyper) -> Tensor:
    """0-D bool, the same for all shards."""
    least, most = x.aminmax()
    return hp.total(most - least, "max") <= LARGEST  # false for NaN and Inf


def _precision(p: Tensor) -> torch.dtype:
    """What a weight's step is computed in."""
    return torch.promote_types(p.dtype, torch.float32)


def rates(hp: Hyper, direction: Direction | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """lr and decay as (2,) on the device; a direction may bring its own."""
    scale = 1.0 if direction is None else direction.scale
    group = hp.vector(hp.lr * scale, hp.decay, dtype=dtype)
    if direction is None or (direction.lr is None and direction.decay is None):
        return group
    lr = group[0] if direction.lr is None else direction.lr * scale
    decay = group[1] if direction.decay is None else direction.decay
    return torch.stack((lr.to(dtype), decay.to(dtype)))


def _age(s: State, steps: int | Tensor) -> None:
    if "age" in s:
        s["age"].add_(steps)


def _add_product_(p: Tensor, pair: tuple[Tensor, Tensor], alpha: float, ok: Tensor, hp: Hyper) -> None:
    """W <- decay W + alpha A B in one pass; the product is never held. Not ok, it is 0."""
    if hp.weight_decay:
        p.mul_(torch.where(ok, rates(hp)[1], 1.0))
    p.addmm_(*pair, alpha=alpha)


class _Run:
    """One tensor's pass through the frame: what is the same for all of its chunks.

    Args:
        frame: whose kernels run.
        rule, writer: what the kernel does; s, extra: their states.
        hp: of this step; rates: lr and decay, (2,).
        ok: 0-D bool; guard: what it says, see `kernels.Guard`; asks: what for, see `kernels.Asks`.
    """

    def __init__(
        self, frame: Chunks, rule: Pointwise | None, writer: Writer | None, s: State, extra: State,
        hp: Hyper, rates: Tensor, ok: Tensor, guard: Guard, asks: Asks = "step",
    ) -> None:  # fmt: skip
        self.frame, self.rule, self.writer, self.hp = frame, rule, writer, hp
        self.rates, self.ok, self.guard, self.asks = rates, ok, guard, asks
        self.device = rates.device
        live = frame.compile and self.device.type != "meta" and (rule is None or rule.compilable)
        self.layout = layout(rule, writer, s, extra, live)
        self.scalars = rule.scalars(s, hp) if rule else None
        self.skipped = frame.counter(self.device) if writer else None
        self._words: dict[int, Tensor] = {}

    def step_weight(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Step the weight's elements start..start+len(g), padded to size."""
        length = g.numel()
        w = read_flat(p, start, length)
        if length == size and p.is_contiguous():
            self._launch(w, g, start, length)
            return
        padded = pad(w, size)
        self._launch(padded, g if length == size else pad(g, size), start, length)
        write_flat(p, start, padded[:length])

    def measure(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Sum over the elements start..start+len(g); weight and gradient stay as they are."""
        length = g.numel()
        w = read_flat(p, start, length)
        if length == size and p.is_contiguous():
            self._launch(w, g, start, length)
        else:
            self._launch(pad(w, size), pad(g, size, math.nan), start, length)

    def step_low(self, low: Tensor, start: int, size: int) -> None:
        """Overwrite a piece of the projected gradient by its direction."""
        if low.numel() == size:
            self._launch(low, low, start, size)
            return
        padded = pad(low, size, math.nan if self.asks == "both" else 0.0)  # nobody measures the padding
        self._launch(padded, padded, start, low.numel())
        low.copy_(padded[: low.numel()])

    def _launch(self, w: Tensor, g: Tensor, start: int, length: int) -> None:
        """Run the kernel on flat elements, of which the first `length` are the tensor's from `start` on."""
        size = g.shape[0]
        width = self.layout.width(size)
        shaped = g.view(-1, width)
        weight = shaped if w is g else w.view(-1, width)
        views, back = self.layout.cut(start, length, size)
        kernel = self.frame.kernel(
            self.rule, self.writer, self.layout.keys, weight, shaped, self.layout.live,
            self.guard, self.asks,
        )  # fmt: skip
        kernel(
            weight, shaped, self.rates, self.ok, self.skipped, self.scalars,
            *self._places(start, *shaped.shape), self._keys(start), *views,
        )  # fmt: skip
        for piece, padded in back:
            piece.copy_(padded[: piece.shape[0]])

    def _places(self, start: int, rows: int, width: int) -> tuple[Tensor | None, ...]:
        """Where elements are in the tensor: the chunk, its rows, and the columns in a row."""
        if not self.layout.placed:
            return None, None, None
        index = start & 0xFFFFFFFF
        signed = index - (1 << 32) if index >= 1 << 31 else index
        return self.hp.vector(signed, dtype=torch.int32)[0], *self.frame.grid(rows, width, self.device)

    def _keys(self, start: int) -> Tensor | None:
        """Keys of the random streams; the upper half of a 64-bit element index is part of the name."""
        if not self.layout.streams:
            return None
        upper = start >> 32
        if upper not in self._words:
            hp = self.hp
            names = [(hp.seed, hp.step, hp.name, stream, upper) for stream in self.layout.streams]
            self._words[upper] = noise.key_tensor(names, self.device)
        return self._words[upper]
