"""The step of one chunk: guards around a pure rule and a pure writer.

A kernel sees a chunk as rows of one block of the rule (`grain`), or of any
length where it has no blocks: a reduction along a row is a short loop, and what
is found there broadcasts along it.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lowmem.optim.contract import Pointwise
from lowmem.optim.engine.compiling.kernel import Kernel
from lowmem.optim.terms.fp32 import LARGEST
from lowmem.optim.terms.hyper import ChunkHyper
from lowmem.optim.writers import Writer

ROOT = 1e18
"""Gradient elements beyond it count as this: rules square them, and average what they have squared."""

SIGN = -(1 << 31)
"""The bit of the sign in the word of a float."""

Guard = Literal["elements", "given", "found"]
"""Who says whether a step is taken: each element for itself; `ok`, for the whole tensor; or `ok` again, which
the kernel finds out first, from the gradient, and writes down."""
Asks = Literal["step", "sums", "both"]
"""What is wanted of a pass over a tensor: a step; what a rule sums over it, and nothing else; or both."""


def _word(x: float) -> int:
    """The word that holds an fp32 number; without a sign, words are in the order of numbers, NaN last."""
    return int.from_bytes(struct.pack("<f", x), "little")


def _guarded(gradient: Tensor, ok: Tensor, bounded: bool) -> tuple[Tensor, Tensor]:
    """A gradient that is 0 where no step is taken, at most `ROOT` where it is bounded; and where one is."""
    word = gradient.view(torch.int32)
    size = word & ~SIGN
    # one comparison for NaN, Inf and a step that is not ok: with the largest number, or with -1
    finite = size <= ok.to(torch.int32) * (_word(LARGEST) + 1) - 1
    if bounded:  # integers, for a clamp of floats must let NaN through and takes four times as long
        gradient = (size.clamp_(max=_word(ROOT)) | (word & SIGN)).view(torch.float32)
    return torch.where(finite, gradient, 0.0), finite


def _count_(skipped: Tensor, finite: Tensor, ok: Tensor | None) -> None:
    """Count elements that are not finite: all of them, or those of each row; none where not ok.

    A step that is refused as a whole is counted as a whole, and by another.
    """
    # floats, row by row: a sum of booleans or over all at once is what would take the longest here
    bad = torch.where(finite, 0.0, 1.0).sum(-1, keepdim=True)
    bad = bad if skipped.dim() else bad.sum()
    skipped.add_((bad if ok is None else torch.where(ok, bad, 0.0)).to(skipped.dtype))


def body(
    rule: Pointwise | None,
    writer: Writer | None,
    keys: Sequence[str],
    held: Sequence[str],
    guard: Guard,
    asks: Asks = "step",
    counts: bool = False,
) -> Kernel:
    """A step of (rows, width) elements. Without a rule, g is the direction; without a writer, it becomes it.

    The kernel takes the weight and the gradient; lr and decay, (2,); ok; the counter of skipped elements,
    0-D or one for each row; what `Pointwise.scalars` gave; the first element of the chunk, those of its
    rows, (rows, 1), and the places in a row, (width,); the keys of the random streams; and the state. What
    nobody asks for is None.

    Args:
        keys: of the rule's state, in the order of the tensors; held: of the writer's, after them.
        guard: who says whether a step is taken; asks: for what.
        counts: the scalars are those of every age, (ages, k), and the age is not moved yet. Where the kernel
            finds out whether a step is taken, it moves the age itself.
    """
    streams = (rule.streams if rule else ()) + (writer.streams if writer else ())

    def run(
        w: Tensor, g: Tensor, rates: Tensor, ok: Tensor, skipped: Tensor, scalars: Tensor, start: Tensor,
        row: Tensor, column: Tensor, words: Tensor, *tensors: Tensor,
    ) -> None:  # fmt: skip
        state = dict(zip(keys, tensors[: len(keys)], strict=True))
        extra = dict(zip(held, tensors[len(keys) :], strict=True))
        gradient = g.float()
        if guard == "found":
            ok.copy_(gradient.abs().amax(-1).amax() <= LARGEST)
            if "age" in state and not counts:
                state["age"].sub_((~ok).to(torch.int32))  # it has moved already
        if counts:
            age = state["age"] + ok.to(torch.int32)
            if guard == "elements":
                state["age"] = age  # the rule sees the step that it takes; what is stored moves afterwards
            else:
                state["age"].copy_(age)
            scalars = scalars.index_select(0, age.view(1))[0]
        gradient, finite = _guarded(gradient, ok, rule is not None)
        position = start if start is None else row + start + column
        seen = (writer.read(w, extra) if writer else w.float()) if rule and rule.reads_weight else None
        hp = ChunkHyper(
            scalars, rates[0], rates[1], ok, finite, position, words, streams, seen,
            keeps=asks != "sums", measures=asks != "step",
        )  # fmt: skip
        direction, new = rule.step(gradient, state, hp) if rule else (gradient, {})
        direction = torch.where(finite, direction, 0.0)
        if writer is None and asks != "sums":
            g.copy_(direction)
        elif writer is not None:
            weight, kept = writer.write(w, direction, extra, hp, torch.where(finite, rates[1], 1.0))
            if w.dtype == torch.float16:  # others end where no weight is
                fits = weight.abs() <= torch.finfo(torch.float16).max
                weight = torch.where(fits, weight, w)
                kept = {name: torch.where(fits, value, extra[name]) for name, value in kept.items()}
                finite = finite & fits
            _count_(skipped, finite, None if guard == "elements" else ok)
            w.copy_(weight)
            for name, value in kept.items():
                extra[name].copy_(value)
        for name, value in new.items():
            state[name].copy_(value)

    return run
