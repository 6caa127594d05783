"""From a strategy's name to an optimizer over a Hugging Face model.

Our trainers and the stock ones make their optimizer in one place, here: the
Trainer's own decay groups, named parameters, and hyper-parameters as given.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import Trainer

from lowmem import several
from lowmem.errors import ConfigError, UserError
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.tensors.checks import idle
from lowmem.optim.tensors.groups import param_groups
from lowmem.optim.tensors.offload import home_of
from lowmem.training.arguments import build_strategy

if TYPE_CHECKING:
    from lowmem.optim.strategy import Strategy


def make_optimizer(
    model: nn.Module,
    strategy: Strategy,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int = 0,
    compile: str = "auto",
    steps: int | None = None,
    offload_state: bool = False,
    decay_names: Collection[str] | None = None,
) -> LowMemOptimizer:
    """An optimizer over the trainable parameters of a model, with the Trainer's decay groups.

    Args:
        model: its parameters' names decide the role and whether weight decay applies.
        strategy: from `lowmem.create`.
        lr: learning rate of every group; a scheduler changes it in the groups.
        betas: decay rates of the moments.
        eps: added to the denominator of the step.
        weight_decay: decoupled; of others than `decay_names` 0.
        seed: of everything random in the strategy.
        compile: auto, on or off.
        steps: of the run, where that is known; a few do not pay for compiling.
        offload_state: keep state in the host's memory between steps.
        decay_names: names that decay; if None, by the Trainer's own rule all but biases and norms.
    """
    trained = strategy.source.trained(model)
    if decay_names is None:
        decay_names = Trainer.get_decay_parameter_names(cast(Any, None), model)
    decaying = set(decay_names)
    groups = param_groups(model, weight_decay=weight_decay, decay_names=decaying, trained=trained)
    return LowMemOptimizer(
        groups,
        strategy,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        seed=seed,
        compile=compile,
        steps=steps,
        model=model,
        home=home_of(strategy) if offload_state else None,
    )


class Factory:
    """What a stock trainer calls to make the optimizer once it has the model."""

    def __call__(self, model: nn.Module, **kwargs: Any) -> LowMemOptimizer:
        """Make the optimizer from the keyword arguments that `hf_optimizer` returned.

        Raises:
            UserError: tensors take turns, and several processes are to train copies.
        """
        settings = dict(kwargs)
        strategy = build_strategy(settings.pop("strategy"), settings.pop("options"))
        group = torch.distributed
        ranks = group.get_world_size() if group.is_available() and group.is_initialized() else 1
        if strategy.turns and ranks > 1:  # DDP would sum no gradient of what rests while it is made
            raise UserError(several.one_device(strategy.name or "the strategy", ranks))
        return make_optimizer(model, strategy, **settings)


def hf_optimizer(
    name: str,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    seed: int = 0,
    compile: str = "auto",
    offload_state: bool = False,
    decay_names: Collection[str] | None = None,
    **options: Any,
) -> tuple[type[Factory], dict[str, Any]]:
    """Optimizer for any stock Trainer, as its `optimizer_cls_and_kwargs`.

    The stock Trainer passes nothing of its own on, so lr and the like are
    given here; its scheduler starts from this lr. A trainer whose constructor does
    not take the pair (TRL's DPO) takes it as the attribute `optimizer_cls_and_kwargs`,
    set before `train()`. Gradient release and strategies without gradients need
    `LowMemTrainer`.

    Args:
        name: of a registered strategy.
        lr: peak learning rate.
        betas: decay rates of the moments.
        eps: added to the denominator of the step.
        weight_decay: decoupled; of others than `decay_names` 0.
        seed: of everything random in the strategy.
        compile: auto, on or off.
        offload_state: keep state in the host's memory between steps.
        decay_names: names that decay, such as a Trainer's own `get_decay_parameter_names` says; if None all
            but biases and norms.
        **options: the strategy's own, as for `lowmem.create`.

    Raises:
        UserError: unknown name or option, a strategy that takes no gradients, or a number without effect.

    Example:
        >>> factory, kwargs = hf_optimizer("galore", lr=1e-4, rank=64)
        >>> kwargs["options"]
        {'rank': 64}
    """
    strategy = build_strategy(name, options)
    if problems := idle(name, strategy.rules.values(), betas=betas, eps=eps):
        raise ConfigError(problems)
    if not strategy.source.needs_autograd:
        raise UserError(f"{name} evaluates the loss instead of differentiating it; use lowmem.LowMemTrainer")
    if strategy.asks:
        raise UserError(
            f"{name} asks for {strategy.asks}, which stock trainers keep; use lowmem.LowMemTrainer"
        )
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "seed": seed}
    settings |= {"offload_state": True} if offload_state else {}
    settings |= {} if decay_names is None else {"decay_names": decay_names}
    return Factory, {"strategy": name, "options": options, "compile": compile, **settings}


def refuse_foreign(kwargs: dict[str, Any]) -> None:
    """An optimizer beside args.optim would silently win."""
    given = [key for key in ("optimizer_cls_and_kwargs",) if kwargs.get(key) is not None]
    if (kwargs.get("optimizers") or (None, None))[0] is not None:
        given.append("optimizers")
    if given:
        raise UserError(
            f"{given[0]}: args.optim names the strategy here; pass your optimizer to the stock Trainer"
        )


def refuse_half(model: nn.Module, scaled: bool) -> None:
    """Refuse what the loss scaler would refuse at its first step."""
    half = next(
        (n for n, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16), None
    )
    if scaled and half:
        raise UserError(
            f"fp16: {half} is trained in float16, whose gradients no loss scaler takes; load the model with "
            "dtype=torch.float32, autocast computes in float16"
        )
