"""What a plan shows: the verdict, who fits, what the peak is made of, and which lever lowers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowmem.report.charts.bars import CATEGORIES, Bar, bars, stacked, waterfall, words
from lowmem.report.charts.curves import Curve, curves
from lowmem.report.charts.maps import frontier, heat_map
from lowmem.report.charts.timeline import picture
from lowmem.report.page import Cell, Figure, Report, Right, Section, Size, Table
from lowmem.report.units import format_bytes

TIMELINES = 3  # plans whose step is drawn
SHOWN = 20  # rows of a search
SMALL = 0.005  # of the peak: less is no gain
RETRIES = (
    "Fits with retries: the tensors have room, but not side by side; the allocator hands memory back and "
    "asks again, which costs time and may fail, so it does not count as fitting."
)
CARDS = (
    "Cards needed: the fewest, a power of two, whose tensors leave 5 % of each to the allocator; "
    "activations, logits and what is gathered do not divide."
)
ORDER = (
    "By what is kept of Adam's moments, then by recomputation, then by bytes to spare. What a method costs "
    "in quality depends on the data: `lowmem compare` measures it."
)
STAR = "* by the tensors of a few layers; without it the whole model was planned, its allocator simulated."
LEGEND = [
    *[(f"c-{key}", words(key)) for key in CATEGORIES],
    ("c-outside", "outside tensors (context, caches)"),
]


def build(data: Mapping[str, Any]) -> Report:
    """The report of a plan document."""
    plans: Sequence[Mapping[str, Any]] = data["plans"]
    budget = data.get("budget_bytes")
    names = labels(plans)
    verdict, tone = say(plans, names, budget)
    room = for_tensors(data)
    sections = [
        _search(data),
        _ranked(plans, names),
        _at_peak(plans, names, budget),
        _waterfall(data, room),
        _maps(data, room),
        _timeline(plans, names, room),
        *_why(plans, names),
        *closing(data),
    ]
    return Report(
        f"Memory plan: {subject(data)}", verdict, tone, [s for s in sections if s is not None], _lean(data)
    )


def for_tensors(data: Mapping[str, Any]) -> int | None:
    """Bytes of the budget without what lies outside torch's allocator; None where there is no budget."""
    budget, context = data.get("budget_bytes"), (data.get("gpu") or {}).get("context") or (0,)
    return None if budget is None else budget - sum(context) // len(context)


def subject(data: Mapping[str, Any]) -> str:
    """What was planned, in a line: the model, on which card, with rows of which size and dtype."""
    run, card = data.get("run") or {}, (data.get("gpu") or {}).get("name")
    on = f" on {card}" if card else ""
    size = (
        f", batch {run['batch_size']} x {run['seq_len']} tokens"
        if {"batch_size", "seq_len"} <= set(run)
        else ""
    )
    dtype = f", {run['dtype']}" if run.get("dtype") else ""
    ranks = int(run.get("ranks") or 1)
    spread = "sharded over" if run.get("shard") == "full" else "copied to"
    several = f", {spread} {ranks} cards" if ranks > 1 else ""
    return f"{data['model']['name']}{on}{size}{dtype}{several}"


def labels(plans: Sequence[Mapping[str, Any]], *, whole: bool = False) -> list[str]:
    """A name for each plan: its strategy, with the options that tell it from others of the same name.

    Args:
        plans: entries with "strategy" and "options".
        whole: name all options, because they hold only what the user asked for.
    """
    made = []
    for plan in plans:
        same = [p["options"] for p in plans if p["strategy"] == plan["strategy"]]
        telling = {
            k: v for k, v in plan["options"].items() if whole or any(o.get(k, same) != v for o in same)
        }
        extra = ", ".join(f"{k}={v}" for k, v in telling.items())
        made.append(f"{plan['strategy']} ({extra})" if extra else plan["strategy"])
    return made


def say(plans: Sequence[Mapping[str, Any]], names: Sequence[str], budget: int | None) -> tuple[str, str]:
    """The verdict in one line, and its tone."""
    if not plans:
        return "Nothing was planned.", "plain"
    if budget is None:
        return _without_budget(plans, names), "plain"
    if len(plans) == 1:
        return _single(plans[0], budget)
    fitting = [i for i, plan in enumerate(plans) if plan["fits"]]
    best = max(fitting or range(len(plans)), key=lambda i: plans[i]["headroom_bytes"])
    head = plans[best]["headroom_bytes"]
    if not fitting:
        return (
            f"None of {len(plans)} strategies fits into {format_bytes(budget)}; {names[best]} comes nearest "
            f"and misses by {format_bytes(-head)}.{_lever(plans[best])}"
        ), "bad"
    return (
        f"{len(fitting)} of {len(plans)} strategies fit into {format_bytes(budget)}; the smallest is "
        f"{names[best]} with {format_bytes(head)} to spare. It peaks at {words(plans[best]['event'])}."
    ), "good"


def _without_budget(plans: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    order = sorted(range(len(plans)), key=lambda i: plans[i]["peak"]["allocated"])
    low, high = order[0], order[-1]
    peak = format_bytes(plans[low]["peak"]["allocated"])
    where = words(plans[low]["event"])
    if low == high:
        return f"{names[low]} peaks at {peak} of tensors, at {where}.{_lever(plans[low])}"
    most = format_bytes(plans[high]["peak"]["allocated"])
    return f"{names[low]} takes least, {peak} of tensors at {where}; {names[high]} takes most, {most}."


def _single(plan: Mapping[str, Any], budget: int) -> tuple[str, str]:
    head = plan["headroom_bytes"]
    where = f"Binding event: {words(plan['event'])}.{_lever(plan)}"
    if plan.get("verdict") == "fits with retries":
        more = format_bytes(-head)
        return (
            f"Fits with retries, which does not count as fitting: {more} more would spare them. {where}",
            "warn",
        )
    if plan["fits"]:
        tone = "good" if head >= 0.03 * budget else "warn"
        return (
            f"Fits: {format_bytes(budget - head)} of {format_bytes(budget)} "
            f"({format_bytes(head)} free). {where}",
            tone,
        )
    return f"Does not fit: misses {format_bytes(budget)} by {format_bytes(-head)}. {where}", "bad"


def _lever(plan: Mapping[str, Any]) -> str:
    saving = [(saved(lever, plan), lever["lever"]) for lever in plan.get("levers") or ()]
    best = max(saving, default=(0, ""))
    worth = best[0] > SMALL * plan["peak"]["allocated"]
    return f" Best lever: {best[1]}, {format_bytes(-best[0], signed=True)}." if worth else ""


def saved(lever: Mapping[str, Any], plan: Mapping[str, Any]) -> int:
    """Bytes that a lever takes off the peak, from "saves" or from the peak it leads to."""
    return int(lever["saves"] if "saves" in lever else plan["peak"]["allocated"] - lever["peak"])


def _ranked(plans: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Section:
    judged = any(plan.get("fits") is not None for plan in plans)
    sized = any(plan.get("max_seq_len") or plan.get("max_batch_size") for plan in plans)
    columns = ["strategy", *(["verdict", "headroom"] if judged else []), "allocated", "reserved", "device"]
    columns += ["state", "binding event", *(["longest sequence", "largest batch"] if sized else [])]
    rows: list[list[Cell]] = []
    for plan, name in zip(plans, names, strict=True):
        peak = plan["peak"]
        row: list[Cell] = [name]
        if judged:
            row += [verdict_word(plan), Size(plan["headroom_bytes"], signed=True)]
        row += [Size(peak["allocated"]), Size(peak.get("reserved")), Size(peak.get("device"))]
        row += [Size(plan["state_bytes"]), words(plan["event"])]
        rows.append(row + ([plan.get("max_seq_len"), plan.get("max_batch_size")] if sized else []))
    marks = [mark(plan) for plan in plans]
    text = "Allocated: tensors. Reserved: what the allocator holds for them. Device: all, with the context."
    text += f" {RETRIES}" if "warn" in marks else ""
    return Section("Strategies", text, tables=[Table(columns, rows, marks)])


def mark(row: Mapping[str, Any]) -> str:
    """The colour of a verdict: green, amber where the allocator must hand memory back, red."""
    if row.get("verdict") == "fits with retries":
        return "warn"
    return {True: "good", False: "bad", None: ""}[row.get("fits")]


def _search(data: Mapping[str, Any]) -> Section | None:
    """What fits the card, best first, where nobody chose a method."""
    found = data.get("search")
    return Section("What fits, best first", f"{ORDER} {STAR}", tables=[ways(found)]) if found else None


def ways(found: Sequence[Mapping[str, Any]]) -> Table:
    """The first rows of a search, as the plan's document has them."""
    names = "method, trains, with, verdict, to spare, allocated, batch up to, would fit with"
    rows: list[list[Cell]] = [
        [
            row["strategy"], row["trains"], ", ".join(row["levers"]) or "-",
            row["verdict"] + ("" if row["checked"] else " *"), Size(row["headroom_bytes"], signed=True),
            Size(row["allocated"]), row["largest_batch_size"] or "-", row["needs"] or "-",
        ]
        for row in found[:SHOWN]
    ]  # fmt: skip
    return Table(names.split(", "), rows, [mark(row) for row in found[:SHOWN]])


def verdict_word(plan: Mapping[str, Any]) -> str:
    """fits, or out of memory, in the plan's own word where it has one."""
    return str(plan.get("verdict") or ("fits" if plan["fits"] else "does not fit"))


def _at_peak(plans: Sequence[Mapping[str, Any]], names: Sequence[str], budget: int | None) -> Section | None:
    if not plans:
        return None
    rows = [peak_bar(plan, name) for plan, name in zip(plans, names, strict=True)]
    picture_ = bars(rows, "Bytes at the peak instant by category", budget)
    keys = [*CATEGORIES, *(key for key in plans[0]["at_peak"] if key not in CATEGORIES)]
    columns = ["strategy", *map(words, keys)]
    cells: list[list[Cell]] = [
        [name, *(Size(plan["at_peak"].get(k, 0)) for k in keys)]
        for plan, name in zip(plans, names, strict=True)
    ]
    text = "One instant, so the pieces add up to the peak; the largest of each over time add up to more."
    return Section("At the peak", text, [Figure(picture_, LEGEND)], [Table(columns, cells)])


def peak_bar(plan: Mapping[str, Any], name: str) -> Bar:
    """The stacked bar of one plan, with what the device holds outside tensors where that is known."""
    allocated, device = plan["peak"]["allocated"], plan["peak"].get("device")
    pieces = stacked(plan["at_peak"], (device - allocated) if device else 0)
    return Bar(name, pieces, format_bytes(device or allocated))


def _waterfall(data: Mapping[str, Any], budget: int | None) -> Section | None:
    rows = data.get("waterfall")
    if not rows:
        return None
    cells: list[list[Cell]] = []
    before = None
    for row in rows:
        change = None if before is None else row["peak"] - before
        shown = "gains nothing" if change == 0 else format_bytes(change, signed=True)
        cells.append([row["lever"], Size(row["peak"]), Right(shown), words(row.get("event") or "-")])
        before = row["peak"]
    figure = Figure(waterfall(rows, budget), [("c-base", "peak"), ("c-saved", "saved"), ("c-cost", "added")])
    text = "Each row adds one lever to all rows above it. A lever gains nothing where another event binds."
    return Section(
        "Lever by lever", text, [figure], [Table(["lever", "peak", "change", "then binds"], cells)]
    )


def _maps(data: Mapping[str, Any], room: int | None) -> Section | None:
    grids = data.get("grid")
    if not grids:
        return None
    grids = [{"strategy": "", "options": {}, **g} for g in ([grids] if isinstance(grids, Mapping) else grids)]
    grids = [{**g, "strategy": name} for g, name in zip(grids, labels(grids), strict=True)]
    shades = [
        ("m-ample", "10 % or more free"),
        ("m-tight", "3 to 10 % free"),
        ("m-thin", "less than 3 % free"),
        ("m-over", "does not fit"),
    ]
    legend = shades if room is not None else []
    figures = [Figure(heat_map(g, room), legend, title=g["strategy"]) for g in grids]
    if room is None:
        return Section("Sequence length and batch size", "Allocated bytes at the peak.", figures)
    columns = ["strategy", *(f"batch {b}" for b in grids[0]["batch_sizes"])]
    rows = [[g["strategy"], *frontier(g, room)] for g in grids]
    text = (
        f"Allocated bytes at the peak; the heavy line is the frontier of the {format_bytes(room)} that there "
        "are for tensors. The table: longest sequence of the map whose tensors have room; whether they have "
        "it side by side, the verdicts above say."
    )
    table = [Table(columns, rows)] if all(g["batch_sizes"] == grids[0]["batch_sizes"] for g in grids) else []
    lines = [_frontiers(grids, room)] if len(grids) > 1 else []
    return Section("Sequence length and batch size", text, [*[f for f in lines if f], *figures], table)


def _frontiers(grids: Sequence[Mapping[str, Any]], room: int) -> Figure | None:
    series = []
    for grid in grids:
        fits = zip(grid["batch_sizes"], frontier(grid, room), strict=True)
        series.append(Curve(grid["strategy"], [(float(b), float(n)) for b, n in fits if n]))
    if not any(curve.points for curve in series):
        return None
    return Figure(
        curves(series, ("batch size", "longest sequence with room"), "Frontier of the tensors", log=True),
        title="Frontier of the tensors",
    )


def _timeline(plans: Sequence[Mapping[str, Any]], names: Sequence[str], room: int | None) -> Section | None:
    shown = [(p["timeline"], n) for p, n in zip(plans, names, strict=True) if p.get("timeline")][:TIMELINES]
    figures = [Figure(picture(line, capacity=room), LEGEND[:-1], title=name) for line, name in shown]
    return Section("One step", "Live bytes of one training step.", figures) if figures else None


def _lean(data: Mapping[str, Any]) -> dict[str, Any]:
    """The document without the timelines that are not drawn: those of a hundred plans would fill the page."""
    drawn = [i for i, plan in enumerate(data["plans"]) if plan.get("timeline")][:TIMELINES]
    plans = [
        plan if i in drawn else {k: v for k, v in plan.items() if k != "timeline"}
        for i, plan in enumerate(data["plans"])
    ]
    return {**data, "plans": plans}


def _why(plans: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Section]:
    sections = []
    for plan, name in zip(plans, names, strict=True):
        events = sorted(plan["events"].items(), key=lambda item: -item[1])
        tables = [Table(["event", "bytes"], [[words(key), Size(size)] for key, size in events])]
        levers = plan.get("levers") or ()
        if levers:
            rows = [[lever["lever"], Size(-saved(lever, plan), signed=True)] for lever in levers]
            tables.append(Table(["lever", "change of the peak"], rows))
        kinds = [[words(row), word] for row, word in plan["certainty"].items()]
        tables.append(Table(["row", "certainty"], kinds))
        command = plan.get("command") or ""
        sections.append(Section(f"Why: {name}", tables=tables, points=plan["why"], code=command, folded=True))
    return sections


def closing(data: Mapping[str, Any]) -> list[Section | None]:
    """Warnings, assumptions, the run's settings and the command."""
    warnings, assumptions = data.get("warnings") or (), data.get("assumptions") or ()
    settings = [[words(key), _plain(value)] for key, value in (data.get("run") or {}).items()]
    return [
        Section("Warnings", points=warnings) if warnings else None,
        Section("Assumptions", points=assumptions) if assumptions else None,
        Section("Settings", tables=[Table(["setting", "value"], settings)], folded=True)
        if settings
        else None,
        Section("Command", code=data["command"]) if data.get("command") else None,
    ]


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k}={v}" for k, v in value.items()) or "-"
    return "-" if value is None or value == "" else str(value)
