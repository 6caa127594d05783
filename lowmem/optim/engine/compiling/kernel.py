"""How a kernel is compiled, and called without what `torch.compile` puts around it.

Calling what `torch.compile` gives takes tens of microseconds, and hundreds where other work has
emptied the caches: more than the kernel itself for most tensors of a model. Nothing of that is
needed after the first call, as the cache of kernels fixes dtypes, widths and device: what was
generated is called directly, with the tensors in the order in which it took them the first time.
It asks for the current stream at every call and was made for one device, whatever thread calls.

The number of rows is left open, where tensors have any: one kernel serves chunks of all sizes.

The ways to what was generated are no public ones (see `private`); where one is not there the public
call serves as well, only later.
"""

from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lowmem.optim.engine.compiling.private import ABSENT, look, private, say
from lowmem.optim.engine.compiling.processor import forget_instructions, instructions_believed, refused
from lowmem.optim.engine.compiling.vectors import whole_vectors

Kernel = Callable[..., None]

OPTIONS = {
    "emulate_precision_casts": True,  # a cast to 16 bits and back rounds, and must not be dropped
    "assert_indirect_indexing": False,  # codes cannot point outside their table: checks cost a third
}
VARIANTS = 16
"""Kernels of one step, for sizes that were taken as fixed."""
_NUMBERS = itertools.count()


def compiled(step: Kernel) -> Kernel:
    """Compile a kernel on its own."""
    return Compiled(step)


class Compiled:
    """A kernel that compiles itself when it is first called, and anew for sizes that were taken as fixed.

    Args:
        step: works in place on what it is given; the rows of its first tensor are the number left open.
    """

    def __init__(self, step: Kernel) -> None:
        # recompilations are counted for each code object, and sizes that changed remembered for each name
        code = step.__code__.replace(co_name=f"lowmem_kernel_{next(_NUMBERS)}")
        self._step = types.FunctionType(
            code, step.__globals__, code.co_name, step.__defaults__, step.__closure__
        )
        self._whole: Kernel = torch.compile(self._step, backend=self._backend, fullgraph=True)
        self._missing: Exception | None = None
        self._graphs: list[Any] = []
        self._taken: list[Tensor | int] = []
        self._order: list[int] = []
        self._fixed: list[tuple[int, torch.Size]] = []
        self._open: list[tuple[int, int]] = []
        self._others: list[Compiled] = []
        self._direct: Kernel = self._whole

    def __call__(self, *tensors: Tensor | None) -> None:
        if not self._order:
            self._begin(tensors)
        elif self._fits(tensors):
            self._again(*tensors)
        else:
            self._other(tensors)(*tensors)

    def fitting(self, *tensors: Tensor | None) -> Kernel:
        """What calls it with these tensors, and with others of their sizes, of which none is looked at."""
        found = self if not self._order or self._fits(tensors) else self._other(tensors)
        return found._again if isinstance(found, Compiled) and found._order else self

    def _again(self, *tensors: Tensor | None) -> None:
        rows = _rows(tensors)
        self._direct([rows if i < 0 else tensors[i] for i in self._order])

    def _begin(self, tensors: Sequence[Tensor | None]) -> None:
        """Compile; what the compiler is told of sizes is not left on the caller's tensors."""
        seen = {id(x): x.detach() for x in tensors if x is not None}
        told = [None if x is None else seen[id(x)] for x in tensors]
        rows = _leave_rows_open(told)
        self._taken = []
        self._call(*told)
        self._remember(told, rows)

    def _other(self, tensors: Sequence[Tensor | None]) -> Kernel:
        """The kernel for sizes that this one was not made for; too many of them go by the public call."""
        for other in self._others:
            if not other._order or other._fits(tensors):
                self._others.remove(other)
                self._others.insert(0, other)
                return other
        if len(self._others) == VARIANTS:
            say("a kernel is called with too many sizes: called publicly")
            return self._whole
        self._others.insert(0, type(self)(self._step))
        return self._others[0]

    def _call(self, *tensors: Tensor | None) -> None:
        """By what is public; nothing has been written where compiling fails."""
        try:
            self._whole(*tensors)
        except Exception:
            if self._missing is None:
                raise
            say(f"torch {torch.__version__} compiles otherwise than known ({self._missing}): called publicly")
            self._missing, self._graphs = None, []
            options = private("torch._inductor.list_options")
            known: dict[str, Any] = {
                key: value for key, value in OPTIONS.items() if options and key in options()
            }
            self._whole = torch.compile(self._step, fullgraph=True, options=known)
            self._whole(*tensors)

    def _remember(self, tensors: Sequence[Tensor | None], rows: int) -> None:
        """Call directly from now on, if one graph takes nothing but these tensors and gives nothing back."""
        places = {id(tensor): i for i, tensor in enumerate(tensors)}
        order = [self._place(x, places, rows) for x in self._taken]
        found = [i for i in order if i is not None]
        self._taken = []
        if len(self._graphs) != 1 or len(found) != len(order):
            return
        self._order = found
        opened = rows if -1 in found else -1
        for i, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if (place := _place_of_rows(tensor, opened)) is None:
                self._fixed.append((i, tensor.shape))
            else:
                self._open.append((i, place))
        # past the wrapper around it, which serves caches and profilers of torch.compile
        within = look(self._graphs[0], "current_callable")
        if within is ABSENT:
            say(f"torch {torch.__version__} has no current_callable: graphs are called whole")
        self._direct = self._graphs[0] if within is ABSENT else within

    def _fits(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether what is cut into rows has as many as the weight, and all else its first size."""
        rows = _rows(tensors)
        for i, place in self._open:  # one that had as many by chance does not later
            tensor = tensors[i]
            if tensor is None or tensor.shape[place] != rows:
                return False
        for i, shape in self._fixed:
            tensor = tensors[i]
            if tensor is None or tensor.shape != shape:
                return False
        return True

    @staticmethod
    def _place(x: Tensor | int, places: dict[int, int], rows: int) -> int | None:
        """Where among the tensors one that the graph takes is found; -1 for the number of rows."""
        if isinstance(x, int):
            return -1 if x == rows else None
        return places.get(id(x))

    def _backend(self, graph: Any, inputs: Any) -> Any:
        try:
            if private("torch._inductor.config.cpp.vec_isa_ok") is not None:
                return self._build(graph, inputs)
            with instructions_believed():
                return self._build(graph, inputs)
        except Exception as error:
            if not refused(error):
                raise
            forget_instructions()
            self._graphs.clear()
            return self._build(graph, inputs)

    def _build(self, graph: Any, inputs: Any) -> Any:
        compile_fx = private("torch._inductor.compile_fx.compile_fx")
        try:
            if compile_fx is None or private("torch._inductor.compile_fx.compile_fx_inner") is None:
                raise AttributeError("no compile_fx")
            with _no_cache(), whole_vectors():  # a hit in the cache would not come by `_generate`
                return compile_fx(graph, inputs, inner_compile=self._generate, config_patches=OPTIONS)
        except (AttributeError, ImportError, TypeError) as error:
            self._missing = error
            raise

    def _generate(self, graph: Any, inputs: Any, **more: Any) -> Any:
        generated = private("torch._inductor.compile_fx.compile_fx_inner")(graph, inputs, **more)
        self._graphs.append(generated)

        def call(tensors: list[Tensor | int]) -> Any:
            given = list(tensors)  # it empties what it is given
            outputs = generated(tensors)
            # an output would be for torch.compile to put where it belongs
            self._taken = [] if outputs else given
            return outputs

        call._boxed_call = True  # type: ignore[attr-defined]
        return call


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Without the cache of torch.compile that goes past inner compilers."""
    config = private("torch._functorch.config")
    if private("torch._functorch.config.enable_autograd_cache") is None:
        yield
        return
    with config.patch(enable_autograd_cache=False):
        yield


def _rows(tensors: Sequence[Tensor | None]) -> int:
    """Rows of a chunk: its weight comes first. A vector has none that are left open."""
    weight = tensors[0]
    assert weight is not None
    return weight.shape[0] if weight.dim() > 1 else 1


def _place_of_rows(tensor: Tensor, rows: int) -> int | None:
    """Which of a tensor's sizes is the number of rows: (rows, width), or (..., rows, 1) of more."""
    place = 0 if tensor.dim() == 2 else tensor.dim() - 2
    return place if tensor.dim() > 1 and tensor.shape[place] == rows else None


def _leave_rows_open(tensors: Sequence[Tensor | None]) -> int:
    """Mark the rows of chunks as a size that changes; gives their number now."""
    rows, mark = _rows(tensors), private("torch._dynamo.mark_dynamic")
    for tensor in tensors if rows > 1 and mark else ():  # a size of 1 is always taken as fixed
        if tensor is not None and (place := _place_of_rows(tensor, rows)) is not None:
            mark(tensor, place)
    return rows
