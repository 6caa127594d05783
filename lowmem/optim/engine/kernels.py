"""The step of one chunk: guards around a pure rule and a pure writer, and how it is compiled.

A kernel sees a chunk as rows of one block of the rule (`grain`), or of any
length where it has no blocks: a reduction along a row is a short loop, and what
is found there broadcasts along it.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor

from lowmem.optim.contract import Pointwise
from lowmem.optim.hyper import ChunkHyper
from lowmem.optim.writers import Writer

LARGEST = torch.finfo(torch.float32).max
ROOT = 1e18
"""Gradient elements beyond it count as this: rules square them, and average what they have squared."""

Kernel = Callable[..., None]

Guard = Literal["elements", "given", "found"]
"""Who says whether a step is taken: each element for itself; `ok`, for the whole tensor; or `ok` again, which
the kernel finds out first, from the gradient, and writes down."""


def body(
    rule: Pointwise | None, writer: Writer | None, keys: Sequence[str], held: Sequence[str], guard: Guard
) -> Kernel:
    """A step of (rows, width) elements. Without a rule, g is the direction; without a writer, it becomes it.

    The kernel takes the weight and the gradient; lr and decay, (2,); ok; the counter of skipped elements;
    what `Pointwise.scalars` gave; the first element of the chunk, those of its rows, (rows, 1), and the
    places in a row, (width,); the keys of the random streams; and the state. What nobody asks for is None.

    Args:
        keys: of the rule's state, in the order of the tensors; held: of the writer's, after them.
        guard: who says whether a step is taken.
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
            if "age" in state:
                state["age"].sub_((~ok).to(torch.int32))  # it has moved already
        # one comparison for NaN, Inf and a step that is not ok
        finite = gradient.abs() <= torch.where(ok, LARGEST, -1.0)
        gradient = torch.where(finite, gradient.clamp(-ROOT, ROOT) if rule else gradient, 0.0)
        position = start if start is None else row + start + column
        seen = w.float() if rule and rule.reads_weight else None
        hp = ChunkHyper(scalars, rates[0], rates[1], ok, finite, position, words, streams, seen)
        direction, new = rule.step(gradient, state, hp) if rule else (gradient, {})
        direction = torch.where(finite, direction, 0.0)
        if writer is None:
            g.copy_(direction)
        else:
            weight, kept = writer.write(w, direction, extra, hp, torch.where(finite, rates[1], 1.0))
            if w.dtype == torch.float16:  # others end where no weight is
                fits = weight.abs() <= torch.finfo(torch.float16).max
                weight = torch.where(fits, weight, w)
                kept = {name: torch.where(fits, value, extra[name]) for name, value in kept.items()}
                finite = finite & fits
            # floats, row by row: a sum of booleans or over all at once is what would take the longest here
            bad = torch.where(finite, 0.0, 1.0).sum(-1).sum()
            # a step that is refused as a whole is counted as a whole, and by another
            skipped.add_((bad if guard == "elements" else torch.where(ok, bad, 0.0)).to(torch.int64))
            w.copy_(weight)
            for name, value in kept.items():
                extra[name].copy_(value)
        for name, value in new.items():
            state[name].copy_(value)

    return run


OPTIONS = {
    "emulate_precision_casts": True,  # a cast to 16 bits and back rounds, and must not be dropped
    "assert_indirect_indexing": False,  # codes cannot point outside their table: checks cost a third
}


_NUMBERS = itertools.count()


def compiled(step: Kernel) -> Kernel:
    """Compile a kernel on its own."""
    return _Compiled(step)


class _Compiled:
    """A kernel that compiles itself when it is first called.

    Calling what `torch.compile` gives takes tens of microseconds, and hundreds where other work has
    emptied the caches: more than the kernel itself for most tensors of a model. Nothing of that is
    needed after the first call, as the cache of kernels fixes dtypes, widths and device: what was
    generated is called directly, with the tensors in the order in which it took them the first time.

    The number of rows is left open, where tensors have any: one kernel serves chunks of all sizes.
    """

    def __init__(self, step: Kernel) -> None:
        # recompilations are counted for each code object, and sizes that changed remembered for each name
        code = step.__code__.replace(co_name=f"lowmem_kernel_{next(_NUMBERS)}")
        own = types.FunctionType(code, step.__globals__, code.co_name, step.__defaults__, step.__closure__)
        self._whole = torch.compile(own, backend=self._backend, fullgraph=True)
        self._graphs: list[Any] = []
        self._taken: list[Tensor | int] = []
        self._order: list[int] = []
        self._direct: Kernel = self._whole

    def __call__(self, *tensors: Tensor | None) -> None:
        if self._order:
            rows = _rows(tensors)
            self._direct([rows if i < 0 else tensors[i] for i in self._order])
            return
        rows = _leave_rows_open(tensors)
        self._whole(*tensors)
        places = {id(tensor): i for i, tensor in enumerate(tensors)}
        order = [self._place(x, places, rows) for x in self._taken]
        found = [i for i in order if i is not None]
        if len(self._graphs) == 1 and len(found) == len(order):
            self._order = found
            # past the wrapper around it, which serves caches and profilers of torch.compile
            self._direct = getattr(self._graphs[0], "current_callable", None) or self._graphs[0]
        self._taken = []

    @staticmethod
    def _place(x: Tensor | int, places: dict[int, int], rows: int) -> int | None:
        """Where among the tensors one that the graph takes is found; -1 for the number of rows."""
        if isinstance(x, int):
            return -1 if x == rows else None
        return places.get(id(x))

    def _backend(self, graph: Any, inputs: Any) -> Any:
        from torch._inductor import config
        from torch._inductor.cpu_vec_isa import VecISA
        from torch._inductor.exc import CppCompileError, InductorError

        if config.cpp.vec_isa_ok is not None:
            return self._build(graph, inputs)
        try:
            # what the processor says it can, g++ can too; compiling a test for all of it takes ten seconds
            with patch.object(VecISA, "check_build", lambda instructions, code: True):
                return self._build(graph, inputs)
        except InductorError as error:
            if not isinstance(error.inner_exception, CppCompileError):
                raise
            _forget_instructions()
            self._graphs.clear()
            return self._build(graph, inputs)

    def _build(self, graph: Any, inputs: Any) -> Any:
        from torch._functorch import config
        from torch._inductor.compile_fx import compile_fx

        with config.patch(enable_autograd_cache=False):  # a hit there would not come by `_generate`
            return compile_fx(graph, inputs, inner_compile=self._generate, config_patches=OPTIONS)

    def _generate(self, graph: Any, inputs: Any, **more: Any) -> Any:
        from torch._inductor.compile_fx import compile_fx_inner

        generated = compile_fx_inner(graph, inputs, **more)
        self._graphs.append(generated)

        def call(tensors: list[Tensor | int]) -> Any:
            given = list(tensors)  # it empties what it is given
            outputs = generated(tensors)
            # an output would be for torch.compile to put where it belongs
            self._taken = [] if outputs else given
            return outputs

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


def _forget_instructions() -> None:
    """Let Inductor find out anew what the compiler takes: every set of instructions remembers its claim."""
    from torch._inductor.cpu_vec_isa import supported_vec_isa_list, valid_vec_isa_list

    valid_vec_isa_list.cache_clear()
    for instructions in supported_vec_isa_list:
        for found in ("_is_avx512_bf16_supported", "_is_amx_fp16_supported"):
            vars(instructions).pop(found, None)  # of the class, False
        for kind in type(instructions).__mro__:
            for member in vars(kind).values():
                getattr(member, "cache_clear", lambda: None)()


def _rows(tensors: Sequence[Tensor | None]) -> int:
    """Rows of a chunk: its weight comes first."""
    weight = tensors[0]
    assert weight is not None
    return weight.shape[0]


def _leave_rows_open(tensors: Sequence[Tensor | None]) -> int:
    """Mark the rows of chunks as a size that changes; gives their number now."""
    rows = _rows(tensors)
    for tensor in tensors if rows > 1 else ():  # a size of 1 is always taken as fixed
        if tensor is not None and tensor.dim() == 2 and tensor.shape[0] == rows:
            torch._dynamo.mark_dynamic(tensor, 0)
    return rows
