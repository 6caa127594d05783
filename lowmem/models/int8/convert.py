"""A model's matrices as int8 codes that train.

Linear layers of either orientation and stacks of experts are converted; embedding and head where that is
asked for. What has one dimension, convolutions and fp32 leftovers such as position tables stay. See
`lowmem.optim.int8` for the tensor.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lowmem.errors import UserError, nearest
from lowmem.optim.int8.coding import BLOCK, divides
from lowmem.optim.int8.tensor import Int8Weight
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors import roles

KINDS = ("int8",)
ENDS = ("embedding", "head")
Model = TypeVar("Model", bound=nn.Module)


def quantize_weights_(model: Model, kind: str = "int8", *, embeddings: bool = False) -> Model:
    """Hold the matrices of a model as int8 codes with a scale for each 256, and nothing else of their size.

        w = scale c,    bytes of an (m, n) weight: m n + 4 m n / 256

    They stay ordinary parameters: gradients have the dtype that the weight had, every first-order
    method steps them, a decoded weight lives for the length of a layer's product (Q-GaLore,
    arXiv 2407.08296; ECO, arXiv 2601.22101). Make the optimizer afterwards.

    Args:
        model: any module; tied weights stay tied.
        kind: int8.
        embeddings: embedding and head too.

    Returns:
        The model.

    Raises:
        UserError: an unknown kind; weights that are quantized already, sharded, or under adapters; a stack
            of matrices that are no multiple of 256 elements.

    Example:
        >>> model = quantize_weights_(nn.Linear(16, 16, bias=False))
        >>> model.weight.codes.dtype, held_bytes(model)
        (torch.int8, 260)
    """
    if kind not in KINDS:
        raise UserError(f"weights: unknown kind {kind!r}; {nearest(kind, KINDS)}")
    _refuse(model)
    wanted = set(chosen(model, embeddings=embeddings))
    _check_stacks(model, wanted)
    made: dict[int, nn.Parameter] = {}
    kept = []  # an id stands for its tensor as long as that lives
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None and id(p) in wanted:
                if id(p) not in made:
                    made[id(p)] = coded(p, p.requires_grad)
                    kept.append(_shell(p))
                module._parameters[name] = made[id(p)]
    return model


def coded(x: Tensor, trains: bool = True) -> nn.Parameter:
    """A parameter of the codes nearest to a tensor; on tensors without memory, of their shape."""
    if x.device.type == "meta" or hasattr(x, "fake_mode"):
        return nn.Parameter(Int8Weight.empty(x.shape, x.dtype, x.device), trains)
    return nn.Parameter(Int8Weight.of(x.detach()), trains)


def _shell(p: nn.Parameter) -> nn.Parameter:
    """The parameter without its memory: each weight is freed before the next is converted."""
    if not hasattr(p, "fake_mode"):
        p.data = torch.empty(0, dtype=p.dtype, device=p.device)
    return p


def chosen(model: nn.Module, *, embeddings: bool = False) -> Iterator[int]:
    """The ids of the parameters that are held as codes."""
    found = roles.find(model)
    for name, p in model.named_parameters():
        role = roles.refined(found.get(name, "matrix"), p.shape)
        layer = p.dim() == 3 or (p.dim() == 2 and name.rpartition(".")[2] == "weight")
        ends = role in ENDS and embeddings
        if p.is_floating_point() and (ends or (role == "matrix" and layer)):
            yield id(p)


def weights(model: nn.Module) -> dict[str, Int8Weight]:
    """The weights of a model that are held as codes, by name."""
    return {name: p for name, p in model.named_parameters() if isinstance(p, Int8Weight)}


def held_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are held: codes and scales of those that are int8."""
    parts: list[Any] = []
    for p in model.parameters():
        parts += [p.codes, p.scale] if isinstance(p, Int8Weight) else [p]
    return sum(part.numel() * part.element_size() for part in parts)


def dead_time(model: nn.Module, lr: float) -> float:
    """Steps of length lr after which half of the codes have moved by half a spacing: q / (2 lr).

    A step of most methods is about lr long. Where this is not well under the steps of a run, `nearest` stalls
    and `eco` moves late.

    >>> round(dead_time(quantize_weights_(nn.Linear(4, 4)), 1e-5)) > 1
    True
    """
    spacings = [p.scale.median() for p in weights(model).values()]
    if not spacings or lr <= 0:
        return 0.0
    return float(torch.stack(spacings).median()) / (2 * lr)


def late(model: nn.Module, strategy: Strategy, lr: float, steps: int) -> str:
    """What to say of a run whose codes move late, if they move; empty where there is nothing to say.

    Args:
        model: with int8 weights or without; strategy: that trains it; lr: its largest; steps: of the run.
    """
    writer, wait = type(strategy.writer).__name__.lower(), dead_time(model, lr)
    if writer not in ("eco", "nearest") or wait * 10 <= steps:
        return ""
    stalls = "shorter ones are lost" if writer == "nearest" else "until then errors gather"
    return (
        f"writer {writer}: a code moves after about {wait:.0f} steps of length lr, {stalls}, and the run has "
        f"{steps}; take writer=stochastic, or a higher lr"
    )


def _refuse(model: nn.Module) -> None:
    """Refuse models that cannot be converted."""
    if weights(model):
        raise UserError("weights int8: the weights of this model are int8 already; leave it out")
    if hasattr(model, "peft_config"):
        raise UserError("weights int8: under adapters weights are frozen; take quantize nf4 for them")
    packed = any(hasattr(p, "quant_state") or not p.is_floating_point() for p in model.parameters())
    if packed or getattr(model, "is_quantized", False):
        raise UserError("weights int8: this model is quantized already; load its weights of 16 bits")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError(
            "weights int8: this model is sharded (FSDP2), which is not possible yet; leave one out"
        )


def _check_stacks(model: nn.Module, wanted: Container[int]) -> None:
    """Refuse stacks that scales do not divide, before a weight is converted and its memory given back."""
    for name, p in model.named_parameters():
        if id(p) in wanted and not divides(p.shape):
            raise UserError(
                f"weights int8: {name} is a stack of matrices of {p[0].numel()} elements, which is no "
                f"multiple of {BLOCK}; leave weights out"
            )
