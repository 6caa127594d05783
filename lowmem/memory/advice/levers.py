"""Which lever lowers the peak, by how much, and which gains nothing.

A lever is one change of the run. It is planned like the run itself (from shallow traces or closed forms),
not guessed: a peak is a maximum over events, so what shrinks an event that does not bind gains nothing, and
that is worth saying. Sentences here are the ones that the report and the terminal show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lowmem.errors import UserError
from lowmem.memory.advice.ways import problem
from lowmem.memory.between import above
from lowmem.memory.count import state_bytes
from lowmem.memory.footprint import Footprint, Peak, combine, footprint
from lowmem.memory.run import Run
from lowmem.memory.surface import as_peak, formal
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.memory.trace.windows import Parameter, special
from lowmem.optim.strategy import Strategy
from lowmem.report.units import format_bytes
from lowmem.strategies import create

SMALL = 0.005  # of the peak: less than this is no gain
LARGE = 0.05  # of the state: what is worth a rule of its own
FACTORED = ("embedding", "head")
"""Roles whose moments lose least by being factored."""


@dataclass(frozen=True)
class Lever:
    """One change of the run, the peak it leads to and the event that binds then."""

    name: str
    peak: int
    event: str


def variants(run: Run, needs_autograd: bool, releases: bool = True) -> dict[str, Run]:
    """The runs one lever away; gradients are released where the strategy bears it."""
    found: dict[str, Run] = {}
    if needs_autograd:
        checkpointed = replace(run, gradient_checkpointing=True)
        released = replace(run, gradient_release=True, max_grad_norm=0.0)
        if not run.gradient_checkpointing:
            found["gradient checkpointing"] = checkpointed
        if releases and not run.gradient_release and run.accumulation == 1:
            found["gradient release"] = released
        if len(found) == 2:
            found["gradient checkpointing and release"] = replace(released, gradient_checkpointing=True)
        if run.loss != "chunked" and run.task == "sft":
            found["chunked loss"] = replace(run, loss="chunked", label_tokens=None)
    if run.batch_size > 1 and run.task != "grpo":  # whose answers to a prompt are judged together
        found["half the batch"] = replace(run, batch_size=run.batch_size // 2)
    elif run.seq_len > 256:
        found["half the sequence"] = replace(run, seq_len=run.seq_len // 2)
    if run.evaluates_more and run.task != "grpo":
        found["evaluation of the training's batch"] = replace(run, eval_batch_size=None)
    return found


def step_peak(config: Any, run: Run, held: Footprint) -> Peak:
    """The peak of a step at the cost of a formula or a few layers."""
    if formal(config, replace(run, eval_batch_size=0), held):
        return as_peak(config, run, held)
    return combine(extrapolated(config, run, special(held.strategy)), held)


def quick_peak(config: Any, run: Run, held: Footprint) -> Peak:
    """The peak of a run at that cost: of a step, or of what happens between steps where that takes more."""
    if formal(config, run, held):
        return as_peak(config, run, held)
    found = extrapolated(config, run, special(held.strategy))
    return combine(found, held, above(config, run, found, held))


def levers(config: Any, run: Run, held: Footprint) -> tuple[Lever, ...]:
    """Every lever's peak, lowest first."""
    needs = held.strategy.source.needs_autograd
    found = []
    for name, changed in variants(run, needs, not held.strategy.waits).items():
        if (peak := _tried(config, changed, held)) is not None:
            found.append(Lever(name, peak.allocated, peak.event))
    return tuple(sorted(found, key=lambda lever: lever.peak))


def _tried(config: Any, run: Run, held: Footprint) -> Peak | None:
    """The peak of a run that nobody has asked for; None where it cannot be planned."""
    if problem(run, held.strategy):
        return None
    try:
        return quick_peak(config, run, held)
    except UserError:  # a model that does not take the lever, which is no fault of the run
        return None


def offloaded(held: Footprint) -> list[str]:
    """What state in the host's memory takes there, and on the way."""
    if not held.away:
        return []
    return [
        f"Optimizer state: {format_bytes(held.away)} of pinned host memory; every step moves as much to the "
        f"device and as much back, and the device holds {format_bytes(held.held)} of it at a time."
    ]


def sentences(peak: Peak, found: Sequence[Lever], run: Run) -> list[str]:
    """What binds, what comes next, what helps and what does not."""
    parts = [f"{key.replace('_', ' ')} {format_bytes(size)}" for key, size in _largest(peak.at_peak)]
    said = [f"The peak of {format_bytes(peak.allocated)} is at the {peak.event}: {', '.join(parts)}."]
    others = sorted(((size, name) for name, size in peak.events.items() if name != peak.event), reverse=True)
    if others:
        size, name = others[0]
        said.append(
            f"The next highest event is the {name}, {format_bytes(size)}: lowering the {peak.event} alone "
            f"gains at most {format_bytes(peak.allocated - size)}."
        )
    if run.typical is not None:
        said.append(
            f"That is the longest batch, {run.seq_len} tokens a row; one of {run.typical} tokens, as is "
            "typical, takes less: see the events."
        )
    threshold = SMALL * peak.allocated
    helping = [lever for lever in found if peak.allocated - lever.peak > threshold]
    idle = [lever for lever in found if abs(peak.allocated - lever.peak) <= threshold]
    worse = [lever for lever in found if lever.peak - peak.allocated > threshold]
    if helping:
        best = helping[0]
        said.append(
            f"Best lever: {best.name}, {format_bytes(best.peak - peak.allocated, signed=True)} to "
            f"{format_bytes(best.peak)}; then the {best.event} binds."
        )
    elif found:
        said.append("No single lever lowers the peak; another strategy or a smaller model does.")
    said += [f"{_capital(lever.name)} gains nothing here: the {lever.event} stays." for lever in idle]
    said += [
        f"{_capital(lever.name)} costs {format_bytes(lever.peak - peak.allocated)} here: "
        f"the {lever.event} would bind."
        for lever in worse
    ]
    return said


def roles(strategy: Strategy, parameters: Sequence[Parameter]) -> list[str]:
    """What embedding and head hold of the state, where factored moments would hold a lot less.

    What that saves is counted of the strategy with the options that are named: rules by turns, modifiers and
    sources may hold as much as before, or refuse it.

    Args:
        strategy: of the plan; parameters: the trainable ones.

    Returns:
        One sentence, with the options that do it, or none.
    """
    total = footprint(strategy, parameters, Run(), steps="none").state_bytes
    now, factored = _by_role(strategy, parameters), _by_role(_factored(strategy), parameters)
    open_ = [role for role in FACTORED if role in now and role not in strategy.rules]
    names = [role for role in open_ if now[role] - factored[role] > LARGE * total]
    options = dict.fromkeys(names, "adafactor")
    saved = _saved(strategy, options, parameters, total)
    if saved <= LARGE * total:
        return []
    share = sum(now[role] for role in names) / total
    verb = "hold" if len(names) > 1 else "holds"
    written = ",".join(f"{role}={rule}" for role, rule in options.items())
    return [
        f"{_capital(' and '.join(names))} {verb} {share:.0%} of the state: "
        f"{written} saves {format_bytes(saved)}."
    ]


def _factored(strategy: Strategy) -> Strategy:
    return replace(create("adafactor"), writer=strategy.writer)


def _by_role(strategy: Strategy, parameters: Sequence[Parameter]) -> dict[str, int]:
    """State of each role, were all tensors stepped."""
    found: dict[str, int] = {}
    for p in parameters:
        ranks = p.shard.ranks if p.shard else 1
        size = state_bytes(strategy, p.shape, p.dtype, p.role, ranks=ranks, coded=p.coded)
        found[p.role] = found.get(p.role, 0) + size
    return found


def _saved(
    strategy: Strategy, options: Mapping[str, str], parameters: Sequence[Parameter], total: int
) -> int:
    """Of the total state, bytes that other options save; 0 where they are refused or there is no name."""
    if not strategy.name or not options:
        return 0
    try:
        other = create(strategy.name, **{**strategy.options, **options})
    except UserError:
        return 0
    return total - footprint(other, parameters, Run(), steps="none").state_bytes


def side(strategy: Strategy, parameters: Sequence[Parameter]) -> list[str]:
    """What a card's state would be if the side were projected that ranks do not share.

    Args:
        strategy: of the plan; parameters: the trainable ones, as a rank holds them.

    Returns:
        One sentence with the option, where it saves something, or none.
    """
    if not any(p.shard for p in parameters) or strategy.options.get("proj_type") in (None, "right"):
        return []
    right = create(strategy.name, **{**strategy.options, "proj_type": "right"})
    own, other = (
        sum(
            state_bytes(s, p.shape, p.dtype, p.role, ranks=p.shard.ranks if p.shard else 1)
            for p in parameters
        )
        for s in (strategy, right)
    )
    if own - other <= LARGE * own:
        return []
    saved = format_bytes(own - other)
    return [f"Moments of projected rows are whole on every card: proj_type=right saves {saved} of state."]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _largest(at_peak: Mapping[str, int]) -> list[tuple[str, int]]:
    total = sum(at_peak.values())
    rows = sorted(at_peak.items(), key=lambda item: -item[1])
    return [(key, size) for key, size in rows if size >= 0.001 * total]


def waterfall(config: Any, run: Run, chosen: Strategy) -> list[dict[str, Any]]:
    """From plain AdamW lever by lever to the chosen strategy, zero gains included.

    Returns:
        rows of {"lever", "peak", "event"}; none for what cannot be planned.
    """
    own = run.task != "sft"  # such a task has a loss of its own
    plain = replace(run, gradient_checkpointing=False, gradient_release=False)
    last = plain = plain if own else replace(plain, loss="plain", label_tokens=None)
    rows = []
    for name, changes, strategy in _steps(run, chosen):
        changed = replace(last, **changes)
        changed = replace(changed, gradient_release=changed.gradient_release and not strategy.waits)
        held = footprint(strategy, extrapolated(config, plain).parameters, changed)
        if (peak := _tried(config, changed, held)) is not None:
            rows.append({"lever": name, "peak": peak.allocated, "event": peak.event})
            last = changed
    return rows


def _steps(run: Run, chosen: Strategy) -> list[tuple[str, dict[str, Any], Strategy]]:
    """What changes from row to row of the waterfall, and the strategy of each."""
    usual = create("adamw")
    better = chosen if chosen.name != "adamw" and chosen.source.needs_autograd else create("adamw_8bit")
    steps: list[tuple[str, dict[str, Any], Strategy]] = [
        ("plain AdamW", {}, usual),
        ("+ gradient checkpointing", {"gradient_checkpointing": True}, usual),
    ]
    if run.accumulation == 1:
        steps.append(("+ gradient release", {"gradient_release": True, "max_grad_norm": 0.0}, usual))
    steps.append((f"+ {better.name}", {}, better))
    if run.task == "sft":
        steps.append(("+ chunked loss", {"loss": "chunked"}, better))
    return steps
