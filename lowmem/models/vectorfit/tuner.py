"""PEFT's three classes of a method: its configuration, its layer and its model. Made when first asked for."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

from lowmem.errors import UserError
from lowmem.models.vectorfit.layer import VectorFit


@functools.cache
def config_class() -> type[Any]:
    """The configuration; its fields are the options of `--adapter-args`."""
    from peft.config import PeftConfig
    from peft.utils.peft_types import PeftType

    kinds: Any = PeftType

    @dataclass
    class VectorFitConfig(PeftConfig):
        """Options of VectorFit (arXiv 2503.19530). The defaults of the freezing are ours.

        Args:
            target_modules: names of linear layers, or all-linear for all but the head.
            rank: leading singular values that are trained: a number, below 1 a share; all of them when None.
            freeze: vectors frozen at a time: a number, below 1 a share of them; 0 freezes none.
            freeze_warmup: steps before the first are frozen; freeze_every: steps until others are.
            freeze_beta: of the average that they are ranked by.
            modules_to_save: modules that are trained whole and saved beside.
        """

        target_modules: list[str] | str | None = "all-linear"
        rank: float | None = None
        freeze: float = 0.1
        freeze_warmup: int = 100
        freeze_every: int = 50
        freeze_beta: float = 0.9
        modules_to_save: list[str] | None = None

        def __post_init__(self) -> None:
            super().__post_init__()  # type: ignore[no-untyped-call]
            self.peft_type = kinds.VECTORFIT
            check(self)

        def vectors_of(self, most: int) -> int:
            """How many singular values of a weight that has `most` are trained."""
            return most if self.rank is None else min(most, amount(self.rank, most))

    return VectorFitConfig


def amount(asked: float, of: int) -> int:
    """So many of `of`: a number from 1 on, clipped, or a share below 1, rounded, of which 1 is the least."""
    return max(1, min(of, int(asked) if asked >= 1 else round(asked * of)))


def check(config: Any) -> None:
    """Look at a configuration's numbers.

    Raises:
        ValueError: one is out of its range.
    """
    rank = config.rank
    rules = [
        (
            rank is not None and not _sizes(rank),
            f"rank is a number from 1 on or a share below 1, got {rank!r}",
        ),
        (
            config.freeze != 0 and not _sizes(config.freeze),
            f"freeze is 0, a number from 1 on or a share below 1, got {config.freeze!r}",
        ),
        (config.freeze_warmup < 0, f"freeze_warmup is 0 or more steps, got {config.freeze_warmup}"),
        (config.freeze_every < 1, f"freeze_every is 1 or more steps, got {config.freeze_every}"),
        (
            not (_number(config.freeze_beta) and 0 <= config.freeze_beta < 1),
            f"freeze_beta is at least 0 and below 1, got {config.freeze_beta!r}",
        ),
    ]
    if found := [text for broken, text in rules if broken]:
        raise ValueError("; ".join(found))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sizes(value: Any) -> bool:
    return _number(value) and value > 0 and (value < 1 or value == int(value))


@functools.cache
def layer_class() -> type[Any]:
    """The layer, with what every layer of PEFT has."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return type("Linear", (VectorFit, BaseTunerLayer), {"__module__": __name__, "__doc__": VectorFit.__doc__})


@functools.cache
def tuner_class() -> type[Any]:
    """The model: puts layers in the place of linear ones."""
    from peft.tuners.tuners_utils import BaseTuner

    class VectorFitModel(BaseTuner):
        """A model whose linear layers train their singular values and biases."""

        prefix = "vectorfit_"
        tuner_layer_cls = layer_class()
        target_module_mapping: dict[str, Any] = {}  # noqa: RUF012 (as PEFT declares it)

        def _create_and_replace(
            self,
            peft_config: Any,
            adapter_name: str,
            target: Any,
            target_name: str,
            parent: Any,
            current_key: str,
            parameter_name: str | None = None,
        ) -> None:
            if isinstance(target, VectorFit):
                target.update_layer(adapter_name, peft_config)
                return
            made = _linear(target, adapter_name, peft_config, current_key)
            if adapter_name not in self.active_adapters:  # a second one: PEFT trains it when it is asked to
                made.requires_grad_(False)
            self._replace_module(parent, target_name, made, target)

    return VectorFitModel


def _linear(target: Any, adapter_name: str, config: Any, name: str) -> Any:
    """The layer around a linear one.

    Raises:
        UserError: the module is none.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if not isinstance(target, (nn.Linear, Conv1D)):
        raise UserError(
            f"adapter vectorfit: {name} is {type(target).__name__}, no linear layer; name linear ones in "
            "--adapter-args target_modules"
        )
    return layer_class()(target, adapter_name, config)
