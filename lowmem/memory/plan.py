"""What a fine-tuning run will take, before anything is downloaded or run.

    plan(model, strategy, ...) -> Plan      one model, one run, one or many strategies
    Plan.to_dict()                          exactly the keys of `lowmem plan --json`
    pictures.report_data(plan)              the same, and what the pictures need, in the shapes `report` names
    advice.solve.largest(...)               the longest sequence, or the largest batch, that fits a budget

How: the real model takes one real training step without weights (`replica`), which gives the live bytes
at every named event; the strategies' own code counts state and scratch (`footprint`); closed forms say the
same a second time and any disagreement is reported. All strategies share one trace: only the optimizer's
rows differ.

Three numbers, from sure to less sure: allocated (tensors), reserved (what the caching allocator makes of
them, simulated), device (with the CUDA context). The verdict simulates the allocator at the budget.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lowmem.errors import UserError
from lowmem.memory import closed_form, gather
from lowmem.memory.advice import levers as advice
from lowmem.memory.advice import wording
from lowmem.memory.advice.cards import needed
from lowmem.memory.advice.levers import Lever
from lowmem.memory.between import beside, evaluates_more, simulated
from lowmem.memory.device.allocator import FITS, OUT, RETRIES, Verdict
from lowmem.memory.device.gpus import Budget, limit_of
from lowmem.memory.device.gpus import budget as parse_budget
from lowmem.memory.footprint import LOAD, SAVE, Footprint, Peak, combine, footprint
from lowmem.memory.run import Run
from lowmem.memory.surface import formula
from lowmem.memory.trace.extrapolate import evaluation, remembered
from lowmem.memory.trace.given import Given
from lowmem.memory.trace.ranks import AFTER, BUCKETS, GATHER, TAIL
from lowmem.memory.trace.replica import EVALUATION, Trace
from lowmem.memory.trace.tracker import Tracker
from lowmem.memory.trace.windows import special
from lowmem.optim.strategy import Strategy

AGREEMENT = 0.1  # percent by which the two methods may differ
TYPICAL = "step of a typical batch"
WORDS = (None, FITS, RETRIES, OUT)  # best first
Reserve = Callable[[int | None], Verdict]  # what the allocator makes of a run within so many bytes, or of any


@dataclass(frozen=True)
class ModelInfo:
    """The model in numbers; `trainable` counts adapters only where there are adapters."""

    name: str
    parameters: int
    trainable: int


@dataclass(frozen=True)
class StrategyPlan:
    """One strategy's answer.

    Args:
        strategy, options: what was planned.
        state_bytes: of the optimizer, exactly.
        at_peak: bytes by row at one instant, the peak; they add up to peak["allocated"].
        peak: allocated, reserved, device (None on a CPU, which has no caching allocator).
        event, events: the one that binds, and every event's bytes.
        certainty: of each row: exact, bound or estimate.
        fits, verdict, headroom_bytes: at the budget; the verdict is fits, fits with retries (the allocator
            hands memory back and asks again, which costs time: not counted as fitting) or out of memory.
        why: sentences. levers: the peak after each.
        max_seq_len, max_batch_size: where they were solved for.
        ranks_needed: cards that the run needs at the budget, 0 where no number does; of a sharded run.
        cross_check: closed form against trace, in percent; None where no form is known.
        away: bytes of state on the host; a step moves them there and back.
    """

    strategy: str
    options: Mapping[str, Any]
    state_bytes: int
    at_peak: Mapping[str, int]
    peak: Mapping[str, int | None]
    event: str
    events: Mapping[str, int]
    certainty: Mapping[str, str]
    fits: bool | None = None
    verdict: str | None = None
    headroom_bytes: int | None = None
    why: tuple[str, ...] = ()
    levers: tuple[Lever, ...] = ()
    max_seq_len: int | None = None
    max_batch_size: int | None = None
    ranks_needed: int | None = None
    cross_check: float | None = field(default=None, repr=False)
    away: int = 0

    def to_dict(self) -> dict[str, Any]:
        """One entry of "plans" in `lowmem plan --json`."""
        keys = (
            "strategy", "options", "state_bytes", "at_peak", "peak", "event", "events", "certainty", "fits",
            "headroom_bytes", "why",
        )  # fmt: skip
        found = {key: getattr(self, key) for key in keys}
        found |= {} if self.ranks_needed is None else {"ranks_needed": self.ranks_needed}
        found |= {"offload": {"host_bytes": self.away, "moved_bytes": 2 * self.away}} if self.away else {}
        return {
            k: dict(v) if isinstance(v, Mapping) else list(v) if isinstance(v, tuple) else v
            for k, v in found.items()
        }


@dataclass(frozen=True)
class Plan:
    """The answer of `plan`: those that fit first, then by peak.

    Args:
        model: name and counts. run: every option of the trace. budget: None where none was given.
        plans: one for each strategy. warnings, assumptions: sentences.
        command: that gives this plan again; None for a model or strategy without a name.
        config: of the model. made: the strategies, in the order of `plans`.
    """

    model: ModelInfo
    run: Run
    budget: Budget | None
    plans: tuple[StrategyPlan, ...]
    warnings: tuple[str, ...]
    assumptions: tuple[str, ...]
    command: str | None
    config: Any = field(repr=False)
    made: tuple[Strategy, ...] = field(repr=False, default=())

    @property
    def cross_check(self) -> float | None:
        """Largest difference, in percent, between closed form and trace over the strategies."""
        return max((p.cross_check for p in self.plans if p.cross_check is not None), key=abs, default=None)

    def to_dict(self) -> dict[str, Any]:
        """The document of `lowmem plan --json`: plain values, sizes in bytes."""
        return {
            "model": asdict(self.model),
            "run": asdict(self.run),
            "budget_bytes": None if self.budget is None else self.budget.usable,
            "plans": [p.to_dict() for p in self.plans],
        }


def plan(
    model: Any,
    strategy: Any = "adamw",
    *,
    options: Mapping[str, Any] | str | None = None,
    budget: str | int | None = None,
    gpu: str | None = None,
    advise: bool = True,
    **run_options: Any,
) -> Plan:
    """Predict the memory of a fine-tuning run.

    Args:
        model: name, folder, Hub id, transformers configuration or model; no weights are read.
        strategy: a name, several with commas, "all", a Strategy, or a list.
        options: of the strategy, as a mapping or "rank=128,states=int8".
        budget: bytes that may be taken, as "23.5GiB" or a number; or
        gpu: a card by name.
        advise: whether to plan the levers as well (a second or two).
        **run_options: the fields of `Run`: batch_size=1, seq_len=2048, dtype="bfloat16", attention="sdpa",
            rows="full", gradient_checkpointing, gradient_release, accumulation, loss="plain", lora_rank,
            quantize, autocast, max_grad_norm, eval_batch_size, typical, device="cuda", ranks=1, shard="full".

    Raises:
        UserError: an unknown name or option, or an architecture that cannot be planned, with the reason.

    Example:
        >>> plan("llama-7b", "adamw", options="states=bf16").plans[0].event
        'embedding backward'
    """
    name, config = gather.model_config(model)
    made = gather.strategies(strategy, options, trained=run_options.get("weights") is not None)
    given = run_options
    if isinstance(config, Given):
        run_options = gather.as_it_is(config, run_options)
    run = gather.make_run(run_options)
    if len(made) == 1 and (problem := gather.idle(made[0], run, given)):
        raise UserError(problem)
    limit = limit_of(gpu, budget, run.compute_capability, run.device)
    asked, run = run, gather.on_card(run, limit) if limit is not None else run
    made = [one.sided(run.sharded) for one in made]
    rows = [row(config, run, one, limit, advise=advise) for one in made]
    order = sorted(range(len(rows)), key=lambda i: (WORDS.index(rows[i].verdict), rows[i].peak["allocated"]))
    info = _info(name, config, run, made[0])
    plans = tuple(rows[i] for i in order)
    return Plan(
        info, run, limit, plans, wording.warnings(config, run, name), wording.assumptions(run, limit),
        wording.command(model, asked, made, budget, gpu), config,
        tuple(made[i] for i in order),
    )  # fmt: skip


def suited(run: Run, strategy: Strategy) -> Run:
    """The run as this strategy takes it: what has no gradients recomputes and releases nothing.

    Raises:
        UserError: the strategy trains other weights than the run has.
    """
    source = strategy.source
    name = strategy.name or "the strategy"
    if problem := gather.unsuited(name, strategy, run):
        raise UserError(problem)
    if source.needs_autograd:
        return replace(run, gradient_release=False) if strategy.waits else run
    return run.forwards


def traced(config: Any, run: Run, strategy: Strategy) -> Trace:
    """The trace that belongs to a strategy; made once for all that share it."""
    return remembered(config, suited(run, strategy), special(strategy))


def _info(name: str, config: Any, run: Run, strategy: Strategy) -> ModelInfo:
    found = traced(config, run, strategy)
    return ModelInfo(name, found.total_parameters, sum(math.prod(p.shape) for p in found.parameters))


def row(config: Any, run: Run, strategy: Strategy, limit: Budget | None, *, advise: bool) -> StrategyPlan:
    """One strategy's plan; see `plan` for the arguments."""
    run = suited(run, strategy)
    found = traced(config, run, strategy)
    held = footprint(strategy, found.parameters, run)
    step, peak = combine(found, held), combine(found, held, beside(config, run, found))
    levers = advice.levers(config, run, held) if advise else ()
    check = _cross_check(config, run, held, step)
    spared = [s for say in (advice.roles, advice.side) if advise for s in say(strategy, found.parameters)]
    why = [*advice.sentences(peak, levers, run), *advice.offloaded(held), *spared, *_agreement(check)]
    reserve = functools.partial(simulated, found, held, evaluation=_evaluation(config, run, held))
    verdict = None if limit is None else _verdict(reserve, limit, peak)
    room = None if limit is None or verdict is None else _headroom(reserve, verdict, limit, peak)
    return StrategyPlan(
        strategy=strategy.name or "custom",
        options=dict(strategy.options),
        state_bytes=held.state_bytes,
        at_peak=dict(peak.at_peak),
        peak=_sizes(reserve, peak, limit, run),
        event=peak.event,
        events={**peak.events, **_typical(config, run, held)},
        certainty=_certainty(run, held, peak.event),
        fits=None if verdict is None else verdict.word == FITS,
        verdict=None if verdict is None else verdict.word,
        headroom_bytes=room,
        why=tuple(why),
        levers=levers,
        ranks_needed=needed(config, run, strategy, limit.room) if limit and run.sharded else None,
        cross_check=check,
        away=held.away,
    )


def _evaluation(config: Any, run: Run, held: Footprint) -> Tracker | None:
    """The evaluation that the allocator meets after the steps; one within their own forward pass is none."""
    return evaluation(config, run.evaluation) if run.evaluation and evaluates_more(run, held) else None


def _verdict(reserve: Reserve, limit: Budget, peak: Peak) -> Verdict:
    if not limit.cached:
        return Verdict(peak.allocated, peak.allocated, 0, peak.allocated <= limit.capacity)
    found = reserve(limit.capacity)
    return replace(found, fits=False) if peak.allocated > limit.capacity else found


def _typical(config: Any, run: Run, held: Footprint) -> dict[str, int]:
    """The peak of a step over rows of the typical length, where one is known."""
    if run.typical is None:
        return {}
    usual = replace(run, seq_len=min(run.typical, run.seq_len), typical=None)
    return {TYPICAL: advice.step_peak(config, usual, held).allocated}


def _sizes(reserve: Reserve, peak: Peak, limit: Budget | None, run: Run) -> dict[str, int | None]:
    if run.device == "cpu":  # no caching allocator, no context
        return {"allocated": peak.allocated, "reserved": None, "device": None}
    card = limit or parse_budget(1 << 50, run.compute_capability)
    reserved = reserve(None).reserved
    return {"allocated": peak.allocated, "reserved": reserved, "device": reserved + card.outside}


def _headroom(reserve: Reserve, verdict: Verdict, limit: Budget, peak: Peak) -> int:
    """Bytes to spare or missing: to the tensors where it fits, to what is reserved where it does not."""
    spare = limit.capacity - peak.allocated
    if verdict.word == FITS or spare < 0:
        return spare
    return min(-1, limit.usable - limit.outside - reserve(None).reserved)


def _certainty(run: Run, held: Footprint, event: str) -> dict[str, str]:
    """How each row is known at the peak: counted exactly, bounded from above, or estimated."""
    traced = "exact" if run.device == "cpu" else "estimate"
    summed = run.accumulation > 1 and run.gradient_release  # a subspace keeps less than the whole gradient
    passing = run.sharded and event not in AFTER  # a gradient counts as divided while it is still whole
    return {
        "weights": "exact",
        "gradients": "bound" if summed or passing else "exact",
        "optimizer_state": "exact",
        "activations": traced,
        "logits": "bound" if run.loss == "labels" and run.label_tokens is None else traced,
        "workspace": "estimate" if held.compiled else "bound",
        **({LOAD: traced} if run.weights else {}),
        SAVE: traced,
        **({EVALUATION: traced} if run.evaluation else {}),
        **({TYPICAL: traced} if run.typical else {}),
        "allocated": traced,
        "reserved": "estimate",
        "device": "estimate",
        **({TAIL: "bound", GATHER: "bound"} if run.sharded else {BUCKETS: "exact"} if run.ranks > 1 else {}),
    }


def _cross_check(config: Any, run: Run, held: Footprint, peak: Peak) -> float | None:
    if special(held.strategy) is not None or not closed_form.supports(config, run):
        return None
    return 100.0 * (formula(config, run, held)[1] / peak.allocated - 1.0)


def _agreement(check: float | None) -> list[str]:
    if check is None:
        return ["No closed form covers this run: the trace stands alone."]
    if abs(check) <= AGREEMENT:
        return [f"Closed form and trace agree ({check:+.3f} %)."]
    return [
        f"Closed form and trace differ by {check:+.2f} %: take the trace, and measure with `lowmem profile`."
    ]
