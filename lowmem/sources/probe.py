"""The loss at a displaced point, by hooks that leave the weights as they are.

Before a module runs, each weight of its own is replaced by a displaced copy;
after it, the tensor that was there is put back, also when it raises. So the
weights keep every bit, whatever their dtype, and one module's copies are all
that is held (adding eps z and taking it off again, as the papers do, makes a
bf16 model wander by half of its size in 20 000 steps).

A weight may also be read where no hook of its owner runs: by another module, or
by the loss. Such a read would see the point that was not displaced, and nothing
would tell. The first probe of a model therefore watches every operation, and the
weights that it catches are from then on displaced for the whole of a probe, at
the cost of a copy of them. A later probe that does not run every owner that ran
then is watched anew.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_leaves

from lowmem.optim.source import Named
from lowmem.sources.quantized import owned

log = logging.getLogger(__name__)

Shift = Callable[..., Tensor]
Slot = tuple[int, str]
"""A module (by id) and the name a parameter has in it."""


@dataclass(frozen=True)
class Access:
    """How the parameters of a model are read.

    Args:
        names: the parameters that were looked at.
        held: those that are displaced for the whole of a probe.
        silent: owners that did not run when all reads were watched.
    """

    names: frozenset[str]
    held: frozenset[str]
    silent: frozenset[Slot]


_KNOWN: weakref.WeakKeyDictionary[nn.Module, Access] = weakref.WeakKeyDictionary()


class Prober:
    """Evaluates a loss at displaced points.

    Args:
        params: names and parameters that are displaced; tied ones once.
        model: whose modules own them; without it all are displaced for the whole of a probe.
    """

    def __init__(self, params: Named, model: nn.Module | None) -> None:
        self.params, self.model = params, model
        self.names = {id(p): name for name, p in params}
        self.slots = _slots(model, self.names)
        self._shift: Shift = _unmoved
        self._depth: Counter[int] = Counter()
        self._originals: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._ran: set[int] = set()
        self._watch: _Reads | None = None

    def __call__(self, loss_fn: Callable[[], Tensor], shift: Shift) -> Tensor:
        """The loss where every weight w reads as shift(name, w).

        Args:
            loss_fn: evaluated once; more often where weights turn out to be read past their owners.
            shift: makes the displaced copy of a weight.
        """
        names = frozenset(self.names.values())
        if self.model is None or not self.slots:
            return self._evaluate(loss_fn, shift, names)
        known = _KNOWN.get(self.model)
        if known is not None and known.names == names:
            loss = self._evaluate(loss_fn, shift, known.held)
            if self._silent() <= known.silent:
                return loss
        held = _ownerless(self.names, self.slots) | (known.held & names if known is not None else frozenset())
        while True:
            self._watch = _Reads(self.params)
            loss = self._evaluate(loss_fn, shift, held)
            caught, self._watch = frozenset(self._watch.caught), None
            if caught <= held:
                _KNOWN[self.model] = Access(names, held, self._silent())
                _tell(held, self.params)
                return loss
            held |= caught

    @property
    def known(self) -> bool:
        """Whether all reads of these weights have been watched before."""
        found = _KNOWN.get(self.model) if self.model is not None else None
        return found is not None and found.names == frozenset(self.names.values())

    @property
    def held(self) -> frozenset[str]:
        """Weights that are read past their owners, as far as that is known."""
        found = _KNOWN.get(self.model) if self.model is not None else None
        return found.held if found is not None else frozenset(self.names.values())

    def _silent(self) -> frozenset[Slot]:
        return frozenset((id(module), name) for module, name, _ in self.slots if id(module) not in self._ran)

    def _evaluate(self, loss_fn: Callable[[], Tensor], shift: Shift, held: frozenset[str]) -> Tensor:
        self._shift, self._ran = shift, set()
        with self.hooked(self._enter, self._leave), self._watch or nullcontext():
            try:
                for name, p in self.params:
                    if name in held:
                        self._displace(p)
                return loss_fn()
            finally:
                self._restore()

    @contextmanager
    def hooked(self, enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
        """Call these before and after each owner of a parameter runs, the second one also when it raises."""
        owners = {id(module): module for module, _, _ in self.slots}
        handles: list[Any] = []
        try:
            for module in owners.values():
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                handles.append(module.register_forward_hook(leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._ran.add(id(module))
        for p in owned(module).values():
            if id(p) in self.names:
                self._displace(p)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        for p in owned(module).values():
            if self._depth[id(p)]:
                self._depth[id(p)] -= 1
                if not self._depth[id(p)]:
                    self._put_back(id(p))

    def _displace(self, p: nn.Parameter) -> None:
        """Once however often its owners are inside each other."""
        if not self._depth[id(p)]:
            with _unseen(self._watch), _full_precision(p.device.type):
                original = p.data
                copy = self._shift(self.names[id(p)], original)
            self._originals[id(p)] = (p, original)
            p.data = copy
        self._depth[id(p)] += 1

    def _put_back(self, key: int) -> None:
        p, original = self._originals.pop(key)
        p.data = original

    def _restore(self) -> None:
        for key in list(self._originals):
            self._put_back(key)
        self._depth.clear()


class _Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Catches operations that read a watched tensor's own memory, under whatever view of it."""

    def __init__(self, params: Named) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.caught: set[str] = set()
        self.paused = False
        self._names: dict[int, list[str]] = {}
        for name, p in params:
            self._names.setdefault(p.untyped_storage()._cdata, []).append(name)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if not self.paused:
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    self.caught.update(self._names.get(_storage(x), ()))
        return func(*args, **(kwargs or {}))


def _storage(x: Tensor) -> int:
    try:
        return int(x.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a tensor without memory of its own, such as a wrapper
        return 0


@contextmanager
def _unseen(watch: _Reads | None) -> Iterator[None]:
    """Our own reads are not looked at; the mode is taken off because compiled code runs eagerly under one."""
    if watch is None:
        yield
        return
    watch.paused = True
    try:
        if _get_current_dispatch_mode() is watch:
            with _pop_mode_temporarily():
                yield
        else:
            yield
    finally:
        watch.paused = False


def _full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast inside; a hook may run under the one of the model."""
    known = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if known else nullcontext()


def _unmoved(name: str, w: Tensor) -> Tensor:
    return w


def _slots(model: nn.Module | None, names: Mapping[int, str]) -> list[tuple[nn.Module, str, str]]:
    """Every place a parameter is owned: module, its name there, its name here."""
    modules = model.modules() if model is not None else ()
    return [
        (module, own, names[id(p)])
        for module in modules
        for own, p in owned(module).items()
        if id(p) in names
    ]


def _ownerless(names: Mapping[int, str], slots: list[tuple[nn.Module, str, str]]) -> frozenset[str]:
    return frozenset(names.values()) - {name for _, _, name in slots}


def _tell(held: frozenset[str], params: Named) -> None:
    if held:
        size = sum(p.numel() * p.element_size() for name, p in params if name in held)
        log.warning(
            "read outside the modules that own them, so held twice during a probe (%d bytes): %s",
            size, ", ".join(sorted(held)),
        )  # fmt: skip
