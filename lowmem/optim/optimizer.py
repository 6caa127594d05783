"""One ordinary torch optimizer for every strategy.

`step_param` is the whole update of one tensor: `step()` loops over it, gradient
release calls it from inside backward. State is made by the same `init` that the
planner counts, the first time a tensor has a gradient. What a scheduler may
change lives in `param_groups`, as plain numbers, and so do the clock, the roles and
the strategy's name, so that a checkpoint says what it belongs to.

The groups and the state are the caller's as in every torch optimizer: copied, pickled,
cleared, moved, added to. What is derived from them (`seats`) is found anew when they change.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import KindError, as_ours
from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.blocks import held as seen
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.engine.settings import NEUTRAL, Settings, under
from lowmem.optim.shards import Shard
from lowmem.optim.source import Named, check_asked
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.checks import check_gradient, check_gradients, check_hyper, compiles
from lowmem.optim.tensors.groups import completed
from lowmem.optim.tensors.marks import mark_, rests, trains
from lowmem.optim.tensors.offload import Home
from lowmem.optim.tensors.resting import Look, arrange_, observe_, together_, turn_
from lowmem.optim.tensors.seats import Piece, Place, Roster, Seat, seat
from lowmem.optim.tensors.steps import Step, agreed, begin, hyper
from lowmem.optim.tensors.told import Informed
from lowmem.optim.terms.hyper import Hyper, Lookup
from lowmem.optim.terms.state import State, made, stored

Params = Iterable[Any]


class LowMemOptimizer(Informed):
    """Takes the steps of a strategy.

        W <- (1 - lr weight_decay) W - lr D    (float64 weights in float64)

    Args:
        params: parameters, (name, parameter) pairs, or groups; see `add_param_group`.
        strategy: what to do, from `lowmem.create`.
        lr: learning rate, at least 0.
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment; 0 is safe: what has no moments is not stepped.
        weight_decay: decoupled, at least 0.
        seed: names every random stream of the run.
        compile: auto, on or off; compiled and eager steps differ in the last bit, so
            the choice depends on the model and `steps` and is kept in the checkpoint.
        steps: of the run, where that is known; a few do not pay for compiling.
        model: owner of the parameters, to find names and roles in and to probe; it is not kept alive.
        home: where state lives between steps; with its parameter, if None.

    Raises:
        UserError: a number outside its range, or a writer that the weights cannot take.

    Example:
        >>> from lowmem import create
        >>> weight = nn.Parameter(torch.ones(4, 4))
        >>> optimizer = LowMemOptimizer([weight], create("adamw"), lr=0.1)
        >>> weight.grad = torch.ones(4, 4)
        >>> optimizer.step()
        >>> optimizer.state_bytes()
        132
    """

    def __init__(
        self, params: Params, strategy: Strategy, *, lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        seed: int = 0, compile: str = "auto", steps: int | None = None, model: nn.Module | None = None,
        home: Home | None = None,
    ) -> None:  # fmt: skip
        numbers = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "compile": compile}
        with as_ours():
            check_hyper({**numbers, "seed": seed})
        self.strategy, self.asked, self.released, self.home = strategy, strategy, False, home or Home()
        self._model = weakref.ref(model) if model is not None else None
        defaults = {
            **numbers,
            "betas": tuple(betas),
            "role": "matrix",
            "roles": "{}",
            "heads": "{}",
            "step": 0,
            "since": 0,
            "previous_norm": -1.0,
            "decided": "",
            "seed": seed,
            "strategy": strategy.text,
        }
        with as_ours():
            super().__init__(params, defaults)
        compiled = compiles(compile, [p for group in self.param_groups for p in group["params"]], steps)
        for group in self.param_groups:
            group["compile"] = compiled
        self._derive()

    def _derive(self) -> None:
        """Forget what was derived from groups and state."""
        self.chunks = Chunks(bool(self.param_groups[0]["compile"]))
        self._seats: dict[Hashable, Seat] = {}
        self.home.grown = self._seats.clear
        self._constants: dict[tuple[str, torch.device], Tensor] = {}
        self._lookup = Lookup()
        self._evidence: list[Any] = []
        self._begun: dict[Tensor, Step] = {}
        self._looks: list[Look] = []
        self._switched = -1
        self._at = threading.local()  # hooks of several devices run in threads of their own
        self._arrange()

    def _arrange(self) -> None:
        """Put aside what rests now, and hold no tensor for it: an engine that shards replaces them."""
        arrange_(Roster(self.param_groups, self.strategy), self.strategy.rules, self.model)
        self._roster: Roster | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"strategy": self.strategy, "asked": self.asked, "released": False, "_model": None}
        own["home"] = self.home.again()
        return {**super().__getstate__(), **own, "_resting": [p for p in self.roster.places if rests(p)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for p in state.pop("_resting", []):
            mark_(p)  # a copy of a parameter does not know it
        super().__setstate__(state)
        self._derive()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group: it joins the run where that is now, and a refused one leaves nothing behind.

        Args:
            param_group: "params", numbers of its own, and "role", what its tensors are, where that is known.
                Names and roles that are not given are found in the model that the optimizer was made with.

        Raises:
            UserError, KindError: what torch refuses, a role or a number that is not allowed.
        """
        with as_ours():
            if not isinstance(param_group, dict):
                raise KindError(f"a parameter group is a dict, got {type(param_group).__name__}")
            before = dict(param_group)
            try:
                param_group.update(
                    completed(before, self.param_groups, self.defaults, self.strategy, self.model)
                )
                super().add_param_group(param_group)
            except Exception:
                param_group.clear()
                param_group.update(before)
                raise
        if hasattr(self, "chunks"):  # torch adds the first ones while the optimizer is made
            self._arrange()

    @property
    def model(self) -> nn.Module | None:
        """The owner of the parameters, as long as it lives and was given."""
        return self._model() if self._model is not None else None

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Nothing is recorded for autograd, and the caller's settings of torch do not count."""
        if getattr(self._at, "work", False):
            yield
            return
        with torch.no_grad(), NEUTRAL.entered():
            self._at.work = True
            try:
                yield
            finally:
                self._at.work = False

    @property
    def roster(self) -> Roster:
        """All parameters, as the groups are now."""
        if self._roster is None:
            self._roster = Roster(self.param_groups, self._decided())
        return self._roster

    def place(self, p: Tensor) -> Place:
        """The group, name and role of a parameter."""
        found = self.roster.places.get(p)
        if found is None:  # accelerate swaps the tensors in param_groups
            self._roster = None
        return found or self.roster[p]

    def named_parameters(self) -> Named:
        """Names and parameters, group by group."""
        return [(place.name, cast("nn.Parameter", p)) for p, place in self.roster.places.items()]

    def rule_name(self, p: Tensor) -> str:
        """The name of the rule that the next step of a parameter follows."""
        return self.roster.rule_at(p, self.place(p).group["step"])

    def hyper(
        self, p: Tensor, part: Piece | None = None, first: bool = False, weight: Blocks | None = None,
        shard: Shard | None = None,
    ) -> Hyper:  # fmt: skip
        """What a rule may know of the next step of a parameter, or of a part of it, or of some rows."""
        place = self.place(p)
        weight = weight or seen(part.of(p.detach()) if part else p.detach())
        name, overall = (part or place).name, self._overall
        return hyper(place, name, weight, self.chunks, self._lookup, first, shard, overall)

    def constants(self, p: Tensor) -> State:
        """The constants of a parameter's rule, each held once for a device."""
        wanted = self.strategy.constants(self.rule_name(p), p.shape, self.place(p).role)
        return made(wanted, p.device, self._constants)

    def ready(self, p: Tensor) -> tuple[Seat, bool]:
        """What a parameter's step needs, and whether its state is new."""
        place = self.place(p)
        self._switch(place.group["step"])
        rule_name = self.roster.rule_of(place, place.group["step"])
        held = cast("dict[str, Tensor]", self.state[p])
        known = None if held else self._seats.get(p)  # some never hold anything
        if fresh := not held and (known is None or not known.fits(rule_name, held)):
            held.update(place.fresh(self.strategy, rule_name, p, self.home.maker(p)))
            self.home.hold_(p, held)
        name, here = self.home.here(p, held, self.state)
        known = self._seats.get(name)
        if known is None or not known.fits(rule_name, here):
            known = self._seats[name] = seat(self.strategy, place, rule_name, p, here, self.constants(p))
        return known, fresh

    def _switch(self, step: int) -> None:
        """Drop what is held for the step before, all at once, where roles may change at this one."""
        if self._switched != step and self.strategy.schedule.switches(step):
            self._switched = step
            self._seats.clear()
            self._constants.clear()  # those that only resting tensors read are not held
            for p in self.roster.restarting(step):
                self.state.pop(p, None)

    def init_state(self) -> None:
        """Make the state of every parameter now, as the first step would."""
        arrange_(self.roster, self.strategy.rules)
        with self._at_work():
            for _, p in self.named_parameters():
                if trains(p) and p.numel() and not self.resting(p):
                    self.ready(p)

    def step_param(self, p: nn.Parameter, g: Tensor | Blocks) -> None:
        """The whole update of one tensor.

        Args:
            p: the parameter.
            g: its gradient, a tensor like p or Blocks.

        Raises:
            UserError: a gradient of another shape or device, sparse, or not of real numbers.
        """
        g = Dense(g) if isinstance(g, Tensor) else g
        check_gradient(self.place(p).name, p, g.tensor if isinstance(g, Dense) else None)
        with self._at_work():
            self._step_param(p, g)

    def _step_param(self, p: nn.Parameter, g: Blocks) -> None:
        if not p.numel() or self.resting(p):
            return
        if self.roster.spread:
            (self._begun.pop(p, None) or self._begin(p, g)).finish(self.chunks)
            return
        seat, fresh = self.ready(p)
        observe_(self.strategy.schedule, seat, g, self.chunks.passes)
        for part in seat.parts:
            part.step_(self.chunks, p.detach(), g, self.hyper(p, part, fresh))

    def _begin(self, p: nn.Parameter, g: Blocks) -> Step:
        self.home.refuse_spread()
        seat, fresh = self.ready(p)
        step = begin(seat, p, g, lambda part, weight, shard: self.hyper(p, part, fresh, weight, shard))
        self._looks += observe_(self.strategy.schedule, seat, step.g, self.chunks.passes)
        return step

    def _together(self, pairs: Params) -> Params:
        """Gradients whose ranks have agreed where they must: once for all of them."""
        if not self.roster.spread:
            return pairs
        found = list(pairs)
        joint = (pair for pair in found if self.place(pair[0]).judged(self.strategy, self.rule_name(pair[0])))
        self._begun = agreed({p: self._begin(p, g) for p, g in joint})
        return found

    def backward(self, loss_fn: Callable[[], Tensor], model: nn.Module | None = None) -> Tensor:
        """Evaluate the loss and leave what the step needs.

        Args:
            loss_fn: gives the scalar loss of one batch.
            model: owner of the parameters, where sources probe; the one it was made with, if None.
        """
        params = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        query, owner = self.query(len(self._evidence)), self.model if model is None else model
        drawn = not self.strategy.source.needs_autograd  # what is drawn is ours, the loss is the caller's
        evaluate = under(Settings.now(), loss_fn) if drawn else loss_fn
        with NEUTRAL.entered() if drawn else nullcontext():
            loss, evidence = self.strategy.source.backward(params, evaluate, model=owner, query=query)
        self._evidence += [evidence] if evidence is not None else []
        self.add_loss(loss)
        return loss

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Step every parameter that has a gradient; tensors that were released have had theirs."""
        source = self.strategy.source
        with torch.enable_grad():
            loss = None if closure is None else closure() if source.needs_autograd else self.backward(closure)
        self.add_loss(loss if self._loss is None else None)
        self._roster = self._roster and self._roster.still(self.param_groups)
        with self._at_work():
            check_gradients(self.named_parameters())  # before any tensor is stepped
            if not self._evidence and not source.needs_autograd:
                check_asked(self.strategy.name, self.param_groups)
                self.init_state()  # torch's distributed checkpoint makes state by such a step, with lr 0
            with self.chunks.together(ages=not self.home.travels):
                found = source.gradients(self.named_parameters(), self._evidence)
                for p, g in self._heard(self._together(found)):
                    self._step_param(p, cast("Blocks", g))
            together_(self.strategy.schedule, self._looks)
            source.settle_(self.named_parameters(), self._evidence)
        self._evidence.clear()
        self._loss = self._overall = None
        for group in self.param_groups:
            group["step"] += 1
        turn_(self.strategy, self.roster, self.state)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, and what the source left instead of one."""
        self._evidence.clear()
        self._loss = None
        super().zero_grad(set_to_none)

    def nonfinite(self) -> int:
        """Elements here that were not stepped: gradient or new fp16 weight not finite. Reads the device."""
        return self.chunks.skipped.total()

    def state_bytes(self) -> int:
        """Bytes of state held now: every storage once, constants included."""
        tensors = [t for held in self.state.values() if isinstance(held, dict) for t in held.values()]
        return stored([*tensors, *self._constants.values()])
