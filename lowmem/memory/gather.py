"""What the user asked to plan, made into objects: the model's configuration, the run, the strategies."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any, get_args, get_type_hints

from torch import nn

from lowmem import several
from lowmem.combinations import FEW_BIT, of_adapters, of_weights, of_weights_and_method
from lowmem.errors import UserError, nearest
from lowmem.memory.device.gpus import Budget
from lowmem.memory.run import Run
from lowmem.memory.trace.given import Given
from lowmem.memory.trace.tasks import kinds
from lowmem.models.entries import ModelEntry, check_supported, resolve, to_dtype
from lowmem.models.peft_methods import adapter_config
from lowmem.optim.release import accumulation_problem
from lowmem.optim.strategy import Strategy
from lowmem.sources.quantized import misfit
from lowmem.values import unallowed


def model_config(model: Any) -> tuple[str, Any]:
    """Name and transformers configuration of a name, folder, Hub id, entry, configuration or module.

    Raises:
        UserError: nothing of these, or an architecture that cannot be planned.
    """
    if isinstance(model, (str, ModelEntry)) or hasattr(model, "__fspath__"):
        entry = model if isinstance(model, ModelEntry) else resolve(str(model))
        return entry.name, entry.config()
    if isinstance(model, nn.Module):
        model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    config: Any = getattr(model, "config", None) if isinstance(model, nn.Module) else model
    if not hasattr(config, "num_hidden_layers") and not hasattr(config, "model_type"):
        raise UserError(
            f"cannot plan {type(model).__name__}: give a model name, a folder, a Hub id, a transformers "
            "configuration or a transformers model"
        )
    name = str(getattr(config, "name_or_path", "") or config.model_type)
    if not isinstance(model, nn.Module):
        check_supported(config)
        return name, config
    shape = copy.copy(config)
    shape.quantization_config = None  # its weights are what they are
    check_supported(shape)
    return name, Given(model)


KINDS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "text"),
}
"""Types of a run's options: what is taken for one, and what to write."""
WEIGHTS = ("weights", "int8_embeddings")
"""Options that say how weights are held."""


def as_it_is(given: Given, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run with a model object, whose own are not for the run to say.

    Raises:
        UserError: an option that would make another model of it.
    """
    own = given.options()
    asked = typed(options)
    for f in fields(Run):
        name = f.name
        if (f.metadata["group"] == "Adapters" or name in WEIGHTS) and asked.get(name):
            raise UserError(
                f"{name}: a model object is planned as it is; adapt or quantise it before, or give its name"
            )
    for name in ("dtype", "attention"):
        value = str(asked.get(name, own[name]))
        if value.removeprefix("torch.") != own[name]:
            raise UserError(
                f"{name} {value!r}: a model object is planned as it is, and this one has {own[name]!r}"
            )
    recompute = bool(asked.get("gradient_checkpointing")) or own["gradient_checkpointing"]
    return {**asked, **own, "gradient_checkpointing": recompute}


def make_run(options: Mapping[str, Any]) -> Run:
    """The run that keyword options describe.

    Raises:
        UserError: an unknown option, a value that is not allowed, or options that exclude each other.
    """
    known = {f.name for f in fields(Run)}
    unknown = next((name for name in options if name not in known), None)
    if unknown is not None:
        raise UserError(f"plan has no option {unknown!r}; {nearest(unknown, known)}")
    values = typed(options)
    if "dtype" in values:
        values["dtype"] = str(to_dtype(values["dtype"])).removeprefix("torch.")
    run = Run(**kinds.completed(values))
    _check(run)
    return run


def typed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are given, once their types are known to be those of a run.

    Raises:
        UserError: naming all that are of another type; a word is not guessed to be a number or a no.
    """
    values = {name: value for name, value in options.items() if value is not None}
    hints = get_type_hints(Run)
    found = []
    for name in values.keys() & hints.keys() - {"dtype"}:  # a torch.dtype will do
        kind = next(kind for kind in KINDS if kind in (hints[name], *get_args(hints[name])))
        allowed, words = KINDS[kind]
        value = values[name]
        if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
            found.append(f"{name} must be {words}, got {value!r}")
    if found:
        raise UserError("; ".join(sorted(found)))
    return values


def on_card(run: Run, limit: Budget) -> Run:
    """The run on the card of a budget, as far as it does not say otherwise."""
    if run.device == "cpu":
        return run
    capability = limit.capability if run.compute_capability is None else run.compute_capability
    workspace = limit.workspace if run.workspace is None else run.workspace
    return replace(run, compute_capability=capability, workspace=workspace)


def _limits(run: Run) -> Iterator[str]:
    """Values that are none of the choices, or out of range."""
    for f in fields(run):
        value, allowed, least = getattr(run, f.name), f.metadata["choices"], f.metadata["least"]
        if value is None:
            continue
        if allowed and value not in allowed:
            yield f"{f.name} {unallowed(str(value), allowed)}"
        if least is not None and not least <= value < f.metadata["below"]:
            limits = f"at least {least} and below {int(f.metadata['below'])}"
            yield f"{f.name} must be {limits}, got {value}"


def _without_effect(run: Run) -> Iterator[str]:
    """Options that were given and that nothing of the run would look at, each with what it is of."""
    of_card = [name for name in ("compute_capability", "workspace") if getattr(run, name) is not None]
    rules = [
        (
            run.label_tokens is not None and run.loss != "labels",
            f"label_tokens: of loss labels, loss is {run.loss}; give loss labels, or leave it out",
        ),
        (
            run.longest is not None and run.rows != "packed",
            f"longest: of packed rows, rows are {run.rows}; give rows packed, or leave it out",
        ),
        (
            run.typical is not None and run.rows == "packed",
            "typical: packed rows are filled up to seq_len; give rows padded, or leave it out",
        ),
        (
            run.adapter_dtype is not None and not run.adapts,
            "adapter_dtype: no adapter is trained; give lora_rank or adapter as well, or leave it out",
        ),
        (of_card and run.device == "cpu", f"{', '.join(of_card)}: of a card, device is cpu; leave it out"),
        (
            run.gradient_release and run.max_grad_norm not in (0.0, Run.max_grad_norm),
            f"max_grad_norm {run.max_grad_norm:g}: with gradient_release the norm of all gradients is not "
            "known when the first tensor steps; leave one of them out",
        ),
    ]
    return (text for broken, text in rules if broken)


def _check(run: Run) -> None:
    if found := list(_limits(run)) or kinds.problems(run) or list(_without_effect(run)):
        raise UserError("; ".join(found))
    if run.few_bit and run.gradient_checkpointing:
        raise UserError(FEW_BIT)
    if run.offload_state and run.device == "cpu":
        raise UserError("offload_state: a CPU steps where its state is; leave it out, or plan for a GPU")
    if run.activation_offload and run.device == "cpu":
        raise UserError(
            "activation_offload: a CPU has no other memory to spare; leave it out, or plan for a GPU"
        )
    _check_adapters(run)
    if problems := list(several.of_plan(run)):
        raise UserError("; ".join(problems))
    if not run.quantize and (run.kbit_prepare or not run.double_quant):
        given = "kbit_prepare" if run.kbit_prepare else "double_quant"
        raise UserError(f"{given} is about 4-bit weights: give quantize='nf4' as well")
    if run.keep_output and run.loss != "plain":
        raise UserError(f"keep_output keeps the logits of the plain loss; loss {run.loss!r} hands none over")
    if run.autocast and run.dtype == "float16":
        raise UserError("autocast with float16 weights is not planned: use bfloat16 or float32 weights")
    if run.autocast_dtype != "bfloat16" and not run.autocast:
        raise UserError(f"autocast_dtype {run.autocast_dtype!r} is of autocast: give autocast as well")
    if run.autocast and run.autocast_dtype == "float16" and run.gradient_release:
        raise UserError(
            "gradient_release with autocast in float16: a step is skipped where any gradient overflows, "
            "which is not known when the first tensor steps; leave it out, or take bfloat16"
        )
    if run.gradient_release and run.max_grad_norm > 0:
        # the norm of all gradients is never known under release: nothing is clipped together
        object.__setattr__(run, "max_grad_norm", 0.0)


def unsuited(name: str, strategy: Strategy, run: Run) -> str:
    """Why a strategy and the weights or cards of a run do not go together; empty where they do."""
    if run.task != "sft" and not strategy.source.needs_autograd:
        return f"{name} works without gradients, task {run.task} needs them"
    weights = misfit(name, strategy.source, run.quantize, run.adapts)
    return weights or _summed(strategy, run) or on_ranks(name, strategy, run) or on_codes(name, strategy, run)


def _summed(strategy: Strategy, run: Run) -> str:
    """Why gradients of several micro-batches cannot be let go one by one; empty where they can."""
    over_several = run.gradient_release and run.accumulation > 1
    if not over_several or strategy.waits or not strategy.source.needs_autograd:
        return ""  # where a strategy waits, nothing is let go: `plan.suited`
    return accumulation_problem(strategy)


POINTLESS = {
    "gradient_checkpointing": "there is no backward pass to recompute activations for",
    "activation_offload": "there is no backward pass to keep activations for",
    "few_bit": "there is no backward pass to keep activations for",
    "gradient_release": "there are no gradients to release",
    "keep_output": "there is no backward pass to keep the logits through",
    "offload_state": "there is next to no state to keep elsewhere",
}
"""Options of backward passes, and why a strategy without gradients has no use for them."""


def idle(strategy: Strategy, run: Run, asked: Mapping[str, Any]) -> str:
    """Options that one strategy has no use for, empty for none; beside others it leaves them to those.

    Args:
        strategy, run: of the plan; asked: the options as they were given, without those of a model object.
    """
    name = strategy.name or "the strategy"
    if run.gradient_release and strategy.waits:
        return f"gradient_release: {name} {strategy.waits}; leave it out"
    if strategy.source.needs_autograd:
        return ""
    return "; ".join(
        f"{option}: {name} works without gradients, {why}; leave it out"
        for option, why in POINTLESS.items()
        if asked.get(option) and getattr(run, option)
    )


def on_ranks(name: str, strategy: Strategy, run: Run) -> str:
    """What a strategy does not do on several cards; empty where it does."""
    if run.ranks == 1:
        return ""
    if run.sharded:
        return strategy.source.unspread()
    if (run.gradient_release and strategy.source.needs_autograd) or strategy.turns:
        what = "gradient_release" if run.gradient_release else name
        return several.of_copies(what)
    return ""


def on_codes(name: str, strategy: Strategy, run: Run) -> str:
    """What a strategy does not do with int8 weights, or only with them; empty where all is well."""
    settings = {"weights": run.weights, "optim": name}
    writer = str(strategy.options.get("writer", ""))
    found = of_weights_and_method(settings, differentiates=strategy.source.needs_autograd, writer=writer)
    return "; ".join(found)


def _check_adapters(run: Run) -> None:
    if run.quantize and run.adapter and not run.lora_rank:
        raise UserError(
            "quantize keeps the base weights frozen, and is planned under LoRA: give lora_rank as well"
        )
    settings = {f.name: getattr(run, f.name) for f in fields(run)} | {"lora_rank": run.lora_rank or None}
    problems = of_adapters(settings) + of_weights(settings)
    if problems:
        raise UserError("; ".join(problems))
    adapter_config(run)


def strategies(
    asked: Any, options: Mapping[str, Any] | str | None, *, trained: bool = False
) -> list[Strategy]:
    """Strategies by name ("galore", "adamw,galore", "all"), as objects, or a list of both.

    Args:
        asked: what the user gave.
        options: of the strategy, where exactly one is named.
        trained: "all" are those that take gradients.

    Raises:
        UserError: an unknown name or option, or options for several strategies.
    """
    from lowmem.strategies import available, create, parse_options

    if isinstance(asked, Strategy):
        return [asked]
    wanted = named(asked) if isinstance(asked, str) else [one for part in asked for one in named(part)]
    if [name for name, _ in wanted] == ["all"]:
        # what trains scales is asked for by name: it needs another model than the rest
        sources = {name: create(name).source for name in available()}
        taking = (name for name, source in sources.items() if source.needs_autograd or not trained)
        wanted = [(name, None) for name in taking if not sources[name].quantized]
    found = []
    for name, own in wanted:
        if isinstance(name, Strategy):
            found.append(name)
        elif options and len(wanted) > 1:
            several = ", ".join(str(one) for one, _ in wanted)
            raise UserError(f"options {options!r} belong to one strategy: name one, not {several}")
        elif options and own:
            raise UserError(f"options of {name} are given twice: {own!r} and {options!r}; give them once")
        else:
            found.append(create(name, **parse_options(name, options or own)))
    if not found:
        raise UserError("no strategy to plan: name one, several with commas, or all")
    return found


def named(asked: Any) -> list[tuple[Any, str | None]]:
    """Strategies and their options in "adamw,galore(rank=64,states=int8)"; an object stands for itself.

    >>> named("adamw, galore(rank=64,scale=1)")
    [('adamw', None), ('galore', 'rank=64,scale=1')]
    """
    if not isinstance(asked, str):
        return [(asked, None)]
    found = []
    for part in re.split(r",(?![^(]*\))", asked):
        name, bracket, inside = part.strip().partition("(")
        if bool(bracket) != inside.endswith(")"):
            raise UserError(
                f"optim {part.strip()!r}: a bracket is missing; write galore(rank=64,states=int8)"
            )
        found.append((name.strip(), inside[:-1] or None))
    return found
