"""A weight held as int8 codes that looks like one of its compute dtype.

    bytes of an (m, n) weight: m n + 4 m n / 256

It is a parameter like any other: gradients have its compute dtype, hooks, release, tied weights,
`state_dict` and `deepcopy` see one tensor. There is no other copy. Layers decode it when they run
and again in the backward pass (`products`); any other operation gets a decoded tensor and keeps,
for backward, the codes. What changes it is the step (`writer`) and `copy_`, nothing else.

torchao has a trainable int8 tensor. It is not taken: an in-place operation decodes all of it, so a
step would hold a second weight; its scales have the weight's 16 bits, with which a hundred steps of
length zero change two codes in three; its rounding draws from the global generator, so a resumed run
differs; and weight decay is an operation that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.int8.coding import BLOCK, blocks, decoded, divides, encoded, pieces

aten = torch.ops.aten
PRODUCTS: dict[Any, Callable[..., Any]] = {}
"""What is called instead of a function of torch: `products`."""


class Int8Weight(Tensor):
    """int8 codes and their scales as one tensor.

    Args:
        codes: int8, contiguous, in the shape of the weight.
        scale: fp32, one for 256 consecutive elements.
        dtype: what it looks like: of products and gradients.

    Example:
        >>> weight = Int8Weight.of(torch.tensor([[1.0, -0.5]]))
        >>> weight.codes.tolist(), weight.dtype, weight.decode().tolist()
        ([[127, -64]], torch.float32, [[1.0, -0.5039370059967041]])
    """

    codes: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Int8Weight:
        """Make what looks like a tensor of this dtype and holds none."""
        return Tensor._make_wrapper_subclass(
            cls, codes.shape, strides=codes.stride(), dtype=dtype, device=codes.device
        )

    def __init__(self, codes: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, x: Tensor) -> Int8Weight:
        """The nearest codes of a tensor; it is looked at in fp32 piece by piece."""
        made = cls.empty(x.shape, x.dtype, x.device)
        made.store_(x)
        return made

    @classmethod
    def empty(cls, shape: Any, dtype: torch.dtype, device: torch.device | str | None = None) -> Int8Weight:
        """One of this shape, not filled.

        Raises:
            UserError: a stack of matrices that are no multiple of a block each.
        """
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        if not divides(codes.shape):
            raise UserError(
                f"int8 weights: a stack of matrices of {codes[0].numel()} elements, which is no multiple of "
                f"{BLOCK}; leave it in {dtype}"
            )
        scale = torch.empty(blocks(codes.numel()), dtype=torch.float32, device=device)
        return cls(codes, scale, dtype)

    def store_(self, x: Tensor) -> None:
        """Take the nearest codes of a tensor of this shape."""
        flat = x.detach().reshape(-1)
        for start, stop in pieces(self.codes):
            self.encode_(start, flat[start:stop])

    def encode_(self, start: int, values: Tensor) -> None:
        """Take the nearest codes of flat elements from `start`, the beginning of a block, on."""
        stop = start + values.numel()
        codes, scale = encoded(values)
        self.codes.view(-1)[start:stop] = codes
        self.scale[start // BLOCK : blocks(stop)] = scale

    def flat(self, start: int, stop: int) -> Tensor:
        """Elements start..stop in fp32, row by row."""
        first, last = start // BLOCK, blocks(stop)
        seen = decoded(self.codes.view(-1)[first * BLOCK : last * BLOCK], self.scale[first:last])
        return seen[start - first * BLOCK : stop - first * BLOCK]

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """All of it as an ordinary tensor, of its own dtype unless another is named."""
        out = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
        flat = out.view(-1)
        for start, stop in pieces(self.codes):
            flat[start:stop] = self.flat(start, stop)
        return out

    def matrix(self, i: int) -> Int8Weight:
        """A view of one matrix of a stack."""
        return Int8Weight(self.codes[i], self.scale.view(len(self.codes), -1)[i], self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["codes", "scale"], self.dtype

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, dtype: torch.dtype, *_: Any) -> Int8Weight:
        return cls(inner["codes"], inner["scale"], dtype)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Int8Weight(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        parameter = bool(getattr(self, "_is_param", False))
        return _restored, (self.codes, self.scale, self.dtype, self.requires_grad, parameter)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Layers have products of their own; all else is as it is for any tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return PRODUCTS.get(func, func)(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """What is known of codes; otherwise the operation on what they stand for."""
        if func in KNOWN:
            return KNOWN[func](func, *args, **(kwargs or {}))
        if func in SPLITS:
            raise UserError("int8 weights cannot be sharded yet (FSDP2); leave one of the two out")
        if func in LIKE:
            whole = torch.empty((), dtype=args[0].dtype, device=args[0].device).expand(args[0].shape)
            return func(whole, *args[1:], **(kwargs or {}))
        if func._schema.is_mutable and isinstance(args[0], Int8Weight):
            raise UserError(f"int8 weights change by a step of their optimizer or by copy_, not by {func}")
        plain, named = torch.utils._pytree.tree_map_only(Int8Weight, Int8Weight.decode, (args, kwargs or {}))
        return func(*plain, **named)


def _restored(codes: Tensor, scale: Tensor, dtype: torch.dtype, grad: bool, parameter: bool) -> Tensor:
    made = Int8Weight(codes, scale, dtype)
    return torch.nn.Parameter(made, grad) if parameter else made.requires_grad_(grad)


def _same(func: Any, x: Int8Weight, *_: Any, **__: Any) -> Int8Weight:
    return Int8Weight(x.codes, x.scale, x.dtype)


def _clone(func: Any, x: Int8Weight, **_: Any) -> Int8Weight:
    return Int8Weight(x.codes.clone(), x.scale.clone(), x.dtype)


def _moved(func: Any, x: Int8Weight, *, dtype: Any = None, device: Any = None, **more: Any) -> Int8Weight:
    fast = bool(more.get("non_blocking", False))
    codes, scale = (t.to(device or t.device, non_blocking=fast, copy=True) for t in (x.codes, x.scale))
    return Int8Weight(codes, scale, dtype or x.dtype)


def _copied(func: Any, x: Tensor, source: Tensor, *_: Any) -> Tensor:
    if isinstance(x, Int8Weight) and isinstance(source, Int8Weight):
        x.codes.copy_(source.codes)
        x.scale.copy_(source.scale)
    elif isinstance(x, Int8Weight):
        x.store_(source.expand(x.shape))
    else:
        x.copy_(cast("Int8Weight", source).decode())
    return x


def _selected(func: Any, x: Int8Weight, dim: int, index: int) -> Tensor:
    if x.dim() > 2 and dim == 0:
        return x.matrix(index)
    found: Tensor = func(x.decode(), dim, index)
    return found


KNOWN: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _moved,
    aten.copy_.default: _copied,
    aten.select.int: _selected,
}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default}
"""What sharding begins with."""
LIKE = {
    aten.empty_like.default, aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.rand_like.default, aten.randn_like.default, aten.new_empty.default, aten.new_zeros.default,
    aten.new_ones.default, aten.new_full.default, aten.new_empty_strided.default,
}  # fmt: skip
"""They ask for shape, dtype and device alone."""


def is_coded(x: Any) -> bool:
    """Whether a tensor is held as int8 codes."""
    return isinstance(x, Int8Weight)
