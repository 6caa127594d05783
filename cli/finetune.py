"""`lowmem finetune`: parse, run the recipe, show what came out."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from lowmem.config import RunConfig, default_output, from_flags, read
from lowmem.errors import ConfigError, UserError
from lowmem.values import bracketed

from . import render
from ._configs import find, problems, shipped
from ._flags import run_flags
from .app import Json


@run_flags()
def command(
    config: Annotated[
        str | None,
        typer.Option("--config", metavar="FILE", help="YAML with any of these settings; flags win over it."),
    ] = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a model (--model, --optim). Without --data and --config it learns the demo data."""
    given = dict(bracketed({name: value for name, value in flags.items() if value is not None})[0])
    base = _base(given, config)
    try:
        first = from_flags(given, base)  # what needs no package
    except ConfigError:
        from_flags(given, base, problems)  # all problems at once, those that need packages among them
        raise
    render.say(f"{first.model}, {first.optim}: checking the settings")
    run = from_flags(given, base, problems)
    run = importlib.import_module("lowmem.training.zeroth.usual").settled(run)
    recipe = importlib.import_module("lowmem.recipes.finetune")
    from ._progress import Bars

    with Bars() as progress:
        result = recipe.finetune(run, progress=progress)
    if render.speaks():
        render.emit(result, None if as_json else _tables(result, run), as_json)
    if ruined := result.get("nonfinite_weights"):
        raise UserError(
            f"the model in {result['output_dir']} is ruined: {len(ruined)} tensors hold numbers that are not "
            f"finite (first {ruined[0]}); lower lr and start afresh"
        )


def _base(given: dict[str, Any], config: str | None) -> dict[str, Any]:
    """Settings under the flags: of --config, of the run to resume, or of the demo when no data is named."""
    if config is not None:
        return read(find(config))
    folder = given.get("output_dir") or default_output(given.get("model", ""), given.get("optim", ""))
    earlier = Path(folder) / "config.yaml"
    if given.get("resume") and earlier.is_file():
        render.say(f"resuming with the settings of {earlier} where no flag is given")
        return read(earlier)
    if given.get("resume") and not {"model", "optim"} <= given.keys():
        raise UserError(
            f"no run in {folder} to resume (it holds no config.yaml): give the --output-dir of one, or "
            "--model and --optim to start there"
        )
    if given.get("data", "factbook") != "factbook":
        return {}
    demo = read(shipped()["demo"])
    tuned = {"lr", "optim_args"}  # for the demo's own strategy; another one starts from its defaults
    own = given.get("optim", demo["optim"]) == demo["optim"]
    steps = str(given.get("steps", ""))
    if steps.isdigit() and int(steps) < demo["warmup"]:  # a first look: --steps 2
        demo["warmup"] = 0
    render.say("demo data: settings of configs/runs/demo.yaml where no flag is given")
    return {k: v for k, v in demo.items() if k not in {"model", "optim"} and (own or k not in tuned)}


def _tables(result: dict[str, Any], run: RunConfig) -> list[Any]:
    """The closing table and the sample answers."""
    rows = [(label, value) for label, value in _facts(result, run) if value is not None]
    tables: list[Any] = [render.table("", [f"{run.model}, {run.optim}", ""], rows)]
    for sample in result.get("samples", []):
        lines = [(when, sample[when]) for when in ("before", "after")]
        tables.append(render.table(sample["prompt"], ["", "answer"], lines))
    return tables


def _facts(result: dict[str, Any], run: RunConfig) -> list[tuple[str, str | None]]:
    before, after = (result["held_out"][when] for when in ("before", "after"))
    first, last = (result["benchmarks"][when] for when in ("before", "after"))
    state, steps = result["state_bytes"], result["steps"]
    skipped = result["nonfinite_elements"]
    against = [
        f"{render.size(count)} with {dtype} moments ({state / count - 1:+.0%})"
        for dtype, count in result["adamw_state_bytes"].items()
    ]
    ruined = result["nonfinite_weights"]
    return [
        *((f"held-out {name}", _before_after(before.get(name), after.get(name))) for name in after),
        ("loss on general text", _before_after(*(result["general"][when] for when in ("before", "after")))),
        *((name, _before_after(first.get(name), value)) for name, value in last.items()),
        ("training", f"{steps} step{'s' * (steps != 1)} in {render.seconds(result['seconds'])}"),
        ("not stepped", f"{skipped:,} elements had a gradient that is not finite" if skipped else None),
        ("ruined", f"{len(ruined)} weight tensors hold numbers that are not finite" if ruined else None),
        ("optimizer state", f"{render.size(state)} ({state:,} bytes)"),
        ("AdamW would hold", "\n".join(against)),
        ("peak memory", render.size(result["peak_bytes"]) if result["peak_bytes"] else None),
        ("written to", str(result["output_dir"])),
    ]


def _before_after(before: float | None, after: float | None) -> str | None:
    if before is None or after is None:
        return None
    change = f" ({after / before - 1:+.0%})" if before else ""
    return f"{before:.3f} -> {after:.3f}{change}"
