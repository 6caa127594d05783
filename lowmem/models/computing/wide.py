"""Products of 16-bit numbers in fp32, where a processor has no instructions for them.

torch multiplies bf16 element by element there, one core alone in some directions: a step of a model takes
tens of minutes. Under `wide` the factors of each product are cast, the larger one strip by strip, and the
result is rounded once, as instructions round it. Weights, activations and gradients stay what they are, and
so do their bytes but for a strip; what is saved for the backward pass is what would be saved anyway.

It is entered around whatever runs a model on a processor: a step, an evaluation, an answer, and the plan of
them. Elsewhere, and for fp32 models, it is nothing. Products inside sharded tensors stay torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from lowmem.optim.terms.products import HALF, in_fp32, native

_on: ContextVar[bool] = ContextVar("wide", default=False)


class Wide(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Takes products of 16-bit matrices in fp32 while it is entered."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """What is compiled meanwhile, such as the kernels of an optimizer, is compiled as ever."""
        return True

    def __enter__(self) -> Any:
        self._token = _on.set(True)
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        _on.reset(self._token)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of a product, ours."""
        ours = PRODUCTS.get(func)
        called = func if ours is None or not _takes(*args[-2:]) else ours
        return called(*args, **(kwargs or {}))


def wide(model: nn.Module, dtype: torch.dtype | None = None) -> AbstractContextManager[Any]:
    """The mode, where a model on this processor needs it and it is not entered already.

    Args:
        model: its first parameter says where it is.
        dtype: that autocast computes in, if it does.

    Example:
        >>> model = nn.Linear(4, 4, dtype=torch.bfloat16)
        >>> with wide(model):
        ...     model(torch.ones(2, 4, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """
    first = next(model.parameters(), None)
    if _on.get() or first is None or first.device.type != "cpu":
        return nullcontext()
    dtypes = {dtype, *(p.dtype for p in model.parameters())}
    if all(native(one) for one in dtypes.intersection(HALF)):
        return nullcontext()
    return Wide()  # type: ignore[no-untyped-call]


def _takes(a: Tensor, b: Tensor) -> bool:
    plain = not (is_traceable_wrapper_subclass(a) or is_traceable_wrapper_subclass(b))
    return plain and a.device.type == "cpu" and a.dtype == b.dtype and a.dtype in HALF


def _addmm(base: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return in_fp32(a, b, base, beta=beta, alpha=alpha)


PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.mm.default: in_fp32,
    torch.ops.aten.bmm.default: in_fp32,
    torch.ops.aten.addmm.default: _addmm,
    torch.ops.aten.baddbmm.default: _addmm,
}
"""Ours of torch's."""
