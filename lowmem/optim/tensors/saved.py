"""A saved optimizer read back: dtypes, bits and strides as they were, all of it or nothing.

torch's own loading casts every state tensor to the dtype of its parameter, which destroys
16-bit indices and fp32 scales under bf16 weights; so it is given the groups alone, and what
belongs to no parameter. `Loading.read` stands after the caller's pre-hooks and sees what they
made of the state dict; `Loading.store` stands before the post-hooks, which find all of it.

A state is that of the step before the clock of its group: the next step may switch rules.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lowmem.errors import CheckpointError
from lowmem.optim.engine.settings import NEUTRAL
from lowmem.optim.shards import shard_of
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors.marks import has_turns
from lowmem.optim.tensors.offload import Home
from lowmem.optim.tensors.outside import Outside
from lowmem.optim.tensors.roles import from_text, to_text
from lowmem.optim.tensors.seats import Roster, names_of
from lowmem.optim.terms.state import State

log = logging.getLogger(__name__)

Group = dict[str, Any]


def saved(optimizer: Any, packed: dict[str, Any]) -> dict[str, Any]:
    """The state dict that torch has packed, with every state as it stands in checkpoints.

    Where tensors take turns, it says of whom nothing is held though it has its turn: no gradient came.
    """
    outside = Outside(optimizer.strategy)
    indices = [i for group in packed["param_groups"] for i in group["params"]]
    state = dict(packed["state"])
    for i, p in zip(indices, [p for group in optimizer.param_groups for p in group["params"]], strict=True):
        if state.get(i):
            place = optimizer.place(p)
            rule_name = optimizer.roster.rule_at(p, max(0, place.group["step"] - 1))
            state[i] = outside.out(place, rule_name, p, state[i])
    if not optimizer.strategy.turns:
        return {**packed, "state": state}
    held = {p for p, own in optimizer.state.items() if own}
    waiting = to_text(dict.fromkeys(_due(optimizer.strategy, optimizer.roster, held), ""))
    groups = [{**group, "waiting": waiting} for group in packed["param_groups"]]
    return {**packed, "state": state, "param_groups": groups}


def _due(strategy: Strategy, roster: Roster, held: Collection[Tensor]) -> Iterator[str]:
    """The tensors that the last step was the turn of, that hold state, and of whom nothing is held."""
    schedule = strategy.schedule
    for p, place in roster.places.items():
        rule_name = roster.rule_at(p, max(0, place.group["step"] - 1))
        divided = schedule.restarts(place.name, place.rule) or (schedule.observes and rule_name == "matrix")
        if (
            p in held
            or strategy.rules[rule_name].idle
            or not has_turns(p)
            or (strategy.turns and not divided)
        ):
            continue
        if place.fresh(strategy, rule_name, p, "meta"):
            yield place.name


class Loading:
    """One call of `load_state_dict`: two hooks around torch's.

    Args:
        asked: the strategy that the optimizer was given; home: where its state lives.

    Attributes:
        strategy: the one that was saved, which has decided what that leaves open.
    """

    def __init__(self, asked: Strategy, home: Home) -> None:
        self.asked = self.strategy = asked
        self.home = home
        self.found: dict[Tensor, State] = {}

    @contextmanager
    def around(self, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """While torch loads: after the caller's pre-hooks, before the caller's post-hooks."""
        hooks = (
            optimizer.register_load_state_dict_pre_hook(self.read),
            optimizer.register_load_state_dict_post_hook(self.store, prepend=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def read(self, optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
        """Check and copy the state of every parameter; what is left of the state dict is torch's.

        Raises:
            CheckpointError: saved by another strategy, for other shapes, or without what was held.
        """
        own = optimizer.param_groups
        self.strategy = check_groups(saved, own, self.asked)
        self.outside = Outside(self.strategy)
        groups = self._named(saved["param_groups"], own)
        roster = Roster(groups, self.strategy)
        indices = [i for group in saved["param_groups"] for i in group["params"]]
        states = saved["state"]
        params = [p for group in own for p in group["params"]]
        held = {p for i, p in zip(indices, params, strict=True) if states.get(i)}
        step = max((g["step"] for g in groups), default=0)
        waiting = {name for group in groups for name in from_text(group.pop("waiting"))}
        if step and (missing := self._missing(roster, held, waiting)):
            raise lost(step, missing)
        for i, p in zip(indices, params, strict=True):
            if i in states:
                # an empty one is made by who only looks at it; where turns change, it may be one that is lost
                seen = not states[i] and (self.strategy.schedule.steady or roster[p].name in waiting)
                self.found[p] = {} if seen else self._exact(roster, p, states[i])
        rest = {key: value for key, value in states.items() if key not in set(indices)}
        again = [
            {**group, "params": theirs["params"]}
            for group, theirs in zip(groups, saved["param_groups"], strict=True)
        ]
        return {**saved, "state": rest, "param_groups": again}

    def store(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the copies in their places."""
        for p, state in self.found.items():
            self.home.hold_(p, state)
        optimizer.state.update(self.found)

    def _named(self, saved: Sequence[Group], own: Sequence[Group]) -> list[Group]:
        """The saved groups over the optimizer's tensors, with the names they will go by."""
        groups = []
        for old, mine, theirs, ours in zip(saved, own, names_of(saved), names_of(own), strict=True):
            names = theirs if "param_names" in old else ours
            found = {key: from_text(old.get(key, "{}")) for key in ("roles", "heads", "waiting")}
            kept = {
                key: to_text({new: said[was] for new, was in zip(names, theirs, strict=True) if was in said})
                for key, said in found.items()
            }
            groups.append({"decided": "", **old, "params": mine["params"], **kept})
            if "param_names" in mine:
                groups[-1]["param_names"] = list(names)
        tell(saved, own)
        return groups

    def _missing(self, roster: Roster, held: Collection[Tensor], waiting: Collection[str]) -> str:
        """Whose state is missing: all of it, or that of a tensor which had its turn; nothing, if empty."""
        turns = self.strategy.turns
        if held and not turns:
            return ""
        names = [name for name in _due(self.strategy, roster, held) if name not in waiting]
        return "" if not names else f"optimizer state of {names[-1]!r}" if turns else "optimizer state"

    def _exact(self, roster: Roster, p: Tensor, given: Mapping[str, Tensor]) -> State:
        """A copy of a parameter's state, in the order and with the strides that kernels were given."""
        place = roster[p]
        rule_name = roster.rule_at(p, max(0, place.group["step"] - 1))
        needed = place.fresh(self.strategy, rule_name, p, "meta")
        given = self.outside.back(place, rule_name, p, given, needed)
        check_state(place.name, p, given, needed, moves=not self.strategy.schedule.steady)
        return {key: laid_out(given[key], like, self.home.device(p, key)) for key, like in needed.items()}


class Resumable(torch.optim.Optimizer):
    """An optimizer that is saved and loaded exactly; `roster`: all parameters, as they are now."""

    strategy: Strategy
    asked: Strategy
    home: Home
    _adopted = False

    def _decided(self) -> Strategy:
        """The strategy; as long as nothing is held, what it leaves open goes by how the weights lie."""
        is_open = self.asked.sided(spread=False) is not self.asked
        if is_open and not self._adopted and not any(self.state.values()):
            params = [p for group in self.param_groups for p in group["params"]]
            self._decide(self.asked.sided(any(shard_of(p) for p in params)))
        return self.strategy

    def _decide(self, strategy: Strategy) -> None:
        self.strategy = strategy
        for group in self.param_groups:
            group["strategy"] = strategy.text

    def adopt(self, text: str) -> None:
        """Decide as a checkpoint has, before its state is read into the tensors of an optimizer.

        Args:
            text: `Strategy.text` of the optimizer that was saved; of another strategy, it changes nothing.
        """
        if text in (known := decisions(self.asked)):
            self._adopted = True
            self._decide(known[text])
            self._arrange()

    @property
    def roster(self) -> Roster:
        """Told by the optimizer itself."""
        raise NotImplementedError

    def _arrange(self) -> None:
        """Put aside what rests now."""
        raise NotImplementedError

    def resting(self, p: Tensor) -> bool:
        """Whether a parameter takes no part in the next step."""
        place = self.roster[p]
        return self.strategy.rules[self.roster.rule_of(place, place.group["step"])].idle

    def state_dict(self) -> dict[str, Any]:
        """Groups and state, tensor by tensor the same on one device and on any number of ranks."""
        self.home.settle()
        return saved(self, super().state_dict())

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load exactly: dtypes, bits and strides as saved, on the parameter's device; all of it or nothing.

        Raises:
            CheckpointError: saved by another strategy, for other shapes, or without what was held.
        """
        self.home.settle()
        loading = Loading(self.asked, self.home)
        with NEUTRAL.entered(), loading.around(self):
            super().load_state_dict(dict(state_dict))
        self.strategy = loading.strategy
        self._arrange()


def laid_out(value: Tensor, like: Tensor, device: torch.device) -> Tensor:
    """A copy with the strides of another tensor: some stores give everything back row by row."""
    copy = torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value.detach())


def tell(saved: Sequence[Group], own: Sequence[Group]) -> None:
    """Say what changes where one side has names and the other has none."""
    theirs, ours = ("param_names" in groups[0] for groups in (saved, own))
    if theirs and not ours:
        log.warning(
            "the checkpoint names its parameters and this optimizer does not: the names are taken over, "
            "and random rounding and refreshes go on as in the run that was saved"
        )
    if ours and not theirs:
        log.warning(
            "the checkpoint was saved without names of parameters: this optimizer's are kept, and random "
            "rounding and the steps of refreshes, which go by names, differ from the run that was saved"
        )


def decisions(asked: Strategy) -> dict[str, Strategy]:
    """What checkpoints may say of a strategy that leaves something open, and the strategy it becomes."""
    found = (asked, *(asked.sided(spread) for spread in (False, True)))
    return {strategy.text: strategy for strategy in found}


def check_groups(saved: Mapping[str, Any], groups: Sequence[Group], asked: Strategy) -> Strategy:
    """The strategy that a state dict was saved by; refuse one that belongs to another optimizer.

    Args:
        saved: the state dict; groups: those of the optimizer that is to load it; asked: its strategy.

    Raises:
        CheckpointError: saved by another strategy, for other parameters, or with keys of another type.
    """
    may, mine = decisions(asked), groups[0]["strategy"] if groups else asked.text
    texts = [g.get("strategy") for g in saved["param_groups"]] or [mine]
    theirs = next((text for text in texts if text not in may or text != texts[0]), texts[0])
    if theirs not in may or theirs != texts[0]:
        raise CheckpointError(
            f"optimizer state was saved by {theirs or 'another optimizer'}, this run is {mine}: "
            f"resume with the strategy and options it was saved with"
        )
    if [len(g["params"]) for g in saved["param_groups"]] != [len(g["params"]) for g in groups]:
        raise CheckpointError(
            "optimizer state was saved for another set of parameters: resume the same model"
        )
    known = {i for g in saved["param_groups"] for i in g["params"]}
    as_text = {str(i) for i in known} - known
    strange = [key for key in saved["state"] if key in as_text]
    if strange:
        raise CheckpointError(
            f"optimizer state of {strange[0]!r} belongs to no parameter of the checkpoint, whose keys are "
            f"{sorted(known, key=str)[:3]}...: a store that turns numbers into text does this; save what "
            f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict gives"
        )
    return may[theirs]


def lost(steps: int, what: str) -> CheckpointError:
    """The error for a state dict of a run under way that does not hold what it should."""
    return CheckpointError(
        f"the checkpoint is of step {steps} and holds no {what}: torch.distributed.checkpoint reads "
        f"what the optimizer that it loads into holds already; call init_state() on it first, or use "
        f"torch.distributed.checkpoint.state_dict.get_optimizer_state_dict"
    )


def check_state(
    name: str, p: Tensor, given: Mapping[str, Any], needed: Mapping[str, Tensor], moves: bool
) -> None:
    """Refuse a parameter's saved state that is not what its rule holds.

    Args:
        name: of the parameter p.
        given: what was saved; needed: what is held, on `meta`.
        moves: whether the tensors that hold state change during a run.

    Raises:
        CheckpointError: other keys, shapes or dtypes.
    """
    saved, held = (
        {k: (tuple(v.shape), v.dtype) for k, v in state.items() if isinstance(v, Tensor)}
        for state in (given, needed)
    )
    if saved == held:
        return
    what = f"optimizer state of {name!r} {tuple(p.shape)}"
    if moves and saved.items() < held.items():
        # torch reads a flattened state dict by the keys of the optimizer that it is loaded into
        raise CheckpointError(
            f"{what} lacks {', '.join(sorted(held.keys() - saved.keys()))}: the tensors that hold state "
            f"change during this run, and a flattened state dict is read by the keys of a fresh optimizer; "
            f"save with flatten_optimizer_state_dict=False and torch.save, or, to load this one, set 'step' "
            f"of every group to one less than the steps it has taken and call init_state() first"
        )
    if moves and not held:
        raise CheckpointError(
            f"{what} is of a tensor that has its turn at another time here: whose turn it is goes by the "
            f"names of parameters; make the optimizer with them, or without them, as when it was saved"
        )
    raise CheckpointError(
        f"{what} does not fit: the checkpoint is of another model, dtype or writer; resume with the settings "
        f"it was saved with"
    )
