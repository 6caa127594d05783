"""One real training step under the storage tracker: what is live, what it is, and which module made it.

The watch is entered before the step and left after it. While it is on, hooks tell the tracker the phase
(the plan's own phases), gradients are recognised as they appear, and every storage remembers the module in
whose forward pass it was born. When it is left nothing remains: no hook, no mode, no patched function.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from lowmem.errors import UserError
from lowmem.memory.trace import quantized, trainable
from lowmem.memory.trace.replica import phase_hooks
from lowmem.memory.trace.tracker import CATEGORIES, Moment, Tracker, storages
from lowmem.optim.tensors.marks import awake, trains


def kind_of(name: str) -> str:
    """The module path with layer numbers as stars.

    >>> kind_of("model.layers.11.mlp.up_proj")
    'model.layers.*.mlp.up_proj'
    """
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", f".{name}")[1:] or "(model)"


class Owned(Tracker):  # type: ignore[no-untyped-call]
    """The tracker on one device, with the module that each storage was made in."""

    def __init__(self, device: str, granularity: int) -> None:
        super().__init__(granularity)
        self.device = device
        self.inside: list[str] = []
        self.owners: list[str] = []

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Let compiled kernels run as compiled: eager ones would change the last bit of the step."""
        return True

    def _see(self, storage: torch.UntypedStorage) -> int | None:
        if storage.device.type != self.device:
            return None
        index = super()._see(storage)
        if len(self.sizes) > len(self.owners):
            self.owners.append(self.inside[-1] if self.inside else f"({self.phase})")
        return index

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):  # what lived before, a batch say, is seen at its first use
                for storage in storages(leaf):
                    self._see(storage)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def claim_for(self, tensor: Tensor, category: str, owner: str) -> None:
        """Say what a tensor is and whose it is."""
        before = len(self.owners)
        self.claim(tensor, category)
        self.owners[before:] = [owner] * (len(self.owners) - before)

    def kinds_at(self, position: int) -> dict[str, dict[str, int]]:
        """Live bytes at a place of the stream: owner -> category -> bytes."""
        found: dict[str, dict[str, int]] = {}
        live = set()
        for entry in self.stream[:position]:
            live.add(entry - 1) if entry > 0 else live.discard(-entry - 1)
        for index in live:
            row = found.setdefault(self.owners[index], dict.fromkeys(CATEGORIES, 0))
            row[self.categories[index]] += self.sizes[index]
        return found


class Watch:
    """A tracker around one step of a model and its optimizer.

    Args:
        model: the model in training; adapters and compiled wrappers welcome.
        optimizer: any torch optimizer.

    Example:
        watch = Watch(model, optimizer)
        with watch:
            model(**batch).loss.backward(); optimizer.step(); optimizer.zero_grad()
        watch.tracker.peak()
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        device = next(model.parameters()).device.type
        self.model, self.optimizer = model, optimizer
        self.tracker = Owned(device, 512 if device == "cuda" else 1)
        self._names = {p: kind_of(name.rpartition(".")[0]) for name, p in model.named_parameters()}
        self._stack = ExitStack()
        self._seen: list[dict[str, Any]] = []
        self._prompts: list[dict[str, Any]] = []  # passes that grow an answer; the first is over the prompts

    @property
    def batch(self) -> dict[str, Any]:
        """The largest micro-batch: rows, tokens per row, their kind, positions with logits; {} if unknown."""
        largest = max(self._seen, key=lambda one: one["rows"] * one["tokens"], default={})
        return largest | {"prompt_tokens": self._prompts[0]["tokens"]} if self._prompts else largest

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            self._register()
            stack.enter_context(_patched(self.tracker))
            stack.enter_context(self._phases())
            stack.enter_context(_removing(self._hooks()))
            stack.enter_context(self._release())
            stack.enter_context(self.tracker)
            self.tracker.enter("forward")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._claim_state()
        self._stack.__exit__(*error)
        self.tracker.stop()

    def _register(self) -> None:
        for p, owner in self._names.items():
            self.tracker.claim_for(p, "weights", owner)
            if p.grad is not None:
                self.tracker.claim_for(p.grad, "gradients", owner)
        for name, buffer in self.model.named_buffers():
            self.tracker.claim_for(buffer, "weights", kind_of(name.rpartition(".")[0]))
        for p, constant in quantized.constants(self.model):
            self.tracker.claim_for(constant, "weights", self._names[p])
        for grid in getattr(getattr(self.optimizer, "chunks", None), "grids", {}).values():
            for tensor in grid:
                self.tracker.claim_for(tensor, "workspace", "(shared)")
        self._claim_state()

    def _claim_state(self) -> None:
        slots = getattr(getattr(self.optimizer, "home", None), "buffers", [])
        for owner, tensors in (*state_tensors(self.optimizer), (None, slots)):
            for tensor in (x for x in tensors if not x.is_pinned()):  # that is the host's memory
                self.tracker.claim_for(tensor, "optimizer_state", self._names.get(owner, "(shared)"))

    @contextmanager
    def _phases(self) -> Iterator[None]:
        try:
            trainable.decoder_layers(self.model)
            backbone = trainable.backbone(self.model)
        except (UserError, AttributeError, LookupError, TypeError):
            yield  # not a decoder of transformers: forward, backward and step are told apart all the same
            return

        def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
            grows = kwargs.get("past_key_values") is not None and not torch.is_grad_enabled()
            phase = "generation" if grows else "forward"
            if self.tracker.phase != phase:
                self.tracker.enter(phase)
            with _disable_current_modes():  # what is computed here is not part of the step
                (self._prompts if grows else self._seen).extend(_shape_of(args, kwargs))

        def logits(module: nn.Module, args: Any) -> None:
            if self._seen and args:
                self._seen[-1]["label_tokens"] = args[0].numel() // args[0].shape[-1]

        head = self.model.get_output_embeddings()  # type: ignore[operator]
        handles = [backbone.register_forward_pre_hook(begin, with_kwargs=True)]
        handles += [head.register_forward_pre_hook(logits)] if head is not None else []
        checkpointing = recomputes(self.model)
        with _removing(handles), phase_hooks(self.model, self.tracker, checkpointing=checkpointing):
            yield

    def _hooks(self) -> Iterator[Any]:
        paths = {id(m): kind_of(name) for name, m in self.model.named_modules()}
        inside = self.tracker.inside

        def push(module: nn.Module, args: Any) -> None:
            if id(module) in paths:
                inside.append(paths[id(module)])

        def pop(module: nn.Module, args: Any, out: Any) -> None:
            if id(module) in paths and inside:
                inside.pop()

        yield global_hooks.register_module_forward_pre_hook(push)
        yield global_hooks.register_module_forward_hook(pop, always_call=True)
        for p in self._names:
            if trains(p):
                with awake(p):
                    hook = p.register_post_accumulate_grad_hook(self._on_gradient)  # type: ignore[no-untyped-call]
                yield hook
        yield self.optimizer.register_step_pre_hook(self._before_step)
        yield self.optimizer.register_step_post_hook(lambda *_: self._claim_state())

    def _on_gradient(self, p: Tensor) -> None:
        if p.grad is not None:
            self.tracker.claim(p.grad, "gradients")

    def _before_step(self, *_: Any) -> None:
        self.tracker.enter("optimizer step", "workspace")

    @contextmanager
    def _release(self) -> Iterator[None]:
        """Under gradient release the step of one tensor happens inside backward: name it and its scratch."""
        inner: Callable[..., Any] | None = getattr(self.optimizer, "step_param", None)
        if inner is None:
            yield
            return
        tracker = self.tracker

        def step_param(p: Tensor, g: Any, *args: Any, **kwargs: Any) -> Any:
            if tracker.phase == "optimizer step":
                return inner(p, g, *args, **kwargs)
            phase, category = tracker.phase, tracker._category
            if isinstance(g, Tensor):
                tracker.claim(g, "gradients")
            tracker.enter("release step", "workspace")
            try:
                return inner(p, g, *args, **kwargs)
            finally:
                tracker.enter(phase, category)

        self.optimizer.step_param = step_param  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del self.optimizer.step_param  # type: ignore[attr-defined]


def recomputes(model: nn.Module) -> bool:
    """Whether the model computes activations again in backward; transformers 5 renames the property."""
    names = ("is_activation_checkpointing", "is_gradient_checkpointing")
    present = [name for name in names if hasattr(type(model), name)]
    return bool(present and getattr(model, present[0]))


def state_tensors(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Any, list[Tensor]]]:
    """What an optimizer holds: (parameter, its tensors), and (None, tensors that all parameters share)."""
    for p, state in optimizer.state.items():
        yield p, [t for t in _leaves(state) if isinstance(t, Tensor)]
    yield None, [t for t in _leaves(getattr(optimizer, "_constants", None)) if isinstance(t, Tensor)]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def held_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's state, each storage once."""
    found = {
        s._cdata: s.nbytes() for _, tensors in state_tensors(optimizer) for t in tensors for s in storages(t)
    }
    return sum(found.values())


def _shape_of(args: Any, kwargs: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows, tokens and kind of a batch, from what the model was called with."""
    ids = next(
        (x for x in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None
    )
    if ids is None:
        return []
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    kind = "full"
    if isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all()):
        kind = "padded"
    elif isinstance(positions, Tensor) and int((positions == 0).sum()) > ids.shape[0]:
        kind = "packed"
    shape = {"rows": ids.shape[0], "tokens": ids.shape[1], "kind": kind, "label_tokens": None}
    return [{**shape, "longest": kwargs.get("max_length_q") if kind == "packed" else None}]


@contextmanager
def _removing(handles: Iterable[Any]) -> Iterator[None]:
    kept: list[Any] = []
    try:
        kept.extend(handles)
        yield
    finally:
        for handle in kept:
            handle.remove()


@contextmanager
def _patched(tracker: Tracker) -> Iterator[None]:
    """Tell the tracker where backward and clipping begin: no hook exists, and both have many callers."""
    backward, clip = torch.autograd.backward, nn.utils.clip_grad_norm_

    def entering_backward(*args: Any, **kwargs: Any) -> Any:
        if tracker.phase in ("forward", "loss forward"):  # not the inner one of a reentrant checkpoint
            tracker.enter("loss backward", "logits")
        return backward(*args, **kwargs)

    def entering_clip(*args: Any, **kwargs: Any) -> Any:
        tracker.enter("clip", "workspace")
        return clip(*args, **kwargs)

    with (
        patch.object(torch.autograd, "backward", entering_backward),
        patch.object(nn.utils, "clip_grad_norm_", entering_clip),
    ):
        yield


def modules(tracker: Owned, moment: Moment) -> list[dict[str, Any]]:
    """Bytes at one instant by kind of module, largest first."""
    rows = [{"kind": kind, "bytes": row} for kind, row in tracker.kinds_at(moment.at).items()]
    return sorted(rows, key=lambda row: -sum(row["bytes"].values()))
