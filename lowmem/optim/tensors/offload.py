"""Where optimizer state lives between steps: with its parameter, or in the host's memory.

    Home    with its parameter, as it is stepped
    Away    in pinned host memory; it travels to the card while the tensor before it is stepped, and back
            while the next one is

A card holds two slots, each as large as the largest tensor's state: one is stepped, the other is on its
way. What is stepped are the same tensors of the same bits, so weights, state dicts and checkpoints are those
of a run that keeps its state on the card, and either kind goes on with the other's.

Which tensor comes next is what came next the last time, in a step, a window of micro-batches or a backward
pass that releases gradients: a wrong guess is only fetched late. Nothing waits on the host. Tensors that are
stepped together with others (below 2^18 elements: norms, biases, adapters) keep their state on the card, and
so does what schedules have seen, which the host reads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lowmem.errors import UserError
from lowmem.optim.engine.cutting import POLICIES
from lowmem.optim.strategy import Strategy
from lowmem.optim.terms.state import State
from lowmem.several import STAYS

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Tensors here, on the card, and there, on the host."""
SLOTS = 2
ALIGNED = 256
"""Bytes: where tensors begin in a slot."""
LEAST = POLICIES["cuda"].together
"""Elements of a parameter whose state is away."""
SEEN = ("schedule.", "source.")
"""Keys of what stays."""
NO_CUDA = "offload_state: there is no CUDA device whose memory the state could leave; leave it out"


class Transfer(Protocol):
    """Moves bytes in the background; what it is asked for in one direction, it does in order."""

    def pinned(self, like: Tensor) -> Tensor:
        """A copy in host memory."""

    def room(self, size: int, device: torch.device) -> Tensor:
        """Bytes on the card, (size,) uint8, which `fetch` may write to."""

    def fetch(self, slot: int, pairs: Pairs) -> None:
        """Copy from there to here, once all that was given back before is there."""

    def arrive(self, slot: int) -> None:
        """What is computed from now on comes after what was fetched into the slot."""

    def give(self, slot: int, pairs: Pairs) -> None:
        """Copy from here to there, once what is computed until now has been."""

    def finish(self) -> None:
        """Wait until all is there."""


def _nothing() -> None:
    pass


class Home:
    """State with its parameter; the base of those that have it elsewhere."""

    def again(self) -> Home:
        """One for a copy of the optimizer."""
        return self

    travels: ClassVar[bool] = False
    """Whether the tensors that are stepped hold a parameter's state for no longer than its step."""
    grown: Callable[[], None] = _nothing

    def maker(self, p: Tensor) -> str:
        """The device on which a state is made; "" for that of the parameter."""
        return ""

    def device(self, p: Tensor, key: str) -> torch.device:
        """Where a state tensor is held between steps."""
        return p.device

    def hold_(self, p: Tensor, state: State) -> None:
        """Take over a state that was made or loaded where `device` says, in place."""

    def here(self, p: Tensor, held: State, states: Mapping[Tensor, State]) -> tuple[Hashable, State]:
        """The state as it is stepped, by a name that is the same where its tensors are.

        Args:
            p: the parameter; held: its state; states: those of all, to look ahead.
        """
        return p, held

    def settle(self) -> None:
        """Let all that is held be as the last step left it."""

    def refuse_spread(self) -> None:
        """Refuse parameters whose rows are spread over ranks, where that is not served."""

    @property
    def buffers(self) -> list[Tensor]:
        """What is held on the card beside states."""
        return []


@dataclass
class Away(Home):
    """State in the host's memory between steps (see the module's docstring).

    Bytes on the card: 2 times the largest tensor's state, and the state of tensors below `least` elements;
    on the host: all other state. Each step moves that once in each direction.

    Args:
        transfer: what moves it.
        least: elements of a parameter whose state is away.
        grown: called where a slot is made anew, so that nobody keeps views of the one before.

    Example:
        >>> Away(Streams()).least
        262144
    """

    travels: ClassVar[bool] = True
    transfer: Transfer
    least: int = LEAST
    grown: Callable[[], None] = field(default=_nothing, repr=False)
    _rooms: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _views: dict[tuple[Tensor, int], tuple[State, State]] = field(default_factory=dict, repr=False)
    _holds: dict[int, Tensor] = field(default_factory=dict, repr=False)
    _next: dict[Tensor, Tensor] = field(default_factory=dict, repr=False)
    _turn: int | None = None
    _last: int = 1

    def again(self) -> Away:
        """The same transfer, and nothing under way."""
        self.settle()
        return Away(self.transfer, self.least)

    def _away(self, p: Tensor, key: str) -> bool:
        return p.numel() >= self.least and not key.startswith(SEEN)

    def maker(self, p: Tensor) -> str:
        """The host, so that a card need not hold it even once."""
        return "cpu" if p.numel() >= self.least else ""

    def device(self, p: Tensor, key: str) -> torch.device:
        """The host, for what is away."""
        return torch.device("cpu") if self._away(p, key) else p.device

    def hold_(self, p: Tensor, state: State) -> None:
        """Pin what is away, and let the rest be with the parameter."""
        for key, x in state.items():
            state[key] = self.transfer.pinned(x) if self._away(p, key) else x.to(p.device)

    def here(self, p: Tensor, held: State, states: Mapping[Tensor, State]) -> tuple[Hashable, State]:
        """In a slot; the tensor before is given back, and the state of the next one is sent for."""
        if not any(self._away(p, key) for key in held):
            return p, held
        if self._turn is None or self._holds[self._turn] is not p or not self._fits(p, self._turn, held):
            self._take(p, held)
            after = self._next.get(p)
            if after is not None and after is not p and states.get(after):
                self._fetch(1 - self._last, after, states[after])
        return (p, self._last), self._views[p, self._last][1]

    def _take(self, p: Tensor, held: State) -> None:
        """Let it be a tensor's turn."""
        if self._turn is not None:
            self._next[self._holds[self._turn]] = p
        self._give()
        slot = 1 - self._last
        if self._holds.get(slot) is not p or not self._fits(p, slot, held):
            self._fetch(slot, p, held)  # nobody knew
        self.transfer.arrive(slot)
        self._turn = self._last = slot

    def _give(self) -> None:
        """Send back what was stepped."""
        if self._turn is not None:
            self.transfer.give(self._turn, self._pairs(self._turn))
            del self._holds[self._turn]
            self._turn = None

    def _fetch(self, slot: int, p: Tensor, held: State) -> None:
        if not self._fits(p, slot, held):
            self._views[p, slot] = dict(held), self._viewed(slot, p, held)
        self._holds[slot] = p
        self.transfer.fetch(slot, self._pairs(slot))

    def _fits(self, p: Tensor, slot: int, held: State) -> bool:
        """Whether the views into a slot are those of this state."""
        known, _ = self._views.get((p, slot), ({}, {}))
        return known.keys() == held.keys() and all(known[key] is x for key, x in held.items())

    def _pairs(self, slot: int) -> Pairs:
        there, here = self._views[self._holds[slot], slot]
        return [(here[key], x) for key, x in there.items() if here[key] is not x]

    def _viewed(self, slot: int, p: Tensor, held: State) -> State:
        """Views of a slot like a state; what stays is itself."""
        places: dict[str, tuple[int, int]] = {}
        size = 0
        for key, x in held.items():
            if self._away(p, key):
                places[key] = (size, x.untyped_storage().nbytes())
                size += -(-places[key][1] // ALIGNED) * ALIGNED
        room = self._room(slot, size, p.device)
        return {key: _view(room, *places[key], x) if key in places else x for key, x in held.items()}

    def _room(self, slot: int, size: int, device: torch.device) -> Tensor:
        if slot not in self._rooms or len(self._rooms[slot]) < size:
            self.transfer.finish()  # before what is on its way has no place
            for known in [known for known in self._views if known[1] == slot]:
                del self._views[known]
            self._holds.pop(slot, None)
            self._rooms.pop(slot, None)
            self.grown()
            self._rooms[slot] = self.transfer.room(size, device)
        return self._rooms[slot]

    def settle(self) -> None:
        """Give back what was stepped, and wait."""
        self._give()
        self.transfer.finish()

    def refuse_spread(self) -> None:
        """A rank holds rows, and exchanges while it steps: its state stays on its card."""
        raise UserError(STAYS)

    @property
    def buffers(self) -> list[Tensor]:
        """The slots."""
        return list(self._rooms.values())


def _view(room: Tensor, start: int, size: int, like: Tensor) -> Tensor:
    flat = room[start : start + size].view(like.dtype)
    return flat.as_strided(like.shape, like.stride(), flat.storage_offset())


class Streams:
    """Two streams beside the one that computes, one for each direction, and events between the three."""

    def __init__(self) -> None:
        self._inward: Any = None
        self._outward: Any = None
        self._fetched: dict[int, Any] = {}

    def __reduce__(self) -> tuple[type[Streams], tuple[()]]:
        return Streams, ()  # a copy has streams of its own

    def pinned(self, like: Tensor) -> Tensor:
        """A copy in pinned memory."""
        pinned = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, pin_memory=True)
        return pinned.copy_(like)

    def room(self, size: int, device: torch.device) -> Tensor:
        """Bytes that nothing computes with any more."""
        if device.type != "cuda":
            raise UserError(f"offload_state: weights are on {device}, beside the state already; leave it out")
        if self._inward is None:
            self._inward, self._outward = (torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        room = torch.empty(size, dtype=torch.uint8, device=device)
        self._inward.wait_stream(torch.cuda.current_stream(device))
        return room

    def fetch(self, slot: int, pairs: Pairs) -> None:
        """After all that went outward until now."""
        self._inward.wait_stream(self._outward)
        with torch.cuda.stream(self._inward):
            for here, there in pairs:
                here.copy_(there, non_blocking=True)
            self._fetched[slot] = self._inward.record_event()

    def arrive(self, slot: int) -> None:
        """The current stream waits for it."""
        torch.cuda.current_stream(self._inward.device).wait_event(self._fetched[slot])

    def give(self, slot: int, pairs: Pairs) -> None:
        """After all that the current stream has been given until now."""
        self._outward.wait_stream(torch.cuda.current_stream(self._outward.device))
        with torch.cuda.stream(self._outward):
            for here, there in pairs:
                there.copy_(here, non_blocking=True)

    def finish(self) -> None:
        """The host waits."""
        for stream in (self._inward, self._outward):
            if stream is not None:
                stream.synchronize()


def home_of(strategy: Strategy) -> Away:
    """The host's memory, for the state of a strategy that steps beside a CUDA device.

    Raises:
        UserError: there is no such device, or the strategy has no gradients, and next to no state.
    """
    if problem := stays(strategy.name or "the strategy", strategy.source.needs_autograd):
        raise UserError(problem)
    return Away(Streams())


def stays(name: str, differentiates: bool) -> str:
    """Why the state of a strategy cannot leave this machine's card; empty where it can."""
    if not differentiates:
        return f"offload_state: {name} works without gradients and holds next to no state; leave it out"
    return "" if torch.cuda.is_available() else NO_CUDA
