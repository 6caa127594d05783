"""Adaptive vector freezing: vectors of VectorFit that moved most stand still for a while (arXiv 2503.19530).

    s_v <- beta s_v + (1 - beta) mean |v - v_0|    after a step, of each vector of singular values or biases
    every `every` steps from `warmup` on:          the `freeze` strongest stand still, those of before go on

v_0 is the pre-trained vector and what is trained is v - v_0, so that only s is held, 4 bytes per vector. A
frozen one is left out of the backward pass by its layer: without a gradient no optimizer steps or decays
it, and its state waits. The strengths go through checkpoints in full: a resumed run ranks as one that was
not interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowmem.errors import UserError
from lowmem.models.vectorfit.layer import VectorFit
from lowmem.models.vectorfit.tuner import amount


class VectorFreezing(TrainerCallback, ExportableState):
    """Freezes the vectors of a model of VectorFit in turn; our Trainers add it, others take it as a callback.

    Args:
        freeze: how many at a time: a number, below 1 a share of them.
        warmup: steps before the first; every: steps until others are frozen.
        beta: of the average of strengths.

    Attributes:
        frozen: names of those that stand still.

    Example:
        >>> VectorFreezing(freeze=0.1, warmup=100, every=50, beta=0.9).frozen
        []
    """

    def __init__(self, freeze: float, warmup: int, every: int, beta: float) -> None:
        self.freeze, self.warmup, self.every, self.beta = freeze, warmup, every, beta
        self.frozen: list[str] = []
        self.strengths: dict[str, float] | Tensor = {}
        self._vectors: dict[str, nn.Parameter] = {}

    def state(self) -> dict[str, Any]:
        """For the checkpoint: exact, for a 32-bit number is one of JSON's."""
        own = {"freeze": self.freeze, "warmup": self.warmup, "every": self.every, "beta": self.beta}
        s = self.strengths
        held = dict(zip(self._vectors, s.tolist(), strict=True)) if isinstance(s, Tensor) else s
        return {"args": own, "attributes": {"strengths": held, "frozen": self.frozen}}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin with nothing frozen, or as the checkpoint was left.

        Raises:
            UserError: all vectors would be frozen, or the checkpoint has others.
        """
        self._vectors = {f"{where}.{name}": p for where, _, name, p in vectors(model)}
        count = len(self._vectors)
        if amount(self.freeze, count) >= count:
            raise UserError(f"freeze {self.freeze:g}: there are {count} vectors, one at least is to train")
        past: Any = state.stateful_callbacks if state.global_step else {}
        found = past.get(type(self).__name__, {}).get("attributes", {"strengths": {}, "frozen": []})
        before = found["strengths"] or dict.fromkeys(self._vectors, 0.0)
        if before.keys() != self._vectors.keys():
            raise UserError("the checkpoint's vectors are not those of the model: start afresh")
        self.strengths = torch.tensor([before[name] for name in self._vectors], dtype=torch.float32)
        self._still_(model, found["frozen"])

    @torch.no_grad()
    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Measure the vectors, and change those that are frozen where it is time to."""
        moved = [p.detach().abs().mean(dtype=torch.float32) for p in self._vectors.values()]
        now = torch.stack([x.to(moved[0].device) for x in moved])
        before = torch.as_tensor(self.strengths).to(now.device)
        self.strengths = self.beta * before + (1 - self.beta) * now
        past = state.global_step - self.warmup
        if past >= 0 and past % self.every == 0:
            ranked = self.strengths.sort(descending=True, stable=True).indices.tolist()
            names = list(self._vectors)
            self._still_(model, [names[i] for i in ranked[: amount(self.freeze, len(names))]])

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leave the model as it was found."""
        self._still_(model, [])

    def _still_(self, model: nn.Module, frozen: list[str]) -> None:
        """Freeze these vectors and no others."""
        self.frozen, chosen = frozen, set(frozen)
        for where, layer, name, _ in vectors(model):
            (layer.frozen.add if f"{where}.{name}" in chosen else layer.frozen.discard)(name)


def vectors(model: nn.Module) -> Iterator[tuple[str, VectorFit, str, nn.Parameter]]:
    """The trained vectors of a model: the layer's name, the layer, the vector's name in it, the vector."""
    for where, layer in model.named_modules():
        if isinstance(layer, VectorFit):
            for name, p in layer.vectors().items():
                yield where, layer, name, p


def freezing_of(model: nn.Module, *, differentiates: bool) -> VectorFreezing | None:
    """The callback that a model's adapter asks for; None where nothing is frozen.

    Args:
        model: adapted by PEFT or not; differentiates: whether its strategy takes backward passes.

    Raises:
        UserError: it takes none.
    """
    config: Any = getattr(model, "peft_config", {}).get("default")
    if not freezes(config):
        return None
    if not differentiates:
        raise UserError(NO_GRADIENT)
    return VectorFreezing(config.freeze, config.freeze_warmup, config.freeze_every, config.freeze_beta)


NO_GRADIENT = (
    "adapter vectorfit: freezing takes vectors out of the backward pass, and this method takes none; give "
    "--adapter-args freeze=0"
)


def freezes(config: Any) -> bool:
    """Whether an adapter's configuration asks for freezing."""
    return bool(getattr(config, "freeze", 0)) and hasattr(config, "freeze_warmup")
