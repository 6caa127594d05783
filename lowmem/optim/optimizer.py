"""One ordinary torch optimizer for every strategy.

`step_param` is the whole update of one tensor: `step()` loops over it, gradient
release calls it from inside backward. State is made by the same `init` that the
planner counts, the first time a tensor has a gradient. What a scheduler may
change lives in `param_groups`, as plain numbers, and so do the clock and the
strategy's name, so that a checkpoint says what it belongs to.

`load_state_dict` is our own: torch's casts every state tensor to the dtype of
its parameter, which destroys 16-bit indices and fp32 scales under bf16 weights.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowmem.errors import UserError
from lowmem.optim.blocks import Blocks, Dense
from lowmem.optim.checks import check_fit, check_hyper, check_saved, has_compiler, lost, pays, unfit
from lowmem.optim.contract import AnyRule, Held, Hyper, Lookup, Rule, State, is_pointwise, scoped
from lowmem.optim.engine.chunks import Chunks
from lowmem.optim.schedules import Always
from lowmem.optim.source import Named, Query
from lowmem.optim.strategy import Strategy
from lowmem.optim.writers import Writer, select

Params = Iterable[Any]


@dataclass(frozen=True)
class _Seat:
    """What the step of one parameter needs and does not change: its rule, writer, and views of its state."""

    role: str
    rule: AnyRule
    writer: Writer
    state: State
    extra: State


class LowMemOptimizer(torch.optim.Optimizer):
    """Takes the steps of a strategy.

        W <- (1 - lr weight_decay) W - lr D    (float64 weights in float64)

    Args:
        params: parameters, (name, parameter) pairs, or groups; a group may have "role".
        strategy: what to do, from `lowmem.create`.
        lr: learning rate, at least 0.
        betas: of the moments, each in [0, 1).
        eps: added to the root of the second moment; 0 is safe: what has no moments is not stepped.
        weight_decay: decoupled, at least 0.
        seed: names every random stream of the run.
        compile: auto, on or off; compiled and eager steps differ in the last bit, so
            the choice depends on the model and `steps` and is kept in the checkpoint.
        steps: of the run, where that is known; a few do not pay for compiling.
        model: owner of the parameters, for `step(closure)` with sources that probe inside its
            forward; it is not kept alive.

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
        self,
        params: Params,
        strategy: Strategy,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        compile: str = "auto",
        steps: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        check_hyper(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, compile=compile)
        self.strategy = strategy
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "role": "matrix",
            "step": 0,
            "previous_norm": -1.0,
            "seed": seed,
            "compile": compile,
            "strategy": json.dumps(strategy.to_config(), sort_keys=True),
        }
        self._places: dict[int, tuple[dict[str, Any], str]] = {}
        self._shared: dict[tuple[str, torch.device], State] = {}
        self._seats: dict[int, _Seat] = {}
        self._switched = -1
        self._lookup = Lookup()
        self._evidence: list[Any] = []
        self._model = weakref.ref(model) if model is not None else None
        self._names: dict[str, tuple[str, ...]] = {}
        self.released = False
        super().__init__(params, defaults)
        compiles = self._decide(compile, steps)
        for group in self.param_groups:
            group["compile"] = compiles
        self.chunks = Chunks(compiles)

    def _decide(self, compile: str, steps: int | None) -> bool:
        if compile != "auto":
            return compile == "on"
        params = [p for group in self.param_groups for p in group["params"]]
        if not pays(sum(p.numel() for p in params), steps):
            return False
        return has_compiler() or all(p.device.type != "cpu" for p in params)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; tensors whose shape does not fit its role are put into groups of their own."""
        for group in self._split(param_group):
            super().add_param_group(group)
        self._places.clear()
        self._names.clear()

    def _split(self, group: Mapping[str, Any]) -> list[dict[str, Any]]:
        params = group["params"]
        members = [params] if isinstance(params, Tensor) else list(params)
        role = group.get("role", "matrix")
        by_role: dict[str, list[Any]] = {}
        for member in members:
            p = member[1] if isinstance(member, tuple) else member
            select(self.strategy.writer, p.dtype)  # refuses what it cannot take
            by_role.setdefault(self.strategy.refine(role, p.shape), []).append(member)
        return [{**group, "params": some, "role": name} for name, some in by_role.items()] or [dict(group)]

    def place(self, p: Tensor) -> tuple[dict[str, Any], str]:
        """The group and the name of a parameter."""
        if id(p) not in self._places:
            # rebuilt on a miss, not once: accelerate swaps the tensors in param_groups
            self._places = {id(q): (group, name) for group, name, q in self._walk()}
        return self._places[id(p)]

    def _walk(self) -> Iterable[tuple[dict[str, Any], str, nn.Parameter]]:
        count = 0
        for group in self.param_groups:
            names = group.get("param_names") or [f"param.{count + i}" for i in range(len(group["params"]))]
            count += len(group["params"])
            yield from ((group, name, p) for name, p in zip(names, group["params"], strict=True))

    def named_parameters(self) -> Named:
        """Names and parameters, group by group."""
        return [(name, p) for _, name, p in self._walk()]

    def role(self, p: Tensor, saved: Mapping[str, Any] | None = None) -> str:
        """The role of a parameter at this step, or at the last one before its group was saved."""
        group, name = self.place(p)
        role = group["role"]
        if role not in self._names:
            self._names[role] = tuple(n for g, n, _ in self._walk() if g["role"] == role)
        # what is saved belongs to the step before: the next one may switch roles
        step = group["step"] if saved is None else max(0, saved["step"] - 1)
        seed = (group if saved is None else saved)["seed"]
        return self.strategy.schedule.role(name, role, self._names[role], step, seed)

    def hyper(self, p: Tensor, first: bool = False, weight: Tensor | None = None) -> Hyper:
        """What a rule may know of the next step of a parameter; its weight, where that is at hand."""
        group, name = self.place(p)
        beta1, beta2 = group["betas"]
        return Hyper(
            step=int(group["step"]),
            name=name,
            seed=int(group["seed"]),
            lr=float(group["lr"]),
            betas=(float(beta1), float(beta2)),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            weight=Dense(p.detach() if weight is None else weight),
            shape=tuple(p.shape),
            advance=self.chunks.advance_,
            first=first,
            constant=self._lookup,
        )

    def constants(self, rule: AnyRule, role: str, p: Tensor) -> State:
        """A rule's constants, held once for each device."""
        key = (role, p.device)
        if key not in self._shared:
            self._shared[key] = rule.shared(p)
        return self._shared[key]

    def ready(self, p: Tensor) -> tuple[_Seat, bool]:
        """What a parameter's step needs, and whether its state is new."""
        step = self.place(p)[0]["step"]
        if self.strategy.schedule.switches(step) and self._switched != step:
            self._switched = step  # all at once: what was active and what is never hold state together
            self._seats.clear()
            self.state.clear()
        seat, role = self._seats.get(id(p)), self.role(p)
        if seat and seat.role == role:
            return seat, False
        held = cast("dict[str, Tensor]", self.state[p])
        if fresh := not held:
            held.update(self.strategy.init(role, p))
        rule = self.strategy.rules[role]
        state = {k: v for k, v in held.items() if not k.startswith("writer.")}
        state |= self.constants(rule, role, p)
        writer = select(self.strategy.writer, p.dtype)
        self._seats[id(p)] = _Seat(role, rule, writer, Held(state), scoped(held, "writer"))
        return self._seats[id(p)], fresh

    @torch.no_grad()
    def init_state(self) -> None:
        """Make the state of every parameter now, as the first step would."""
        for _, p in self.named_parameters():
            if p.requires_grad and p.numel():
                self.ready(p)

    def step_param(self, p: nn.Parameter, g: Tensor | Blocks) -> None:
        """The whole update of one tensor.

        Args:
            p: the parameter.
            g: its gradient, a tensor like p or Blocks.

        Raises:
            UserError: a gradient of another shape or device, sparse, or not of real numbers.
        """
        if torch.is_grad_enabled():  # a decorator would switch at every call, also inside of `step`
            with torch.no_grad():
                self.step_param(p, g)
            return
        if not p.numel():
            return
        if problem := unfit(p, g if isinstance(g, Tensor) else getattr(g, "tensor", None)):
            raise UserError(f"gradient of {self.place(p)[1]!r}: {problem}")
        g = Dense(g) if isinstance(g, Tensor) else g
        seat, fresh = self.ready(p)
        weight, rule = p.detach(), seat.rule
        hp = self.hyper(p, fresh, weight)
        if is_pointwise(rule):
            self.chunks.apply_(rule, seat.writer, weight, g, seat.state, seat.extra, hp)
            return
        whole = cast("Rule", rule)
        whole.prepare(g, seat.state, hp)
        direction = whole.update(g, seat.state, hp)
        self.chunks.write_(seat.writer, weight, direction, seat.extra, hp)
        for key, value in direction.commit.items():
            seat.state[key].copy_(value)

    def backward(self, loss_fn: Callable[[], Tensor], model: nn.Module | None = None) -> Tensor:
        """Evaluate the loss and leave what the step needs.

        Args:
            loss_fn: gives the scalar loss of one batch.
            model: owner of the parameters; zeroth-order sources probe inside its forward. The one
                the optimizer was made with, if None.
        """
        group = self.param_groups[0]
        query = Query(group["seed"], group["step"], len(self._evidence), self.chunks.compile)
        if model is None and self._model is not None:
            model = self._model()
        params = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        loss, evidence = self.strategy.source.backward(params, loss_fn, model=model, query=query)
        if evidence is not None:
            self._evidence.append(evidence)
        return loss

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Step every parameter that has a gradient; tensors that were released have had theirs."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = self.backward(closure) if not self.strategy.source.needs_autograd else closure()
        if not self._evidence and not self.strategy.source.needs_autograd:
            self.init_state()  # torch's distributed checkpoint makes state by a step of nothing
        for p, g in self.strategy.source.gradients(self.named_parameters(), self._evidence):
            self.step_param(p, g)
        self._evidence.clear()
        for group in self.param_groups:
            group["step"] += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget every gradient, and what the source left instead of one."""
        self._evidence.clear()
        super().zero_grad(set_to_none)

    def nonfinite(self) -> int:
        """Elements whose gradient or new fp16 weight was not finite: not stepped. Reads from the device."""
        return self.chunks.skipped()

    def state_bytes(self) -> int:
        """Bytes of state held now: every storage once, constants included."""
        tensors = [t for held in self.state.values() for t in held.values() if isinstance(t, Tensor)]
        tensors += [t for held in self._shared.values() for t in held.values()]
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
        return sum(storages.values())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load exactly: dtypes and bits as saved, on the parameter's device; all of it or nothing.

        Raises:
            CheckpointError: saved by another strategy, for other shapes, or without what was held.
        """
        groups, states = state_dict["param_groups"], state_dict["state"]
        check_saved(state_dict, self.param_groups)
        if not states and any(group["step"] for group in groups) and self._holds():
            raise lost(max(group["step"] for group in groups))
        saved = [
            (p, group, states[i])
            for group, own in zip(groups, self.param_groups, strict=True)
            for i, p in zip(group["params"], own["params"], strict=True)
            if i in states
        ]
        keys = [self._fitting(*one) for one in saved]
        super().load_state_dict({"state": {}, "param_groups": groups})
        self._places.clear()  # the groups are new, and so is their step
        self._seats.clear()
        self._switched = -1
        for (p, _, held), order in zip(saved, keys, strict=True):
            self.state[p] = {k: held[k].detach().to(p.device, copy=True) for k in order}
        if self.param_groups:
            self.chunks = Chunks(bool(self.param_groups[0]["compile"]))

    def _holds(self) -> bool:
        """Whether a parameter that trains has state in its ordinary role."""
        trained = [(group["role"], p) for group, _, p in self._walk() if p.requires_grad and p.numel()]
        return any(self.strategy.init(role, torch.empty_like(p, device="meta")) for role, p in trained)

    def _fitting(self, p: Tensor, group: Mapping[str, Any], saved: Mapping[str, Tensor]) -> list[str]:
        """Keys of the saved state of a parameter and its group, in the order in which kernels take them."""
        expected = self.strategy.init(self.role(p, group), torch.empty_like(p, device="meta"))
        moves = not isinstance(self.strategy.schedule, Always)
        check_fit(self.place(p)[1], p, saved, expected, moves)
        return list(expected)
