"""Finding and checking run configurations: files of the user, or shipped ones by name."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem.errors import UserError, nearest


def shipped() -> dict[str, Path]:
    """Shipped run configurations by name: `demo` is configs/runs/demo.yaml."""
    folder = Path(str(resources.files("lowmem.configs") / "runs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find(name_or_path: str) -> Path:
    """The user's file, or the shipped configuration of that name."""
    path = Path(name_or_path).expanduser()
    if path.is_file():
        return path
    known = shipped()
    if name_or_path not in known:
        raise UserError(f"no config file {name_or_path!r}, nor a shipped one; {nearest(name_or_path, known)}")
    return known[name_or_path]


def problems(values: Mapping[str, Any]) -> list[str]:
    """Problems that need the registries: the model, the data format, the strategy and its options."""
    from lowmem.combinations import missing_harness, missing_tracker
    from lowmem.data.load import check_name
    from lowmem.data.mix import check_names
    from lowmem.data.rows.formats import named
    from lowmem.data.rows.preferences import named_for
    from lowmem.models.entries import resolve
    from lowmem.outside import bring

    def _format(name: str) -> object:
        return named(name) if values["task"] == "sft" else named_for(values["task"], name)

    found = []
    look_ups = (
        ("model", resolve),
        ("data", check_names),
        ("eval_data", check_name),
        ("data_format", _format),
    )
    for name, look_up in look_ups:
        try:
            if values[name]:
                look_up(values[name])
        except UserError as error:
            found.append(f"{name}: {error}")
    found += [problem] if (problem := missing_tracker(values["report_to"])) else []
    found += [problem] if (problem := missing_harness(values["eval"])) else []
    try:
        bring(values["plugin"])
        return found + (_strategy_problems(values) if values["optim"] else [])
    except UserError as error:  # without the plugin its strategies are unknown: one problem, not two
        return [*found, str(error)]


def _strategy_problems(values: Mapping[str, Any]) -> list[str]:
    from lowmem.combinations import no_gradient, of_activations, of_noise, of_precision, of_weights_and_method
    from lowmem.memory.gather import POINTLESS
    from lowmem.models.entries import to_dtype
    from lowmem.optim.release import accumulation_problem
    from lowmem.optim.tensors.checks import idle
    from lowmem.optim.writers import select
    from lowmem.sources.quantized import misfit
    from lowmem.strategies import create, parse_options

    try:
        strategy = create(values["optim"], **parse_options(values["optim"], values["optim_args"]))
        stored = select(strategy.writer, to_dtype(values["dtype"]))
    except UserError as error:
        return [f"optim: {error}"]
    differentiates, writer = strategy.source.needs_autograd, str(strategy.options.get("writer", ""))
    if mixed := of_weights_and_method(values, differentiates=differentiates, writer=writer):
        return mixed
    if "writer" in strategy.options and not values["weights"] and stored != strategy.writer:
        kept = strategy.options["writer"]
        return [f"optim: writer={kept} is for weights of 16 bits, these have 32; leave it out"]
    adapts = bool(values["lora_rank"] or values["adapter"])
    if problem := misfit(values["optim"], strategy.source, values["quantize"], adapts):
        return [problem]
    if values["objective"] and strategy.source.needs_autograd:
        return [no_gradient(values["optim"])]
    if values["task"] not in ("sft", "classify") and not strategy.source.needs_autograd:
        return [f"optim: {values['optim']} works without gradients, task {values['task']} needs them"]
    found = idle(values["optim"], strategy.rules.values(), betas=values["betas"], eps=values["eps"])
    found += of_precision(values, differentiates=strategy.source.needs_autograd)
    found += of_activations(values, differentiates=strategy.source.needs_autograd)
    found += of_noise(values, differentiates=strategy.source.needs_autograd)
    if strategy.source.needs_autograd:
        over_several = values["gradient_release"] and values["accumulation"] > 1
        refusal = accumulation_problem(strategy) if over_several else ""
        return found + ([f"accumulation: {refusal}"] if refusal else [])
    found += [
        f"{name}: {values['optim']} works without gradients, {POINTLESS[name]}; leave it out"
        for name in ("gradient_checkpointing", "gradient_release", "offload_state")
        if values[name]
    ]
    if values["clip"] not in ("auto", "none"):
        found.append(
            f"clip: {values['optim']} works without gradients, there is nothing to clip; leave it out"
        )
    return found
