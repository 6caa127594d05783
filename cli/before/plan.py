"""`lowmem plan`: what a run will take, what fits, and why, before anything is downloaded or run."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowmem.errors import UserError
from lowmem.memory.run import Run

from .. import render
from .._flags import run_flags
from ..app import Json, Plugins
from . import _search

if TYPE_CHECKING:
    from lowmem.memory.advice.found import Found
    from lowmem.memory.advice.solve import Solution
    from lowmem.memory.lengths import Lengths
    from lowmem.memory.plan import Plan, StrategyPlan

SOLVE = {"seq-len": "seq_len", "batch-size": "batch_size"}


@run_flags(of=Run)
def command(
    model: Annotated[str, typer.Option("--model", help="Name (see `lowmem models`), local path or Hub id.")],
    optim: Annotated[
        str | None,
        typer.Option(
            "--optim",
            help="Strategy or module:factory, several with commas as in galore(rank=64),adamw, or all. "
            "Without it, and with a card: what fits it, best first; adamw where there is no card.",
        ),
    ] = None,
    optim_args: Annotated[
        str, typer.Option("--optim-args", metavar="K=V,...", help="Options of the strategy.")
    ] = "",
    gpu: Annotated[str | None, typer.Option("--gpu", help="Card (see `lowmem gpus`).")] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", metavar="SIZE", help="Memory that may be taken, as in 23.5GiB.")
    ] = None,
    solve: Annotated[
        str | None,
        typer.Option("--solve", metavar="seq-len|batch-size", help="Find the largest that fits."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Rows as for finetune: how long they are is read, with the tokenizer."),
    ] = None,
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a report.")] = None,
    emit: Annotated[
        str | None,
        typer.Option(
            "--emit", metavar="FILE", help="Write the best plan's run for `lowmem finetune --config`."
        ),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Search among ways to train all weights.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Write a run that does not fit.")] = False,
    plugin: Plugins = None,
    as_json: Json = False,
    **flags: Any,
) -> None:
    """Predict the memory of a fine-tuning run; no weights are read."""
    from lowmem.memory.device.gpus import limit_of
    from lowmem.outside import bring

    unknown = _unknown(solve, gpu, budget)
    _check_written(html, emit, force)
    looking = optim is None and bool(gpu or budget)
    _check_search(looking, full, optim_args)
    device = flags["device"] or Run.device
    if looking and limit_of(gpu, budget, None, device):  # a card that is not known is said first
        render.say(f"{model}: looking for what fits {gpu or budget}, method by method")
    from .._progress import Bars

    bring(plugin or ())
    found = _lengths(model, data, flags) if data else None
    ways: tuple[Found, ...] = ()
    with Bars():  # an architecture that takes long says so
        if looking:
            planned, ways = _search.searched(model, gpu, budget, flags, full=full, advise=html is not None)
        else:
            from lowmem.memory import plan as planning

            planned = planning.plan(
                model, optim or "adamw", options=optim_args or None, budget=budget, gpu=gpu, **flags
            )
    planned = dataclasses.replace(planned, command=_plugged(planned.command, plugin))
    ways = tuple(dataclasses.replace(way, command=_plugged(way.command, plugin)) for way in ways)
    for text in (*planned.warnings, *_notes(planned)):
        render.warning(text)
    solutions = _solve(planned, unknown)
    planned = _with_solutions(planned, unknown, solutions)
    if html:
        from lowmem import report
        from lowmem.memory.pictures import report_data

        data_ = report_data(planned) | ({"search": [way.to_dict() for way in ways]} if ways else {})
        render.say(f"report written to {report.write(data_, html)}")
    if emit:
        _emit(model, _solved(planned, unknown), emit, data, force, plugin)
    document = planned.to_dict() | ({"lengths": found.to_dict()} if found else {})
    document |= {"search": [way.to_dict() for way in ways]} if ways else {}
    if solutions:
        names = _names(planned)
        document["solved"] = {
            "for": unknown,
            "largest": {name: s.value for name, s in zip(names, solutions, strict=True)},
            "stopped": {name: s.stopped for name, s in zip(names, solutions, strict=True)},
        }
    shown = _tables(planned, unknown, solutions)
    if ways and planned.budget is not None:
        shown = [*_search.tables(planned, ways, planned.budget), "", *shown[-len(planned.assumptions) :]]
    render.emit(document, shown, as_json)


def _plugged(command: str | None, plugin: list[str] | None) -> str | None:
    """A command with the modules that it needs."""
    return command and " ".join([command, *(f"--plugin {shlex.quote(name)}" for name in plugin or ())])


def _check_search(looking: bool, full: bool, optim_args: str) -> None:
    if looking and optim_args:
        raise UserError("optim_args are options of one strategy: give --optim as well")
    if full and not looking:
        raise UserError(
            "--full is a wish of a search: leave out --optim, and give --gpu NAME or --budget SIZE"
        )


def _names(planned: Plan) -> list[str]:
    """A name for each plan, with the options that tell variants of one method apart."""
    from lowmem.report.plan import labels

    return labels([row.to_dict() for row in planned.plans])


def _unknown(solve: str | None, gpu: str | None, budget: str | None) -> str | None:
    from lowmem.errors import nearest

    if solve is None:
        return None
    if solve not in SOLVE:
        raise UserError(f"cannot solve for {solve!r}; {nearest(solve, SOLVE)}")
    if gpu is None and budget is None:
        raise UserError("--solve needs something to fit into: give --gpu NAME or --budget 23.5GiB")
    return SOLVE[solve]


def _lengths(model: str, data: str, flags: dict[str, Any]) -> Lengths:
    """How long the rows are, made options of the run."""
    from lowmem.memory.lengths import of_data

    found = of_data(model, data, flags["seq_len"] or Run.seq_len)
    flags["rows"] = flags["rows"] or "packed"  # as finetune does
    given = found.options(flags["rows"])
    flags.update({name: value for name, value in given.items() if name == "seq_len" or flags[name] is None})
    render.say(
        f"{found.rows} rows of {found.typical} tokens, the longest {found.longest}; {found.cut} are cut"
    )
    return found


def _check_written(html: str | None, emit: str | None, force: bool) -> None:
    for target in (html, emit):
        _check_folder(target)
    if force and not emit:
        raise UserError("--force writes a run that does not fit: give --emit FILE, or leave it out")


def _check_folder(target: str | None) -> None:
    if target and not Path(target).expanduser().parent.is_dir():
        raise UserError(f"cannot write {target}: the folder {Path(target).parent} does not exist")


def _notes(planned: Plan) -> Sequence[str]:
    """What was assumed about the budget, where the user left it open."""
    if planned.budget is None or planned.budget.name is not None:
        return ()
    return planned.budget.notes


def _solve(planned: Plan, unknown: str | None) -> list[Solution]:
    if unknown is None or planned.budget is None:
        return []
    from lowmem.memory.advice.solve import largest

    return [largest(unknown, planned.config, planned.run, s, planned.budget) for s in planned.made]


def _with_solutions(planned: Plan, unknown: str | None, solutions: Sequence[Solution]) -> Plan:
    """The plan with what was solved for beside each strategy."""
    if not solutions:
        return planned
    rows = []
    for row, solution in zip(planned.plans, solutions, strict=True):
        answer: dict[str, Any] = {f"max_{unknown}": solution.value}
        rows.append(dataclasses.replace(row, **answer))
    return dataclasses.replace(planned, plans=tuple(rows))


def _solved(planned: Plan, unknown: str | None) -> Plan:
    """The plan of what was solved for, where the best strategy has an answer."""
    best = planned.plans[0]
    value = best.max_seq_len or best.max_batch_size
    if unknown is None or not value:
        return planned
    solved: dict[str, Any] = {unknown: value}
    run = dataclasses.replace(planned.run, **solved)
    return dataclasses.replace(
        planned, run=run, plans=(dataclasses.replace(best, fits=True), *planned.plans[1:])
    )


def _emit(
    model: str, planned: Plan, target: str, data: str | None, force: bool, plugin: list[str] | None = None
) -> None:
    """Write the run of the best plan.

    Raises:
        UserError: it does not fit, and nothing forces it.
    """
    from lowmem.memory.advice.emit import accelerate, launch, text

    best = planned.plans[0]
    if best.fits is False and not force:
        raise UserError(
            f"{target} is not written: {best.strategy} comes nearest and misses by "
            f"{_size(-(best.headroom_bytes or 0))} ({best.verdict}); follow its levers, or give --force"
        )
    _check_packing(planned)
    path = Path(target).expanduser()
    plugins = ",".join(plugin or ())
    written, command = (
        text(model, planned.run, best.strategy, best.options, data, plugins),
        f"lowmem finetune --config {path}",
    )
    if planned.run.ranks > 1:
        import yaml

        beside = path.with_suffix(".accelerate.yaml")
        settings, command = (
            yaml.safe_dump(accelerate(planned.run)),
            launch(planned.run, str(path), str(beside)),
        )
        beside.write_text(f"# {command}\n{settings}", encoding="utf-8")
    path.write_text(written, encoding="utf-8")
    given = "" if data else " --data YOURS"
    render.say(f"run of {best.strategy} written to {path}: {command}{given}")


def _check_packing(planned: Plan) -> None:
    """Refuse to write a run that packs rows of a model that `lowmem finetune` will not pack."""
    from lowmem.memory.trace.trainable import packing_problem

    if planned.run.rows == "padded" or planned.run.task != "sft":
        return
    if problem := packing_problem(planned.config, planned.run):
        raise UserError(f"cannot emit it: {problem}")


def _tables(planned: Plan, unknown: str | None, solutions: Sequence[Solution]) -> list[Any]:
    model, judged = planned.model, planned.budget is not None
    from lowmem.report.plan import subject

    card = {"gpu": planned.budget.to_dict()} if planned.budget is not None else {}
    head = (
        f"{subject(planned.to_dict() | card)}: {model.parameters:,} parameters, {model.trainable:,} trained"
    )
    columns = ["strategy", *(["verdict", "to spare"] if judged else [])]
    columns += ["allocated", "reserved", "device", "state", "peak at"]
    columns += ["cards needed"] if _counts_cards(planned) else []
    rows = [[name, *_cells(row, judged)] for name, row in zip(_names(planned), planned.plans, strict=True)]
    stops: list[str] = []
    if solutions:
        columns.append(f"largest {str(unknown).replace('_', ' ')}")
        rows = [[*cells, s.value or "none fits"] for cells, s in zip(rows, solutions, strict=True)]
        stops = [
            f"{cells[0]}: {cells[-1]}, stopped by {s.stopped}"
            for cells, s in zip(rows, solutions, strict=True)
        ]
    shown: list[Any] = [
        head,
        render.table("", columns, rows, right=["to spare", "allocated", "reserved", "device", "state"]),
    ]
    shown += stops
    if any(row.verdict == "fits with retries" for row in planned.plans):
        from lowmem.report.plan import RETRIES

        shown.append(RETRIES)
    if _counts_cards(planned):
        from lowmem.report.plan import CARDS

        shown.append(CARDS)
    best = planned.plans[0]
    if planned.run.ranks > 1:
        shown.append(_parts(best))
    shown += [f"{best.strategy}: {sentence}" for sentence in best.why]
    shown += ["", *[f"- {text}" for text in planned.assumptions]]
    return shown


def _cells(row: StrategyPlan, judged: bool) -> list[Any]:
    peak = row.peak
    verdict = [row.verdict, _size(row.headroom_bytes)] if judged else []
    sizes = [_size(peak[key]) for key in ("allocated", "reserved", "device")]
    cards = [] if row.ranks_needed is None else [row.ranks_needed or "no number"]
    return [*verdict, *sizes, _size(row.state_bytes), row.event, *cards]


def _counts_cards(planned: Plan) -> bool:
    return any(row.ranks_needed is not None for row in planned.plans)


def _parts(row: StrategyPlan) -> Any:
    """What one of several cards holds at the peak, and how each part is known."""
    rows = [
        [key.replace("_", " "), _size(size), row.certainty[key]] for key, size in row.at_peak.items() if size
    ]
    return render.table(
        f"{row.strategy}: on each card at the {row.event}", ["part", "size", "known"], rows, right=["size"]
    )


def _size(size: int | None) -> str:
    from lowmem.report.units import format_bytes

    return format_bytes(size)
