"""Training arguments that know lowmem's strategies.

    LowMemArguments(output_dir="out", optim="galore", optim_args="rank=128,update_proj_gap=200")
    LowMemSFTConfig(...)      the same for TRL's supervised fine-tuning, and LowMemDPOConfig, LowMemKTOConfig,
                              LowMemORPOConfig, LowMemRewardConfig, LowMemGRPOConfig for its other trainers;
                              made on first use, TRL stays optional

They are the stock arguments with a few fields more, so that HfArgumentParser,
`dataclasses.replace` and `to_dict` work on them. transformers accepts only its own
optimizer names: the name is hidden from its check and put back.

What would be ignored is refused: all problems at once, each with the remedy.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from lowmem import several
from lowmem.errors import ConfigError, UserError, nearest
from lowmem.optim.tensors.checks import idle
from lowmem.training.folder.settings import checkpointing, checkpoints
from lowmem.training.ranks.low_rank_sync import of_exchange
from lowmem.training.ranks.sharding import of_arguments

if TYPE_CHECKING:
    from lowmem.optim.strategy import Strategy

SYNC = ("whole", "low_rank")
CLIP = ("auto", "none", "global", "tensor", "previous")
COMPILE = ("auto", "on", "off")


@dataclass
class LowMemFields:
    """The fields that lowmem adds, and the check they share."""

    first_order = False  # whether the trainer needs gradients
    optim: str = field(default="galore", metadata={"help": "Strategy, see `lowmem strategies`."})
    optim_args: str | None = field(
        default=None, metadata={"help": "Options of the strategy, as in rank=128,states=int8."}
    )
    gradient_release: bool = field(
        default=False, metadata={"help": "Step each tensor inside the backward pass and free its gradient."}
    )
    offload_state: bool = field(
        default=False, metadata={"help": "Keep optimizer state in host memory between its steps (GPU)."}
    )
    clip: str = field(
        default="auto",
        metadata={
            "help": "What max_grad_norm applies to: all gradients together (global), each tensor (tensor), "
            "or all by the norm of the step before (previous; where only projections are kept and summed, "
            "that of these). auto: global; previous with gradient release; "
            "none without gradients.",
            "choices": list(CLIP),
        },
    )
    compile: str = field(
        default="auto",
        metadata={"help": "Compile the optimizer step; auto: where it pays.", "choices": list(COMPILE)},
    )

    gradient_sync: str = field(
        default="whole",
        metadata={
            "help": "What copies of a model on several processes exchange: whole gradients, or, where a "
            "subspace method needs no more, their projections (low_rank).",
            "choices": list(SYNC),
        },
    )
    nonfinite_limit: int = field(
        default=5,
        metadata={"help": "End when the loss is not finite for so many steps in a row; 0: never."},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the losses before instead of one that is not finite."}
    )

    def __post_init__(self) -> None:
        """Check what lowmem added, then let the stock arguments check the rest."""
        self._default_checkpointing()
        problems = check(self)
        if problems:
            raise ConfigError(problems)
        name, self.optim = self.optim, "adamw_torch"
        try:
            super().__post_init__()  # type: ignore[misc]
        finally:
            self.optim = name

    def _default_checkpointing(self) -> None:
        """Leave activation checkpointing as the stock arguments have it."""

    def strategy(self) -> Strategy:
        """The strategy that `optim` and `optim_args` describe.

        Raises:
            UserError: unknown name, option or value, with the nearest known one.
        """
        return build_strategy(self.optim, self.optim_args)

    @property
    def clip_policy(self) -> str:
        """`clip` with auto resolved: none, global, tensor or previous."""
        if self.clip != "auto":
            return self.clip
        if not self.strategy().source.needs_autograd or not _clips(self):
            return "none"
        return "previous" if self.gradient_release else "global"


@dataclass
class LowMemArguments(LowMemFields, TrainingArguments):
    """Arguments for `LowMemTrainer`.

    Example:
        >>> LowMemArguments(output_dir="out", optim="galore", optim_args="rank=128").optim
        'galore'
    """


@contextmanager
def own_name(args: Any) -> Iterator[None]:
    """Meanwhile transformers does not take a strategy for an optimizer of its own that has the same name.

    To one it calls lomo it would hand the learning rate in the backward pass.
    """
    name, args.optim = args.optim, "adamw_torch"
    try:
        yield
    finally:
        args.optim = name


def build_strategy(name: str, options: str | Mapping[str, Any] | None) -> Strategy:
    """A strategy from what a person writes on one line.

    Args:
        name: of a registered strategy.
        options: "rank=128,states=int8", or a mapping; may be empty.

    Raises:
        UserError: unknown name, or all that is wrong with the options.
    """
    from lowmem.strategies import create, parse_options

    return create(name, **parse_options(name, options))


def check(args: Any) -> list[str]:
    """Every problem of a set of training arguments, one sentence each.

    Args:
        args: stock training arguments with the fields of `LowMemFields`.
    """
    problems = [
        f"{name}: {getattr(args, name)!r} is not allowed; {nearest(str(getattr(args, name)), allowed)}"
        for name, allowed in (("clip", CLIP), ("compile", COMPILE), ("gradient_sync", SYNC))
        if getattr(args, name) not in allowed
    ]
    if args.nonfinite_limit < 0:
        problems.append(f"nonfinite_limit: {args.nonfinite_limit} steps; use 1 or more, or 0 for never")
    problems += _engines(args)
    try:
        strategy = build_strategy(args.optim, args.optim_args)
    except UserError as error:
        return [f"optim: {error}", *problems]
    betas = (args.adam_beta1, args.adam_beta2)
    problems += idle(args.optim, strategy.rules.values(), betas=betas, eps=args.adam_epsilon)
    if args.gradient_sync == "low_rank":
        problems += of_exchange(args, strategy, clips=_clips(args))
    return problems + (_released(args, strategy) if strategy.source.needs_autograd else _gradient_free(args))


def _clips(args: Any) -> bool:
    return bool(args.max_grad_norm and args.max_grad_norm > 0)


def _engines(args: Any) -> list[str]:
    """Engines that flatten or shard parameters, which a strategy per tensor cannot see through."""
    rules = [
        (args.deepspeed, several.DEEPSPEED),
        (
            args.optim_target_modules,
            "optim_target_modules: a strategy finds the matrices by itself; leave it out",
        ),
        (
            args.push_to_hub and str(getattr(args.hub_strategy, "value", args.hub_strategy)) != "end",
            "hub_strategy: a checkpoint is renamed when it is whole, an upload of it would break; use 'end'",
        ),
    ]
    return [text for broken, text in rules if broken] + of_arguments(args)


def _released(args: Any, strategy: Strategy) -> list[str]:
    """Problems of clipping and gradient release."""
    from lowmem.optim.release import accumulation_problem

    over_several = args.gradient_release and args.gradient_accumulation_steps > 1
    accumulated = accumulation_problem(strategy) if over_several else ""
    rules = [
        (accumulated, accumulated),
        (
            args.gradient_release and strategy.waits,
            f"gradient_release: {strategy.name} {strategy.waits}; leave it out",
        ),
        (
            args.gradient_release and args.clip == "global",
            "clip: with gradient_release the norm of all gradients is not known when the first tensor steps; "
            "use clip='previous', 'tensor' or 'none'",
        ),
        (
            not args.gradient_release and args.clip in ("tensor", "previous"),
            f"clip: {args.clip!r} is for gradient_release; use clip='global', or set gradient_release=True",
        ),
        (
            args.clip in ("global", "tensor", "previous") and not _clips(args),
            f"clip: {args.clip!r} needs a norm; set max_grad_norm above 0, or clip='none'",
        ),
        (
            args.gradient_release and args.fp16,
            "fp16: a step is skipped where any scaled gradient overflows, which is not known when the first "
            "tensor steps; leave gradient_release out, or use bf16=True on a card that has it",
        ),
        (
            args.gradient_release and args.auto_find_batch_size,
            "auto_find_batch_size: with gradient_release a batch that fails has stepped some tensors; "
            "set per_device_train_batch_size",
        ),
    ]
    return [text for broken, text in rules if broken]


def _gradient_free(args: Any) -> list[str]:
    """Problems of a strategy that takes no backward pass."""
    name = args.optim
    rules = [
        (
            args.first_order,
            f"optim: {name} evaluates the loss instead of differentiating it, this trainer needs gradients; "
            "use another strategy, such as galore",
        ),
        (
            checkpoints(args),
            f"{checkpointing()}: {name} takes no backward pass; set it to False",
        ),
        (args.gradient_release, f"gradient_release: {name} has no gradients to release; leave it out"),
        (args.offload_state, f"offload_state: {name} holds next to no state; leave it out"),
        (
            args.clip not in ("auto", "none"),
            f"clip: {name} has no gradients to clip; leave it out",
        ),
        (args.fp16, f"fp16: {name} takes no backward pass to scale the loss for; load the model in float16"),
        (args.neftune_noise_alpha, f"neftune_noise_alpha: {name} evaluates without noise; leave it out"),
        (args.torch_compile, f"torch_compile: {name} swaps weights during the forward pass; leave it out"),
    ]
    return [text for broken, text in rules if broken]


TRL = {
    "sft": ("trl", "SFT"),
    "dpo": ("trl", "DPO"),
    "kto": ("trl", "KTO"),
    "orpo": ("trl.experimental.orpo", "ORPO"),
    "reward": ("trl", "Reward"),
    "grpo": ("trl", "GRPO"),
}
"""Tasks, and where TRL has their trainer and its arguments."""


@dataclass
class TrlFields(LowMemFields):
    """Arguments for a trainer of TRL; activation checkpointing is on by default as there.

    Strategies that take no backward pass have nothing to recompute.
    """

    first_order = True
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Old name of activation_checkpointing."}
    )

    def _default_checkpointing(self) -> None:
        name = checkpointing()
        if (getattr(self, name), self.gradient_checkpointing) == (None, None):
            try:
                setattr(self, name, self.strategy().source.needs_autograd)
            except UserError:  # reported with everything else
                setattr(self, name, False)

    def to_dict(self) -> dict[str, Any]:
        """The stock dictionary; the stock one hides tokens of the vocabulary as if they were passwords."""
        own = {name: getattr(self, name) for name in ("eos_token", "pad_token") if hasattr(self, name)}
        return {**super().to_dict(), **own}  # type: ignore[misc]


@dataclass
class SFTFields(TrlFields):
    """What supervised fine-tuning has besides.

    Unlike TRL it leaves the load balancing loss of a mixture of experts to the model, as transformers
    does, until a coefficient is given.
    """

    first_order = False
    router_aux_loss_coef: float | None = field(
        default=0.0, metadata={"help": "Weight of the load balancing loss of a mixture of experts."}
    )
    label_loss: bool = field(
        default=True,
        metadata={"help": "Make logits at label positions only, where those are few; TRL's tiles elsewhere."},
    )


@functools.cache
def trl_config(task: str) -> type[Any]:
    """The arguments of a task's trainer, `LowMemSFTConfig` and so on; a class made once.

    Args:
        task: of `TRL`; candidates are learned by the arguments of sft.
    """
    if task == "classify":
        return trl_config("sft")
    home, name = TRL[task]
    stock = getattr(importlib.import_module(home), f"{name}Config")
    text = f"Arguments for `LowMem{name}Trainer`: those of TRL, with the fields of `LowMemFields`."
    own = {"__doc__": text, "__module__": __name__}
    fields = SFTFields if task == "sft" else TrlFields
    made: type[Any] = dataclass(type(f"LowMem{name}Config", (fields, stock), own))
    return made


def __getattr__(name: str) -> Any:
    """Make `LowMemSFTConfig` and its like when they are first asked for."""
    for task, (_, stem) in TRL.items():
        if name == f"LowMem{stem}Config":
            return trl_config(task)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
