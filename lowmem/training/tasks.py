"""TRL's other trainers on lowmem's strategies: preferences, judgements, rewards and reinforcement.

    LowMemDPOTrainer  LowMemKTOTrainer  LowMemORPOTrainer  LowMemRewardTrainer  LowMemGRPOTrainer

Each is TRL's own class under `LowMemMixin`, made on first use. Their losses are TRL's; what
is decided here is what costs memory: a reference model is never held. Its log-probabilities
of the rows are computed once, before the first step, by the model that is still the reference
(with adapters: by the model without them), so a run holds what supervised fine-tuning holds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

from lowmem import outside
from lowmem.config import RunConfig
from lowmem.console import Console
from lowmem.data.fitting import Fitted, asked_within, fitting
from lowmem.data.load import Data
from lowmem.errors import ConfigError, UserError
from lowmem.models.positions import check_fits
from lowmem.models.scoring import with_score
from lowmem.optim.tensors.offload import NO_CUDA, stays
from lowmem.several import REFERRING
from lowmem.training import scored
from lowmem.training.arguments import TRL, build_strategy
from lowmem.training.ranks.processes import shared_folder
from lowmem.training.ranks.sharding import of_processes
from lowmem.training.trainer import LowMemMixin, LowMemSFTTrainer

OTHERS = tuple(task for task in TRL if task != "sft")


@functools.cache
def trainer_class(task: str) -> type[Any]:
    """The trainer of a task, a class made once.

    Args:
        task: of `lowmem.training.arguments.TRL`.
    """
    if task == "sft":
        return LowMemSFTTrainer  # type: ignore[no-any-return]
    home, name = TRL[task]
    stock: Any = getattr(importlib.import_module(home), f"{name}Trainer")

    class Made(LowMemMixin, stock):  # type: ignore[misc]
        task: str

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write TRL's card only for a model that goes to the Hub; a run's folder has its own."""
            if self.args.push_to_hub:
                super().create_model_card(*args, **kwargs)

        def _send_telemetry(self) -> None:
            """Tell nobody: TRL would report the run to the Hub."""

    if task in REFERRING:
        Made._precompute_ref_logps = _referred(Made)
    Made.__name__ = Made.__qualname__ = f"LowMem{name}Trainer"
    Made.__module__, Made.task = __name__, task
    Made.__doc__ = f"trl's {name}Trainer on any first-order strategy, configured by `LowMem{name}Config`."
    return Made


def _referred(made: Any) -> Callable[..., Any]:
    """TRL's pass over the rows by the reference, whose file is one that all processes see."""

    def precompute(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        of_trl = super(made, self)._precompute_ref_logps
        if self.args.world_size == 1:
            return of_trl(dataset, name, batch_size)
        with shared_folder(self.args) as folder:
            with patch.object(dataset, "_get_cache_file_path", lambda of: str(folder / f"{of}.arrow")):
                found = of_trl(dataset, name, batch_size)
            rows = type(dataset).from_dict(found.to_dict(), features=found.features)
            self.accelerator.wait_for_everyone()
        return rows

    return precompute


def __getattr__(name: str) -> Any:
    """Make a trainer when it is first asked for."""
    for task, (_, stem) in TRL.items():
        if name == f"LowMem{stem}Trainer":
            return trainer_class(task)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def refuse(config: RunConfig, *, cuda: bool) -> None:
    """Refuse a run whose settings do not go with its strategy, its device or what is installed.

    Raises:
        ConfigError: naming all of them.
    """
    from lowmem.combinations import (
        missing_harness,
        missing_tracker,
        no_gradient,
        of_activations,
        of_noise,
        of_precision,
        of_weights_and_method,
    )
    from lowmem.sources.quantized import misfit
    from lowmem.training.zeroth.objectives import unknown

    strategy = build_strategy(config.optim, config.optim_args or None)
    source, settings = strategy.source, dataclasses.asdict(config)
    writer = str(strategy.options.get("writer", ""))
    problems = [
        _of_adapter(config, differentiates=source.needs_autograd),
        missing_tracker(config.report_to),
        missing_harness(config.eval),
        misfit(config.optim, source, config.quantize, config.adapts),
        *of_precision(settings, differentiates=source.needs_autograd),
        *of_weights_and_method(settings, differentiates=source.needs_autograd, writer=writer),
        *of_activations(settings, differentiates=source.needs_autograd),
        *of_noise(settings, differentiates=source.needs_autograd),
    ]
    if config.activation_offload and not cuda:
        problems.append("activation_offload: there is no GPU whose memory it would spare; leave it out")
    if config.offload_state:
        problems.append(stays(config.optim, source.needs_autograd) or ("" if cuda else NO_CUDA))
    if config.objective:
        problems.append(no_gradient(config.optim) if source.needs_autograd else unknown(config.objective))
    if config.autocast == "float16" and not cuda:
        problems.append("autocast: float16 scales the loss on a GPU, and there is none; use bfloat16 or none")
    problems += of_processes(cuda=cuda) if config.fsdp else []
    if found := [problem for problem in problems if problem]:
        raise ConfigError(found)


def _of_adapter(config: RunConfig, *, differentiates: bool) -> str | None:
    """What is wrong with the options of an adapter, or with the method beside it."""
    from lowmem.models.peft_methods import adapter_config
    from lowmem.training.freezing import NO_GRADIENT, freezes

    try:
        freezing = freezes(adapter_config(config))
    except UserError as error:
        return str(error)
    return NO_GRADIENT if freezing and not differentiates else None


def options(config: RunConfig) -> dict[str, Any]:
    """Arguments that a task has besides those of every trainer."""
    found: dict[str, Any] = {"beta": config.beta} if config.beta is not None else {}
    if config.activation_offload:
        found["activation_offloading"] = True
    if config.task == "classify" or config.objective:
        rows = {"skip_prepare_dataset": True}
        return {**found, "max_length": config.seq_len, "dataset_kwargs": rows, "remove_unused_columns": False}
    if config.task == "sft":
        return {**found, "max_length": config.seq_len, "packing": config.packing}
    if config.task == "grpo":
        count = config.num_generations or 8
        return {
            **found,
            "num_generations": count,
            "max_completion_length": config.max_completion or 256,
            "per_device_eval_batch_size": count,  # a prompt's answers are judged beside each other
        }
    found["max_length"] = config.seq_len
    if config.task in REFERRING:
        found["precompute_ref_log_probs"] = True
    return found


def supervised(
    args: Any, model: Any, parts: Sequence[Data], tokenizer: Any, console: Console, **rest: Any
) -> Any:
    """The trainer that learns answers."""
    train, held_out = (fitting(part, tokenizer, args.max_length, console) for part in parts)
    for fitted in (train, held_out):
        check_fits(model, _longest(fitted, args), f"rows of {fitted.data.name} ({fitted.data.split})")
    example = train.shown(tokenizer)
    console.say(f"one example, the loss counts what is in [[ ]]: {example}")
    args.packing_strategy = train.data.packing_strategy
    rows = {"train_dataset": train.dataset(), "eval_dataset": held_out.dataset()}
    trainer = LowMemSFTTrainer(model, args, processing_class=tokenizer, **rows, **rest)
    trainer.data_summary = {"train": train.summary(), "held_out": held_out.summary()}
    trainer.example = dataclasses.asdict(example)
    return trainer


def _longest(fitted: Fitted, args: Any) -> int:
    """Tokens of the longest example as it is trained on; texts that are wrapped fill their rows."""
    sizes = [len(example.ids) for example in fitted.examples]
    wrapped = args.packing and fitted.data.packing_strategy == "wrapped"
    return min(int(args.max_length), sum(sizes) if wrapped else max(sizes))


def make(
    config: RunConfig,
    args: Any,
    model: Any,
    parts: Sequence[Data],
    tokenizer: Any,
    console: Console,
    **rest: Any,
) -> Any:
    """The trainer of a task other than sft; reference log-probabilities are computed now.

    Args:
        config: the run's settings.
        args: from `trl_config`.
        model: a causal language model; for task reward its head gives way to a score.
        parts: rows to train on, rows to evaluate on.
        tokenizer: the model's.
        console: told which rows are left out, and what takes a while.
        **rest: for the trainer: peft_config, callbacks.

    Raises:
        UserError: no row is left, or the reward function cannot be found.
    """
    from datasets import Dataset

    answer = scored.ANSWER if config.objective else 256
    made = (config.max_completion or answer) if config.objective or config.task == "grpo" else 0
    check_fits(model, config.seq_len, "rows of up to seq_len", answer=made)
    if config.task == "classify" or config.objective:
        return scored.make(config, args, model, parts, tokenizer, console, **rest)
    if config.task == "grpo":
        rest["reward_funcs"] = reward_function(str(config.reward))
    train, held_out = (asked_within(part, tokenizer, config.seq_len, console) for part in parts)
    console.say(f"one row: {json.dumps(train.rows[0], ensure_ascii=False, default=str)}")
    if config.task == "reward":
        model = with_score(model, tokenizer, config.seed)
    if config.task in REFERRING:
        held = (
            "the reference is spread over ranks and dropped then"
            if args.fsdp
            else "no reference model is held"
        )
        console.say(f"computing the reference's log-probabilities once; {held}")
    rows = {"train_dataset": train, "eval_dataset": held_out}
    sets = {name: Dataset.from_list(list(part.rows)) for name, part in rows.items()}
    with _no_bars():
        trainer = trainer_class(config.task)(model, args=args, processing_class=tokenizer, **sets, **rest)
    trainer.data_summary = {"train": train.summary(), "held_out": held_out.summary()}
    row = json.dumps(train.rows[0], ensure_ascii=False, default=str, indent=1)
    trainer.example = {"text": row, "spans": [], "tokens": None, "trained": None}
    return trainer


def reward_function(name: str) -> Callable[..., list[float]]:
    """The function that `module:function` or `file.py:function` names.

    It is called with `prompts`, `completions` and each further field of the rows as lists, and gives
    one number per completion. Modules are looked for in the present folder as well.

    Raises:
        UserError: no such module or function, or an error while importing it.

    Example:
        >>> reward_function("operator:length_hint").__name__
        'length_hint'
    """
    return outside.function(name, "reward")


@contextmanager
def _no_bars() -> Iterator[None]:
    """Hide the bars over reference log-probabilities, which no switch of TRL turns off."""
    with ExitStack() as stack:
        for task in REFERRING:
            module = importlib.import_module(f"trl.trainer.{task}_trainer")
            if hasattr(module, "tqdm"):
                stack.enter_context(patch.object(module, "tqdm", lambda iterable, **_: iterable))
        yield
