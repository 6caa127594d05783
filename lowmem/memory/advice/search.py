"""What fits a card, best first, where nobody has chosen a method yet.

Every method is tried on all weights, and Adam's on adapters, over plain and over 4-bit weights; each with
the levers that cost least time: none, gradient release, recomputed activations, both. What the user has
said of the run stays. All methods share the traces, which are of a few layers; the rows at the top are then
planned in full, with the allocator simulated at the limit, until some of them hold.

    order = verdict, kind (what is kept of Adam's moments), recomputation, bytes to spare

Only where no method fits, its state is tried in the host's memory, which it crosses in every step.
Kinds are an order of expectation, not of measurement: what a method costs in quality depends on the data
(`lowmem compare` measures it).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lowmem.errors import UserError
from lowmem.memory import gather
from lowmem.memory import plan as planning
from lowmem.memory.advice import wording
from lowmem.memory.advice.cards import wider
from lowmem.memory.advice.found import Found
from lowmem.memory.advice.kinds import kind_of
from lowmem.memory.advice.ways import LEVERS, Choice, Way, problem, refused, ways
from lowmem.memory.between import above
from lowmem.memory.device.allocator import FITS, OUT, RETRIES
from lowmem.memory.device.gpus import Budget
from lowmem.memory.footprint import Footprint, Peak, Steps, combine, footprint
from lowmem.memory.run import Run
from lowmem.memory.trace.extrapolate import extrapolated
from lowmem.memory.trace.replica import Trace
from lowmem.memory.trace.windows import resting, special
from lowmem.models.computing import loss
from lowmem.optim.strategy import Strategy
from lowmem.report.units import format_bytes
from lowmem.strategies import available, create

ADAPTED = ("adamw", "adamw_8bit")
"""Methods for adapters, whose matrices are small already."""
CODED = ("adamw", "adamw_8bit", "adafactor", "galore", "q_galore", "lion", "sgd")
"""Methods for int8 weights where nobody asked for them: one of each kind."""
RANK = 16  # of adapters, where none is given
HALVINGS = 3
Task = tuple[Run, Strategy]
Rows = dict[tuple[Run, str], Found]
"""By what is trained and the name of the method."""
LAST = {lever.name for lever in LEVERS if lever.last}
TOP, CHECKED = 1, 3  # rows that are planned in full, and the runs that are tried for them


def search(
    model: Any, limit: Budget, options: Mapping[str, Any], *, full: bool = False, gpu: str | None = None,
    budget: str | int | None = None, among: Collection[str] = (), top: int = TOP,
    beside: Callable[[], Rows] = dict,
) -> tuple[Found, ...]:  # fmt: skip
    """Every method on a card, best first.

    Args:
        model: as `plan` takes it.
        limit: the card's budget; gpu, budget: how it was named, for the commands.
        options: of the run that are decided, by name; None is open.
        full: all weights must be trained.
        among: methods to look at; all, if empty.
        top: rows that are planned in full.
        beside: gives rows that others have found since it was asked last (`advice.beside`).

    Raises:
        UserError: as `plan`; a model object, which is planned as it is.

    Example:
        >>> from lowmem.memory.device.gpus import gpu
        >>> search("smollm2-135m", gpu("t4"), {"seq_len": 256, "dtype": "float16"})[0].verdict
        'fits'
    """
    finder = _finder(model, limit, options, among, top)
    rows = finder.rows(list(finder.tasks(full)), beside)
    rows = finder.confirmed(sorted(finder.eased(rows), key=lambda row: row.order))
    named = model if isinstance(model, str) else None
    return tuple(
        replace(row, command=wording.command(named, finder.asked(row.run), [row.strategy], budget, gpu))
        for row in rows
    )


def aside(
    model: Any, limit: Budget, options: Mapping[str, Any], *, full: bool = False, among: Collection[str] = ()
) -> Iterator[Rows]:
    """Rows of a search from the shares that come after the first, a share at a time.

    Args:
        model, limit, options, full, among: as `search`.
    """
    finder = _finder(model, limit, options, among)
    for share in _shares(list(finder.tasks(full)))[1:]:
        yield {_key(task): finder.cheapest(*task) for task in share}


def _key(task: Task) -> tuple[Run, str]:
    return task[0], task[1].name


def _shares(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks that have their traces in common, those with adapters early as packages are loaded for them."""
    shares: dict[Any, list[Task]] = {}
    for run, strategy in tasks:
        shares.setdefault((run, special(strategy)), []).append((run, strategy))
    first, others = list(shares.values())[:1], list(shares.values())[1:]
    return first + sorted(others, key=lambda share: not share[0][0].adapts)


def _finder(
    model: Any, limit: Budget, options: Mapping[str, Any], among: Collection[str] = (), top: int = TOP
) -> _Finder:
    _, config = gather.model_config(model)
    if hasattr(config, "skeleton"):
        raise UserError(
            "a model object is planned as it is: name its optimizer, or search by the model's name"
        )
    decided = {key: value for key, value in options.items() if value is not None}
    return _Finder(config, limit, decided, among, top)


@dataclass(frozen=True)
class _Finder:
    """What is the same for all rows."""

    config: Any
    limit: Budget
    decided: Mapping[str, Any]
    among: Collection[str] = ()
    top: int = TOP
    footprints: dict[Any, Footprint] = field(default_factory=dict)

    def modes(self, full: bool) -> Iterator[Run]:
        """All weights, LoRA, LoRA over 4 bits: those that the user left open."""
        asked = {"lora_rank", "adapter", "quantize", "weights"} & set(self.decided)
        changes: list[dict[str, Any]] = [{}]
        if not full and not asked:
            changes.append({"lora_rank": RANK})
            changes += [] if self.limit.unified else [{"lora_rank": RANK, "quantize": "nf4"}]
        changes += [] if asked else [{"weights": "int8"}]
        for change in changes:
            try:
                run = gather.make_run({**self.decided, **change})
            except UserError:
                if not change:
                    raise
                continue  # what the user has decided does not go with it
            if full and run.adapts:
                raise UserError("--full trains all weights: leave out the options of adapters")
            yield run

    def tasks(self, full: bool) -> Iterator[Task]:
        """What is looked at: each method over each run."""
        return ((run, strategy) for run in self.modes(full) for strategy in self._over(run))

    def rows(self, tasks: Sequence[Task], beside: Callable[[], Rows]) -> list[Found]:
        """A row for each task; what is beside comes from the other end of the shares."""
        shares, found = _shares(tasks), Rows()
        for share in (*shares[:1], *reversed(shares[1:])):
            found |= beside()
            found |= {_key(task): self.cheapest(*task) for task in share if _key(task) not in found}
        return [found[_key(task)] for task in tasks]

    def asked(self, run: Run) -> Run:
        """A run without what it has from the card."""
        of_card: dict[str, Any] = {key: self.decided.get(key) for key in ("compute_capability", "workspace")}
        return replace(run, **of_card)

    def _over(self, run: Run) -> Iterator[Strategy]:
        """The methods that go with a run."""
        coded = "weights" not in self.decided and run.weights is not None
        every = available()
        some = ADAPTED if run.adapts else CODED if coded else every
        for name in (name for name in some if name in (self.among or every)):
            strategy = create(name)
            if strategy.source.quantized:  # asked for by name, as it trains no weights: `gather.strategies`
                continue
            if run.accumulation > 1 and not strategy.source.needs_autograd:
                continue
            if not problem(run, strategy):
                yield strategy

    def cheapest(self, run: Run, strategy: Strategy) -> Found:
        """The row with the cheapest levers that make it fit; where none do, the one that misses least."""
        tried: list[Found] = []
        every = self._levered(run, strategy)
        if not run.adapts and self._hopeless(every[-1][0], strategy):
            every = every[-1:]
        for changed, levers in every:
            tried.append(self._row(strategy, run, changed, levers))
            if tried[-1].verdict == FITS:
                return tried[-1]
        best = min(tried, key=lambda row: (row.order[0], -row.headroom_bytes))
        return self._short(best) if best.verdict == OUT else best

    def eased(self, rows: list[Found]) -> list[Found]:
        """The rows; where nothing fits, with the last levers where those make them fit."""
        return rows if any(row.verdict == FITS for row in rows) else [self._eased(row) for row in rows]

    def _eased(self, row: Found) -> Found:
        every = [way for way in self._levered(row.mode, row.strategy, True) if set(way[1]) & LAST]
        if not every or self._hopeless(every[-1][0], row.strategy):
            return row
        tried = (self._row(row.strategy, row.mode, *way) for way in every)
        return next((one for one in tried if one.verdict == FITS), row)

    def _hopeless(self, run: Run, strategy: Strategy) -> bool:
        """Whether weights and state alone are too much, whatever the levers."""
        found = self._mode(run)
        weights = min(moment.bytes.get("weights", 0) for moment in found.moments.values())
        return weights + self._held(strategy, run, found, "none").held > self.limit.capacity

    def _levered(self, run: Run, strategy: Strategy, last: bool = False) -> list[Way]:
        """The run under each lever that is open, cheapest first."""
        run = self._with_loss(planning.suited(run, strategy), strategy.source.needs_autograd)
        some = [lever for lever in LEVERS if last or not lever.last]
        return list(ways(run, [lever for lever in some if not self._refused(lever, run, strategy)]))

    def _refused(self, lever: Choice, run: Run, strategy: Strategy) -> str:
        """Why a lever is not open; "" where it is."""
        if lever.option in self.decided:
            return "it is decided"
        why = refused(lever, run, strategy, self.limit)
        if not why and lever.option == "gradient_release" and self._mostly_rests(run, strategy):
            return "most of the weights have no gradient that could be released"
        return why

    def _mostly_rests(self, run: Run, strategy: Strategy) -> bool:
        """Whether most of the weights have no gradient that could be released."""
        parameters = self._mode(run).parameters
        aside = resting(strategy, parameters)
        return sum(p.name in aside for p in parameters) > len(parameters) / 2

    def _mode(self, run: Run) -> Trace:
        """A trace of a run that trains the same weights: all that is asked of it is what those are."""
        plain: dict[str, Any] = {lever.option: False for lever in LEVERS}
        like = replace(run, **plain, max_grad_norm=Run.max_grad_norm, workspace=None)
        return extrapolated(self.config, gather.on_card(self._with_loss(like, True), self.limit), None)

    def _with_loss(self, run: Run, first_order: bool) -> Run:
        """The loss that `lowmem finetune` takes for such a batch."""
        size = loss.logits_bytes(run.tokens, self.config.vocab_size, getattr(torch, run.dtype).itemsize)
        large = size > loss.LIMIT and first_order
        decided = "loss" in self.decided or run.task != "sft"
        return run if decided else replace(run, loss="chunked" if large else "plain")

    def _row(self, strategy: Strategy, mode: Run, run: Run, levers: tuple[str, ...]) -> Found:
        run = gather.on_card(run, self.limit)
        peak, held = self._peak(strategy, run, "none")
        if peak.allocated <= self.limit.capacity:  # else no scratch is counted: it takes long, and only adds
            peak, held = self._peak(strategy, run)
        spare = self.limit.capacity - peak.allocated
        word = FITS if peak.allocated <= self.limit.room else RETRIES if spare >= 0 else OUT
        return Found(strategy, mode, run, kind_of(strategy, run), levers, peak, held.state_bytes, word, spare)

    def _peak(self, strategy: Strategy, run: Run, steps: Steps = "large") -> tuple[Peak, Footprint]:
        found = extrapolated(self.config, run, special(strategy))
        held = self._held(strategy, run, found, steps)
        return combine(found, held, above(self.config, run, found, held)), held

    def _held(self, strategy: Strategy, run: Run, found: Trace, steps: Steps) -> Footprint:
        """What a strategy adds; of the levers, one changes it."""
        key = (strategy, run.lora_rank, run.adapter, run.quantize, run.weights, run.offload_state, steps)
        if key not in self.footprints:
            self.footprints[key] = footprint(strategy, found.parameters, run, steps=steps)
        return self.footprints[key]

    def _short(self, row: Found) -> Found:
        """What a row that does not fit would need."""
        cards = wider(self.config, row.run, row.strategy, self.limit.room)
        parts = row.peak.at_peak
        row = replace(row, ranks_needed=cards, refused=self._kept_off(row))
        more = f"{format_bytes(-row.headroom_bytes)} more"
        wide = [f"--ranks {cards}"] if cards else []
        if parts.get("weights", 0) + parts.get("optimizer_state", 0) > self.limit.capacity:
            fewer = [self._fewer(row.run), *wide, f"{more}: weights and state are too much"]
            return replace(row, needs=", or ".join(fewer))
        lengths = [n for n in (row.run.seq_len >> i for i in range(1, HALVINGS + 1)) if n >= 64]
        if lengths and self._fits_with(row, lengths[-1]):
            length = next(n for n in lengths if self._fits_with(row, n))
            return replace(row, needs=", or ".join([f"--seq-len {length}", *wide]))
        return replace(row, needs=", or ".join([*wide, more]))

    def _fewer(self, run: Run) -> str:
        """The option by which less is held."""
        smaller = run.quantize or (run.adapts and (run.sharded or self.limit.unified))
        return "a smaller model" if smaller else "--quantize nf4" if run.adapts else f"--lora-rank {RANK}"

    def _kept_off(self, row: Found) -> dict[str, str]:
        """Levers that the run does not take, and why."""
        whys = {lever.name: self._refused(lever, row.mode, row.strategy) for lever in LEVERS}
        return {name: why for name, why in whys.items() if why and name not in row.levers}

    def _fits_with(self, row: Found, length: int) -> bool:
        peak, _ = self._peak(row.strategy, replace(row.run, seq_len=length))
        return peak.allocated <= self.limit.room

    def confirmed(self, rows: list[Found]) -> list[Found]:
        """The rows with those at the top planned in full, as long as few runs are needed for it."""
        runs: set[Run] = set()
        while (
            at := next((i for i, row in enumerate(rows[: self.top]) if not row.checked), None)
        ) is not None:
            runs.add(rows[at].run)
            if rows[at].verdict == OUT or len(runs) > CHECKED:
                break
            rows[at] = self._checked(rows[at])
            if rows[at].verdict != FITS:
                rows[at] = self._further(rows[at])
            rows.sort(key=lambda row: row.order)
        return [self._widened(row) if row.checked else row for row in rows]

    def _checked(self, row: Found) -> Found:
        full = planning.row(self.config, row.run, row.strategy, self.limit, advise=False)
        peak = Peak(full.event, full.at_peak, full.events)
        verdict, room = full.verdict or row.verdict, full.headroom_bytes or 0
        return replace(row, peak=peak, verdict=verdict, headroom_bytes=room, checked=True)

    def _further(self, row: Found) -> Found:
        """The same method with more levers, where the allocator finds no room for what the tensors take."""
        every = self._levered(row.mode, row.strategy, bool(set(row.levers) & LAST))
        place = next(i for i, (_, levers) in enumerate(every) if levers == row.levers)
        for run, levers in every[place + 1 :]:
            further = self._row(row.strategy, row.mode, run, levers)
            if further.verdict == FITS:
                return further
        return self._short(row) if row.verdict == OUT else row

    def _widened(self, row: Found) -> Found:
        """How many rows the tensors leave room for: every event is a line in the batch."""
        if row.verdict != FITS or "batch_size" in self.decided:
            return row
        size, room = row.run.batch_size, self.limit.room
        one, two = (
            self._peak(row.strategy, replace(row.run, batch_size=n))[0].events for n in (size, 2 * size)
        )
        counts = [
            int((room - one[event]) // (two[event] - one[event])) for event in one if two[event] > one[event]
        ]
        return replace(row, largest_batch=size * (1 + max(0, min(counts, default=0))))
