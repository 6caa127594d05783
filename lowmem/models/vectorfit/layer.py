"""One linear layer of VectorFit: its frozen singular vectors, its trained vectors and the sum of both."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowmem.errors import UserError

DELTA, BIAS = "vectorfit_delta", "vectorfit_bias"


class Basis(nn.Module):
    """The leading singular vectors of a weight, frozen: buffers that are not saved.

    Args:
        weight: (m, n), of which they are taken in fp32.
        rank: how many, k.

    Attributes:
        U: (m, k); V: (k, n), its rows; both in the dtype of the weight, k (m + n) numbers.
    """

    U: Tensor
    V: Tensor

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        U, _, V = torch.linalg.svd(weight.detach().float(), full_matrices=False)
        for name, vectors in (("U", U[:, :rank]), ("V", V[:rank])):  # copies: a view would keep all of them
            held = vectors.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
            self.register_buffer(name, held, persistent=False)

    def forward(self, x: Tensor, delta: Tensor) -> Tensor:
        """((x V) * delta) U^T of x, (..., n); keeps k numbers of each token for the backward pass."""
        inner = F.linear(x.to(self.V.dtype), self.V)
        return F.linear(inner * delta.to(inner.dtype), self.U)

    def change(self, delta: Tensor) -> Tensor:
        """U diag(delta) V^T in fp32, (m, n)."""
        return (self.U.float() * delta.float()) @ self.V.float()


class VectorFit(nn.Module):
    """What a layer of PEFT does here; mix in before PEFT's `BaseTunerLayer`, see `tuner.layer_class`.

    Args:
        base_layer: nn.Linear or transformers' Conv1D; its weight is floating-point.
        adapter_name: of the first adapter; config: its configuration.

    Attributes:
        frozen: names of `vectors` that take no gradient now.
    """

    adapter_layer_names = (DELTA, BIAS)
    other_param_names = ("vectorfit_basis",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        self.vectorfit_delta = nn.ParameterDict()
        self.vectorfit_bias = nn.ParameterDict()
        self.vectorfit_basis = nn.ModuleDict()
        self.frozen: set[str] = set()
        self._disable_adapters, self.merged_adapters = False, list[str]()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self: Any, adapter_name: str, config: Any) -> None:
        """Add an adapter: singular vectors of the base weight, and zeros.

        Raises:
            UserError: the weight is held as codes.
        """
        base = self.get_base_layer()
        weight = self._seen(base.weight)
        if not weight.dtype.is_floating_point:
            raise UserError(
                f"adapter vectorfit: a {type(base).__name__} holds codes, and singular vectors would take "
                "several times their memory; leave quantize out, or take lora_rank"
            )
        rank = config.vectors_of(min(weight.shape))
        self.vectorfit_basis[adapter_name] = Basis(weight, rank)
        self.vectorfit_delta[adapter_name] = nn.Parameter(torch.zeros(rank))
        if base.bias is not None:
            self.vectorfit_bias[adapter_name] = nn.Parameter(torch.zeros(len(base.bias)))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _seen(self: Any, weight: Tensor) -> Tensor:
        """The weight as (m, n), or a change as the weight is held: Conv1D holds it transposed."""
        return weight if isinstance(self.get_base_layer(), nn.Linear) else weight.T

    def vectors(self: Any) -> dict[str, nn.Parameter]:
        """The trained vectors of the active adapters, by their name in this layer."""
        pairs = [(which, getattr(self, which)) for which in self.adapter_layer_names]
        return {
            f"{which}.{name}": held[name]
            for which, held in pairs
            for name in self.active_adapters
            if name in held
        }

    def _vector(self: Any, which: str, adapter: str) -> Tensor:
        """A trained vector as the forward pass takes it: of one that is frozen no gradient is made."""
        vector = getattr(self, which)[adapter]
        return cast(Tensor, vector.detach() if f"{which}.{adapter}" in self.frozen else vector)

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output and the adapters' changes of it."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        out: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return out
        for name in self.active_adapters:
            if name in self.vectorfit_delta:
                out = out + self.vectorfit_basis[name](x, self._vector(DELTA, name)).to(out.dtype)
            if name in self.vectorfit_bias:
                out = out + self._vector(BIAS, name).to(out.dtype)
        return out

    def get_delta_weight(self: Any, adapter: str) -> Tensor:
        """The change of the weight in fp32, of the base weight's shape."""
        change = self.vectorfit_basis[adapter].change(self.vectorfit_delta[adapter].detach())
        return cast(Tensor, self._seen(change))

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the changes to the base layer's weight and bias, in fp32 and rounded once.

        Raises:
            ValueError: with `safe_merge`, the result is not finite.
        """
        from peft.tuners.tuners_utils import check_adapters_to_merge

        for name in check_adapters_to_merge(self, adapter_names) or ():
            if name in self.vectorfit_delta:
                self._add_(name, 1.0, safe_merge)
                self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Take merged changes off again; of 16-bit weights the last bits stay changed."""
        while self.merged_adapters:
            self._add_(self.merged_adapters.pop(), -1.0, False)

    @torch.no_grad()
    def _add_(self: Any, adapter: str, sign: float, safe: bool) -> None:
        base = self.get_base_layer()
        sums = {base.weight: self.get_delta_weight(adapter)}
        if adapter in self.vectorfit_bias:
            sums[base.bias] = self.vectorfit_bias[adapter].float()
        for p, change in sums.items():
            change = p.float().add(change, alpha=sign).to(p.dtype)
            if safe and not bool(change.isfinite().all()):
                raise ValueError(f"adapter {adapter!r}: the merged weight is not finite")
            p.copy_(change)
