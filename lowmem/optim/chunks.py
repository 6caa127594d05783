"""The frame around pure steps: cut, pad, guard, compile, write, commit.

Element-wise work is done on flat chunks of a few fixed sizes: temporaries stay
in cache, and one compiled kernel for each (rule, writer, dtypes, size) serves
every tensor of a model. A tensor is cut greedily, largest size first; the last
piece is padded, so results do not depend on the cutting. Sizes must be static:
compiled for a dynamic length, block-wise codecs fall back to scalar code.

Everything that protects a step is here and nowhere else. A gradient element that
is not finite leaves its weight and carries its moments over; it is counted. A
`Direction` that is not ok leaves its tensor. No value is read on the host.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowmem.optim import noise
from lowmem.optim.blocks import Blocks, Direction
from lowmem.optim.cutting import LADDER, pad, pieces, read_flat, spans, walk, write_flat
from lowmem.optim.rule import ChunkHyper, Hyper, Pointwise, State
from lowmem.optim.writers import Nearest, Writer

OWN_SIZES = 8
"""Sizes of tensors, beside the ladder, for which a frame compiles kernels."""

log = logging.getLogger(__name__)

Kernel = Callable[..., None]


def _body(rule: Pointwise | None, writer: Writer | None, keys: Sequence[str], held: Sequence[str]) -> Kernel:
    """The step of one chunk. Without a rule, g is the direction; without a writer, it becomes it."""
    streams = (rule.streams if rule else ()) + (writer.streams if writer else ())

    def run(
        w: Tensor, g: Tensor, scalars: Tensor, rates: Tensor, ok: Tensor, position: Tensor, words: Tensor,
        skipped: Tensor, *tensors: Tensor,
    ) -> None:  # fmt: skip
        state = dict(zip(keys, tensors[: len(keys)], strict=True))
        extra = dict(zip(held, tensors[len(keys) :], strict=True))
        gradient = g.float()
        finite = torch.isfinite(gradient) & ok
        gradient = torch.where(finite, gradient, 0.0)
        index = (
            torch.arange(g.shape[0], dtype=torch.int32, device=g.device) + position if streams else position
        )
        hp = ChunkHyper(scalars, rates[0], rates[1], ok, finite, index, words, streams)
        direction, new = rule.step(gradient, state, hp) if rule else (gradient, {})
        direction = torch.where(finite, direction, 0.0)
        if writer is None:
            g.copy_(direction)
        else:
            weight, kept = writer.write(w, direction, extra, hp, torch.where(finite, rates[1], 1.0))
            w.copy_(weight)
            for name, value in kept.items():
                extra[name].copy_(value)
        for name, value in new.items():
            state[name].copy_(value)
        # as a sum of floats: counting booleans keeps the loop from being vectorised
        skipped.add_(torch.where(finite, 0.0, 1.0).sum().to(torch.int64))

    return run


def compiled(body: Kernel) -> Kernel:
    """Compile a kernel on its own."""
    # the limit on recompilations counts for each code object: every kernel gets its own
    code = body.__code__.replace(co_name=f"lowmem_kernel_{id(body):x}")
    own = types.FunctionType(code, body.__globals__, code.co_name, body.__defaults__, body.__closure__)
    # the cache of kernels has looked at dtypes, sizes and device: guards would ask again at every call
    options: dict[str, Any] = {
        "guard_filter_fn": lambda guards: [False] * len(guards),
        "emulate_precision_casts": True,  # a cast to 16 bits and back rounds, and must not be dropped
    }
    return torch.compile(own, fullgraph=True, dynamic=False, options=options)


@dataclass
class Chunks:
    """Runs pure steps on tensors.

    Args:
        compile: compile the kernels (once for each rule, writer, dtypes and chunk size).
    """

    compile: bool = False
    _kernels: dict[tuple[object, ...], Kernel] = field(default_factory=dict)
    _skipped: dict[torch.device, Tensor] = field(default_factory=dict)
    _true: dict[torch.device, Tensor] = field(default_factory=dict)
    _own: set[int] = field(default_factory=set)

    def skipped(self) -> int:
        """Elements whose gradient was not finite, so far. Reads from the device."""
        return sum(int(count) for count in self._skipped.values())

    def counter(self, device: torch.device) -> Tensor:
        if device not in self._skipped:
            self._skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._skipped[device]

    def apply_(
        self, rule: Pointwise, writer: Writer, p: Tensor, g: Blocks, s: State, extra: State, hp: Hyper
    ) -> None:
        """One step of a pointwise rule on a weight.

        Args:
            rule: what to do; writer: how to store the weight.
            p: the weight, any shape and layout; g: its gradient.
            s: the rule's state and constants; extra: the writer's state.
            hp: of this step.
        """
        ok = self.true(p.device)
        self._age(s, ok)
        run = _Run(self, rule, writer, s, extra, hp, ok, rates(hp))
        for start, length, size in walk(run.spans(p.numel()), p):
            run.weight_chunk(p, g.chunk(start, start + length), start, size)

    def advance_(self, rule: Pointwise, low: Tensor, s: State, hp: Hyper, ok: Tensor) -> None:
        """Turn a projected gradient into its direction, in place.

        Args:
            rule: what to do; low: contiguous fp32; s: the rule's state and constants.
            hp: of this step; ok: 0-D bool, False leaves the state as it is.
        """
        self._age(s, ok)
        run = _Run(self, rule, None, s, {}, hp, ok, rates(hp))
        run.skipped = torch.zeros_like(run.skipped)  # the write counts what is skipped
        flat = low.view(-1)
        for start, length, size in walk(run.spans(flat.numel()), low):
            run.low_chunk(flat[start : start + length], start, size)

    def write_(self, writer: Writer, p: Tensor, direction: Direction, extra: State, hp: Hyper) -> None:
        """Take a step that a rule has decided, and store what it commits."""
        ok = direction.ok if direction.ok is not None else self.true(p.device)
        plain = isinstance(writer, Nearest) and p.dtype == torch.float32 and p.dim() == 2
        if plain and direction.pair and direction.lr is None and direction.decay is None:
            self._add_product_(p, direction.pair, ok, hp)
            return
        rule, s = direction.then or (None, {})
        run = _Run(self, rule, writer, s, extra, hp, ok, rates(hp, direction))
        for start, length, size in walk(run.spans(p.numel()), p):
            run.weight_chunk(p, direction.blocks.chunk(start, start + length), start, size)

    def _add_product_(self, p: Tensor, pair: tuple[Tensor, Tensor], ok: Tensor, hp: Hyper) -> None:
        """W <- decay W - lr A B in one pass: the product is never held. A step that is not ok has B = 0."""
        if hp.weight_decay:
            p.mul_(torch.where(ok, rates(hp)[1], 1.0))
        p.addmm_(*pair, alpha=-hp.lr)
        self.counter(p.device).add_(~ok, alpha=p.numel())

    @staticmethod
    def _age(s: State, ok: Tensor) -> None:
        if "age" in s:
            s["age"].add_(ok)

    def kernel(
        self,
        rule: Pointwise | None,
        writer: Writer | None,
        keys: Sequence[str],
        w: Tensor,
        g: Tensor,
        live: bool,
    ) -> Kernel:
        """The kernel for chunks like these: made once, compiled where `live`."""
        # rule and writer fix what the state looks like; both outlive the frame, so their ids name them
        name = (id(rule), id(writer), w.dtype, g.dtype, w.device, g.shape[0] if live else 0, live)
        if name not in self._kernels:
            held = tuple(writer.init(torch.empty(1, dtype=w.dtype))) if writer else ()
            body = _body(rule, writer, keys, held)
            if live and not any(key[-1] for key in self._kernels):
                log.info("compiling the optimizer's kernels: the first step takes some seconds more")
            self._kernels[name] = compiled(body) if live else body
        return self._kernels[name]

    def own(self, rest: int) -> bool:
        """Whether what is left of a tensor after the largest chunks is one chunk of its own size.

        A model has few shapes, and one call is cheaper than a walk down the ladder.
        """
        if rest not in self._own and rest and rest % LADDER[-1] == 0 and len(self._own) < OWN_SIZES:
            self._own.add(rest)
        return rest in self._own

    def true(self, device: torch.device) -> Tensor:
        """A 0-D True, made once."""
        if device not in self._true:
            self._true[device] = torch.ones((), dtype=torch.bool, device=device)
        return self._true[device]


def rates(hp: Hyper, direction: Direction | None = None) -> Tensor:
    """lr and decay as (2,) fp32 on the device; a direction may bring its own."""
    group = hp.vector(hp.lr, hp.decay, dtype=torch.float32)
    if direction is None or (direction.lr is None and direction.decay is None):
        return group
    lr = group[0] if direction.lr is None else direction.lr
    decay = group[1] if direction.decay is None else direction.decay
    return torch.stack((lr.float(), decay.float()))


class _Run:
    """One tensor's pass through the frame: what is the same for all of its chunks."""

    def __init__(
        self, frame: Chunks, rule: Pointwise | None, writer: Writer | None, s: State, extra: State,
        hp: Hyper, ok: Tensor, rates: Tensor,
    ) -> None:  # fmt: skip
        self.frame, self.rule, self.writer, self.hp, self.ok, self.rates = frame, rule, writer, hp, ok, rates
        device = rates.device
        self.live = frame.compile and device.type != "meta" and (rule is None or rule.compilable)
        self.scalars = rule.scalars(s, hp) if rule else rates
        self.keys = tuple(s)
        per, fill = (rule.per, rule.fill) if rule else ({}, {})
        self.cuts = [(s[key], per.get(key, 0), fill.get(key, 0)) for key in self.keys]
        self.cuts += [(tensor, 1, 0) for tensor in extra.values()]
        self.streams = (rule.streams if rule else ()) + (writer.streams if writer else ())
        self.skipped = frame.counter(device)
        self._words: dict[int, Tensor] = {}

    def spans(self, count: int) -> Iterator[tuple[int, int, int]]:
        """Ladder sizes where kernels are compiled; otherwise the largest that fit, padded to the grain."""
        rule = self.rule
        if self.frame.compile and (rule is None or rule.compilable):
            whole = count // LADDER[0] * LADDER[0]
            yield from spans(whole)
            if self.frame.own(count - whole):
                yield whole, count - whole, count - whole
            else:
                yield from ((whole + start, length, size) for start, length, size in spans(count - whole))
            return
        grain, most = (rule.grain, getattr(rule, "chunk", LADDER[0])) if rule else (1, LADDER[0])
        for start in range(0, count, most):
            length = min(most, count - start)
            yield start, length, -(-length // grain) * grain

    def words(self, start: int) -> Tensor:
        """Keys of the random streams; the upper half of a 64-bit element index is part of the name."""
        upper = (start + self.hp.offset) >> 32
        if upper not in self._words:
            hp = self.hp
            names = [(hp.seed, hp.step, hp.name, stream, upper) for stream in self.streams]
            self._words[upper] = noise.key_tensor(names, self.rates.device) if names else self.rates
        return self._words[upper]

    def _position(self, start: int) -> Tensor:
        if not self.streams:
            return self.rates  # nothing is drawn, so nothing asks for it
        index = (start + self.hp.offset) & 0xFFFFFFFF
        signed = index - (1 << 32) if index >= 1 << 31 else index
        return self.hp.vector(signed, dtype=torch.int32)[0]

    def _cut(self, start: int, length: int, size: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
        """Views of the state for one chunk; where it must be padded, copies and where they go back."""
        views, back = [], []
        for tensor, per, fill in self.cuts:
            if not per:
                views.append(tensor)
                continue
            piece = pieces(tensor, per, start, length)
            entries = -(-size // per)
            if piece.shape[0] == entries:
                views.append(piece)
            else:
                views.append(pad(piece, entries, fill))
                back.append((piece, views[-1]))
        return views, back

    def _launch(self, w: Tensor, g: Tensor, start: int, length: int) -> None:
        views, back = self._cut(start, length, g.shape[0])
        self.frame.kernel(self.rule, self.writer, self.keys, w, g, self.live)(
            w, g, self.scalars, self.rates, self.ok, self._position(start), self.words(start),
            self.skipped, *views,
        )  # fmt: skip
        for piece, padded in back:
            piece.copy_(padded[: piece.shape[0]])
        if g.shape[0] > length and self.ok is not self.frame.true(w.device):
            # a step that is refused as a whole was refused for the padding too, which is nobody's
            self.skipped.sub_((~self.ok) * (g.shape[0] - length))

    def weight_chunk(self, p: Tensor, g: Tensor, start: int, size: int) -> None:
        """Step the weight's elements start..start+len(g), padded to size."""
        length = g.numel()
        w = read_flat(p, start, length)
        if length == size and p.is_contiguous():
            self._launch(w, g, start, length)
            return
        padded = pad(w, size)
        self._launch(padded, g if length == size else pad(g, size), start, length)
        write_flat(p, start, padded[:length])

    def low_chunk(self, low: Tensor, start: int, size: int) -> None:
        """Overwrite a piece of the projected gradient by its direction."""
        if low.numel() == size:
            self._launch(low, low, start, size)
            return
        padded = pad(low, size)
        self._launch(padded, padded, start, low.numel())
        low.copy_(padded[: low.numel()])
