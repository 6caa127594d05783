"""One training step of a real Hugging Face model, on fake tensors, as the Trainer takes it.

Forward with the model's own loss, outputs dropped, backward, clipping, and the instant before the optimizer
steps. The optimizer itself is not run: its state and scratch are added by `events`, so one trace serves every
strategy. Phases, in the order of a step:

    generation         task grpo alone: answers grow
    forward            the layers
    loss forward       head, logits, loss
    loss backward      until the gradient of the last hidden state exists
    first layer backward | layers backward | last layer backward        "recompute" under checkpointing
    embedding backward
    clip               norms of the gradients (no release)
    optimizer step     what is live when the optimizer starts (no release)

With gradient release a parameter's step happens inside backward: `Trace.releases` has the live bytes there.
It is the same step but for what becomes of gradients, so it is read off the other (`let_go`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowmem.memory.run import Run
from lowmem.memory.trace import kernels, ranks, trainable
from lowmem.memory.trace.offload import offloaded
from lowmem.memory.trace.patience import Patience, refusing
from lowmem.memory.trace.ranks import AFTER, Units
from lowmem.memory.trace.tasks import losses
from lowmem.memory.trace.tasks.generation import generate
from lowmem.memory.trace.tracker import Gradient, Moment, Tracker
from lowmem.memory.trace.windows import Parameter, resting
from lowmem.optim.int8.tensor import is_coded
from lowmem.optim.source import Query, Source
from lowmem.optim.strategy import Strategy
from lowmem.optim.tensors import roles
from lowmem.optim.tensors.checks import pays

EVALUATION = "evaluation"
BUILT = "it cannot be built without weights"


@dataclass(frozen=True)
class Trace:
    """What a step without optimizer takes.

    Args:
        moments: the largest instant of each phase.
        releases: live bytes when each parameter's step runs inside backward (gradient release), by name.
        parameters: the trainable ones.
        total_parameters: all of them, logical elements (a packed 4-bit weight counts what it stands for).
        layers: depth.
        tracker: the stream of births and deaths, for the allocator and the timeline; None if extrapolated.
        units: the parameters as ranks gather them; None if extrapolated.
        gradients: in the order in which they become whole; none if extrapolated.
    """

    moments: Mapping[str, Moment]
    releases: Mapping[str, Moment]
    parameters: tuple[Parameter, ...]
    total_parameters: int
    layers: int
    tracker: Tracker | None = None
    units: Units | None = None
    gradients: tuple[Gradient, ...] = ()


def trace(config: Any, run: Run, strategy: Strategy | None = None) -> Trace:
    """Trace one step.

    Args:
        config: a transformers configuration; it is copied, not changed.
        run: the options.
        strategy: one that probes by forward passes, or lets tensors rest; None for any other.

    Raises:
        UserError: the architecture cannot be traced.
    """
    tracker = _tracker(run)
    with _ready(config, run, tracker, fused=strategy is None or strategy.source.fused) as (model, batch, run):
        parameters = tuple(_parameters(model))
        aside = resting(strategy, parameters)
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and name not in aside)
        gradients: list[Gradient] = []
        if strategy is None or strategy.source.needs_autograd:
            gradients = _step(model, batch, run, tracker)
        else:
            _probe(model, batch, run, tracker, strategy.source)
        total, units = trainable.count_parameters(model), ranks.units(model)
        tracker.stop()
    depth = trainable.depth(config)
    kept = Trace(tracker.moments(), {}, parameters, total, depth, tracker, units, tuple(gradients))
    return let_go(kept) if run.gradient_release and gradients else kept


def trained(config: Any, run: Run) -> tuple[Parameter, ...]:
    """The trainable parameters, without a step.

    Args:
        config, run: as for `trace`.
    """
    with warnings.catch_warnings(), FakeTensorMode() as mode:
        warnings.simplefilter("ignore")
        with refusing(config, BUILT):
            return tuple(_parameters(trainable.build(config, run, mode)))


def _tracker(run: Run) -> Tracker:
    return Tracker(run.granularity, kernels.scratch if run.device == "cuda" else None)


def let_go(found: Trace) -> Trace:
    """The step with gradient release: a gradient lives until its tensor has stepped, and backward is the end.

    Args:
        found: the full trace of the step without.
    """
    if found.tracker is None:
        raise ValueError("what is let go follows from a full trace")
    tracker, gradients = found.tracker, found.gradients
    last = {index: g for g in gradients for index in g.storages}
    freed = [[-index - 1 for index in g.storages if last[index] is g] for g in gradients]
    stop = next((start for start, name in tracker.phases if name in AFTER), len(tracker.stream))
    made, places, at = tracker.emptied(), {}, 0
    for g, deaths in zip(gradients, freed, strict=True):
        made.stream += tracker.stream[at : g.at]
        places[g.name] = len(made.stream)
        made.stream += deaths
        at = g.at
    made.stream += tracker.stream[at:stop]
    for number, (start, name) in enumerate(tracker.phases):
        before = (len(d) for g, d in zip(gradients, freed, strict=True) if g.phases <= number)
        made.phases += [] if name in AFTER else [(start + sum(before), name)]
    return replace(found, moments=made.moments(), releases=_released(made, places), tracker=made)


def _released(tracker: Tracker, places: Mapping[str, int]) -> dict[str, Moment]:
    found = tracker.at(list(places.values()))
    return {name: Moment("release step", m.bytes, m.at) for name, m in zip(places, found, strict=True)}


def on_rank(found: Trace, run: Run) -> Trace:
    """What the first of several ranks holds of a step.

    Args:
        found: the trace of one card, with its stream; run: with its ranks.
    """
    if found.tracker is None or found.units is None:
        raise ValueError("what a rank holds follows from a full trace")
    tracker, places = ranks.held(found.tracker, found.units, run)
    released = _released(tracker, {name: places[m.at] for name, m in found.releases.items()})
    parameters = ranks.sharded(found.parameters, run.ranks) if run.sharded else found.parameters
    return replace(
        found, moments=tracker.moments(), releases=released, parameters=parameters, tracker=tracker
    )


def evaluation(config: Any, run: Run) -> Tracker:
    """A forward pass over an evaluation batch, its one phase: no graph, no dropout, no gradients.

    Args:
        config: as for `trace`; run: the options, with the rows and tokens of that batch.

    Raises:
        UserError: the architecture cannot be traced.
    """
    tracker = _tracker(run)
    with _ready(config, run, tracker) as (model, batch, run):
        model.eval()
        with tracker, kernels.products(model, run), torch.no_grad():
            tracker.enter(EVALUATION)
            if run.task == "grpo":
                generate(model, run, run.batch_size)
            _loss(model, batch, run)
        if run.ranks > 1:
            tracker, _ = ranks.held(tracker, ranks.units(model), run)
        tracker.stop()
    return tracker


@contextmanager
def _ready(
    config: Any, run: Run, tracker: Tracker, *, fused: bool = True
) -> Iterator[tuple[nn.Module, dict[str, Tensor], Run]]:
    """Model and batch on fake tensors, known to the tracker, and the run as it is laid out for them."""
    each = run.seq_len if fused else min(run.longest or run.seq_len, run.seq_len)  # fused: of no difference
    texts = [min(each, run.seq_len - at) for at in range(0, run.seq_len, each)] * run.batch_size
    lengths = texts if run.rows == "packed" else []
    if lengths:  # TRL lays the rows of a batch end to end
        run = replace(run, batch_size=1, seq_len=run.tokens, longest=run.longest or run.seq_len)
    real = kernels.semantics(
        run.device, lengths=lengths, chunked=run.loss == "chunked", capability=run.compute_capability
    )
    with warnings.catch_warnings(), real, FakeTensorMode() as mode:
        warnings.simplefilter("ignore")
        with refusing(config, BUILT):
            model = trainable.build(config, run, mode)
        batch = losses.batch(run)
        tracker.register([*model.parameters(), *model.buffers()], "weights")
        tracker.share(model.parameters())
        tracker.register(batch.values(), "activations")
        library = torch.empty(run.library, dtype=torch.uint8)  # cuBLAS keeps it from its first product on
        tracker.register([library], "workspace")
        with refusing(config, "its training step does not run without data"), Patience(model).watching():
            yield model, batch, run


def _parameters(model: nn.Module) -> Iterator[Parameter]:
    found = roles.find(model)
    for name, p in model.named_parameters():
        if p.requires_grad:
            role = roles.refined(found.get(name, "matrix"), p.shape)
            yield Parameter(name, tuple(p.shape), p.dtype, role, coded=is_coded(p))


def _loss(model: nn.Module, batch: Mapping[str, Tensor], run: Run) -> Any:
    """The model's output with its loss: what else it holds dies with it, unless the loop keeps it."""
    with torch.autocast("cpu", getattr(torch, run.autocast_dtype), enabled=run.autocast):
        if run.task != "sft":
            return SimpleNamespace(loss=losses.loss(model, batch, run))
        if run.loss == "labels":
            return SimpleNamespace(loss=_label_loss(model, batch, run))
        extra: dict[str, Any] = {"fused_lm_head": True}
        if run.loss == "plain":
            extra = {"num_items_in_batch": torch.ones((), dtype=torch.long)}
        return model(**batch, use_cache=False, **extra)


def _label_loss(model: nn.Module, batch: Mapping[str, Tensor], run: Run) -> Tensor:
    """Logits at label positions only; which ones is data, how many is not: the last ones stand for them."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    count = run.tokens if run.label_tokens is None else run.label_tokens
    kept = max(1, min(run.seq_len - 1, round(count / run.batch_size)))
    positions = torch.arange(run.seq_len - 1 - kept, run.seq_len - 1)
    logits = model(**inputs, use_cache=False, logits_to_keep=positions).logits
    targets = batch["labels"][:, positions + 1].flatten()
    total = nn.functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="sum")
    return total / torch.ones((), dtype=torch.long)


def _step(model: nn.Module, batch: Mapping[str, Tensor], run: Run, tracker: Tracker) -> list[Gradient]:
    """Forward, backward, clip; returns the gradients of the last micro-batch."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients: list[Gradient] = []
    for name, p in trainable.items():
        p.register_post_accumulate_grad_hook(_on_gradient(name, tracker, gradients))  # type: ignore[no-untyped-call]
    with (
        tracker,
        kernels.products(model, run),
        phase_hooks(model, tracker, checkpointing=run.gradient_checkpointing),
    ):
        if run.task == "grpo":
            tracker.enter("generation")
            generate(model, run, run.batch_size * run.accumulation)
        for _ in range(min(run.accumulation, 2)):  # the third micro-batch meets what the second met
            gradients.clear()
            tracker.enter("forward")
            with offloaded(model) if run.activation_offload else nullcontext():
                output = _loss(model, batch, run)
            loss = output.loss
            if not run.keep_output:
                del output
            tracker.enter("loss backward", "logits")
            loss.backward()
            del loss
        if run.max_grad_norm > 0:
            tracker.enter("clip", "workspace")
            nn.utils.clip_grad_norm_(trainable.values(), run.max_grad_norm)
        tracker.enter("optimizer step", "workspace")
    return gradients


def _on_gradient(name: str, tracker: Tracker, gradients: list[Gradient]) -> Callable[[Tensor], None]:
    def hook(p: Tensor) -> None:
        if p.grad is None:
            return
        held = tracker.claim(p.grad, "gradients")
        tracker.share([p.grad])
        gradients.append(Gradient(name, held, len(tracker.stream), len(tracker.phases)))

    return hook


def _probe(model: nn.Module, batch: Mapping[str, Tensor], run: Run, tracker: Tracker, source: Source) -> None:
    """The source's own evaluation, two forward passes at displaced weights."""
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def loss_fn() -> Tensor:
        tracker.enter("forward")
        loss: Tensor = _loss(model, batch, run).loss
        return loss

    count = sum(p.numel() for _, p in params)
    pay = run.device == "cuda" or pays(count, run.steps)
    compiled = run.compile == "on" or (run.compile == "auto" and pay)
    noise = kernels.fused_noise() if compiled else nullcontext()
    with noise, tracker, kernels.products(model, run), phase_hooks(model, tracker, checkpointing=False):
        source.backward(params, loss_fn, model=model, query=Query(0, 0))
        tracker.enter("optimizer step", "workspace")


@contextmanager
def phase_hooks(model: nn.Module, tracker: Tracker, *, checkpointing: bool) -> Iterator[None]:
    """Tell the tracker, by hooks that allocate nothing, which part of the step is running."""
    layers = trainable.decoder_layers(model)
    word = "recompute" if checkpointing else "layer backward"
    middle = "recompute" if checkpointing else "layers backward"
    names = {len(layers) - 1: f"first {word}", 0: f"last {word}"}

    def enter_when_grad(x: Any, phase: str) -> None:
        tensor = x[0] if isinstance(x, (tuple, list)) else x
        if tracker.phase == "forward" and isinstance(tensor, Tensor) and tensor.requires_grad:
            tensor.register_hook(lambda grad: tracker.enter(phase))  # type: ignore[no-untyped-call]

    def after_layer(index: int) -> Callable[..., None]:
        return lambda module, args, out: enter_when_grad(out, names.get(index, middle))

    def before_first(module: nn.Module, args: Any, kwargs: Any) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        enter_when_grad(hidden, "embedding backward")

    def before_backbone(module: nn.Module, args: Any) -> None:
        if tracker.phase == "loss forward":  # a loss that takes two passes
            tracker.enter("forward")

    def after_backbone(module: nn.Module, args: Any, out: Any) -> None:
        if tracker.phase == "forward":
            tracker.enter("loss forward", "logits")

    handles = [layer.register_forward_hook(after_layer(i)) for i, layer in enumerate(layers)]
    handles.append(layers[0].register_forward_pre_hook(before_first, with_kwargs=True))
    handles.append(trainable.backbone(model).register_forward_pre_hook(before_backbone))
    handles.append(trainable.backbone(model).register_forward_hook(after_backbone))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
