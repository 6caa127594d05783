"""The Hugging Face trainers on lowmem's strategies.

    LowMemTrainer       transformers.Trainer
    LowMemSFTTrainer    trl.SFTTrainer (made on first use, so TRL stays optional)
    hf_optimizer(...)   for any stock trainer, DPO and GRPO included

`LowMemMixin` overrides what must know of strategies and nothing else: the
optimizer is made with decay groups from the arguments; a step without gradients
(the strategy's source says so) evaluates the loss instead of differentiating it;
under gradient release the gradient's norm comes from the hooks, for no gradient
is left when the Trainer asks; and a save is whole or absent (`checkpoint`).
"""

from __future__ import annotations

import functools
import importlib
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from lowmem.errors import UserError
from lowmem.models.computing.loss import label_loss, pays, supports
from lowmem.models.computing.packed import pack
from lowmem.models.computing.wide import wide
from lowmem.models.int8.convert import late
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.shards import gathered
from lowmem.optim.tensors import resting
from lowmem.training.arguments import LowMemArguments, LowMemFields, own_name
from lowmem.training.callbacks import Divergence, Interruption
from lowmem.training.curvature import tell_curvature
from lowmem.training.factory import hf_optimizer, make_optimizer, refuse_foreign, refuse_half
from lowmem.training.folder.saving import WholeCheckpoints
from lowmem.training.freezing import freezing_of
from lowmem.training.ranks.sharding import Sharded, refuse_alone, refuse_masters
from lowmem.training.searched import Searched
from lowmem.training.zeroth.scales import admitted
from lowmem.training.zeroth.steps import ZerothOrder

if TYPE_CHECKING:
    from lowmem.optim.release import Release
    from lowmem.training.ranks.low_rank_sync import LowRankSync

__all__ = ["LowMemMixin", "LowMemSFTTrainer", "LowMemTrainer", "hf_optimizer"]  # noqa: F822 (made on first use)


class LowMemMixin(ZerothOrder, WholeCheckpoints, Sharded, Searched):
    """What a Hugging Face trainer needs to run any strategy; mix in before the trainer."""

    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        refuse_foreign(kwargs)
        refuse_alone(kwargs.get("args", args[1] if len(args) > 1 else None))
        with admitted(*args, **kwargs):
            super().__init__(*args, **kwargs)
        if not isinstance(self.args, LowMemFields):
            kind, given = type(self).__name__, type(self.args).__name__
            raise UserError(f"{kind} takes LowMemArguments or LowMemSFTConfig (or its like), not {given}")
        self._release: Release | None = None
        self._sync: LowRankSync | None = None
        self._told_state = False
        self._projected_norm: float | None = None
        self._steps: int | None = None
        self._interruption = Interruption()
        self._divergence = Divergence(self.args.nonfinite_limit)
        self._read_arguments()
        freezing = freezing_of(self.model, differentiates=self._strategy.source.needs_autograd)
        for callback in (self._interruption, self._divergence, *([freezing] if freezing else [])):
            self.add_callback(callback)  # type: ignore[attr-defined]

    # ---- the optimizer ----

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the strategy's optimizer with the arguments' lr, betas, eps, weight decay and decay groups."""
        if self.optimizer is None:
            args = self.args
            owner = self.model if model is None else model
            refuse_half(owner, args.fp16)
            if self.is_fsdp_enabled:
                refuse_masters(owner, self.accelerator)
            self.optimizer = make_optimizer(
                owner,
                self._strategy,
                lr=args.learning_rate,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
                weight_decay=args.weight_decay,
                seed=args.seed,
                compile=args.compile,
                steps=self._steps,
                offload_state=args.offload_state,
                decay_names=self.get_decay_parameter_names(owner),  # type: ignore[attr-defined]
            )
        return cast(torch.optim.Optimizer, self.optimizer)

    @property
    def lowmem_optimizer(self) -> LowMemOptimizer:
        """The optimizer itself, out of accelerate's wrapper."""
        return cast(LowMemOptimizer, getattr(self.optimizer, "optimizer", self.optimizer))

    # ---- one step ----

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Differentiate one micro-batch, or where the strategy takes no gradients, evaluate the window."""
        last = bool(self.accelerator.sync_gradients)
        if not self._strategy.source.needs_autograd:
            return self._divergence.see(self._probe(model, inputs, num_items_in_batch, last))
        if self._release is not None:
            self._release.sync = last
        with own_name(self.args), self._wide():
            tell_curvature(self, model, inputs)
            loss = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.lowmem_optimizer.add_loss(loss)
        return self._divergence.see(loss)

    def _wide(self) -> AbstractContextManager[Any]:
        args = self.args
        return wide(self.model, torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None)

    def compute_loss_context_manager(self) -> Any:
        """The Trainer's own, and products in fp32 where the processor has none of 16 bits."""
        stack = ExitStack()
        stack.enter_context(super().compute_loss_context_manager())  # type: ignore[misc]
        stack.enter_context(self._wide())
        return stack

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip all gradients together where that is the policy."""
        if self._clip == "global":
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return None

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm of the gradients before clipping; none is logged where it is not known.

        Without gradients there is none; of gradients of which only the projections were kept and
        summed, there is that of the projections, under a name of its own.
        """
        if self._release is not None:
            norm = self._release.grad_norm()
            self._projected_norm = norm if self._release.projected else None
            return None if self._release.projected else norm
        if not self._strategy.source.needs_autograd or self._sync is not None:
            return None
        if grad_norm is None:
            # the stock way clips by infinity, and so multiplies every gradient by NaN where one is not finite
            self.accelerator.unscale_gradients()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            return gathered(torch.nn.utils.get_total_norm(gradients))
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the optimizer's state bytes to the first log of a run, and to every one what went wrong."""
        if "loss" in logs:
            if not self._told_state:
                self._told_state = True
                logs["optimizer_state_bytes"] = self.lowmem_optimizer.state_bytes()
            if self._projected_norm is not None:
                logs["projected_grad_norm"] = self._projected_norm
            if self._sync is not None:
                logs["gradient_bytes_sent"] = self._sync.last
            if skipped := self.nonfinite():
                logs["nonfinite_elements"] = skipped
        super().log(logs, start_time)  # type: ignore[misc]

    def _maybe_log_save_evaluate(self, tr_loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Begin a new sum after each log; the Trainer subtracts it from itself, and NaN - NaN is not 0."""
        super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)  # type: ignore[misc]
        if cast(Any, self)._globalstep_last_logged == self.state.global_step:
            tr_loss.zero_()

    # ---- the run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, resuming where asked; Ctrl-C leaves a checkpoint.

        Args:
            resume_from_checkpoint: True for the newest whole one in the output folder, or a path.
            **kwargs: the Trainer's own.

        Raises:
            CheckpointError: none is whole, it belongs to another strategy or model, or a setting
                differs that cannot be changed on the way.
            UserError: the loss was not finite for `nonfinite_limit` steps in a row.
            KeyboardInterrupt: after the step during which Ctrl-C was pressed, its checkpoint saved.
        """
        self._told_state, self._window = False, []
        self._divergence.forget()
        try:
            # Several processes would notice the key press at different steps and wait for each other.
            listening = self._interruption.listening() if self.args.world_size == 1 else nullcontext()
            with self._alone(resume_from_checkpoint) as resume, listening:
                result = super().train(resume_from_checkpoint=resume, **kwargs)  # type: ignore[misc]
        finally:
            self._detach()
            self._resumed = None  # the next run is checked anew
        if self._interruption.asked:
            raise KeyboardInterrupt(f"stopped after step {self.state.global_step}")
        return result

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Attach the hooks of gradient release once model and optimizer are what they will be."""
        self._steps = max_steps
        with self._without_wrapper(), self._spreading():
            result = super()._prepare_for_training(max_steps, *args, **kwargs)  # type: ignore[misc]
        if said := late(self.model, self._strategy, self.args.learning_rate, max_steps):
            self.tell(said)
        self._begin_log()
        optimizer = self.lowmem_optimizer
        resting.arrange_(optimizer.roster, self._strategy.rules, optimizer.model)
        if self.args.gradient_sync == "low_rank" and self._sync is None:
            from lowmem.training.ranks.low_rank_sync import low_rank_sync

            self._sync = low_rank_sync(self.model_wrapped, self.lowmem_optimizer)
        if self.args.gradient_release:
            from lowmem.optim.release import release

            self._release = release(
                self.lowmem_optimizer,
                accumulation_steps=self.args.gradient_accumulation_steps,
                clip=self._clip,
                max_norm=0.0 if self._clip == "none" else self.args.max_grad_norm,
            )
        return result

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Take no step more where a checkpoint of the last step was resumed; the Trainer would take one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True  # type: ignore[attr-defined]
            return
        super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _detach(self) -> None:
        self._end_log()
        if self._release is not None:
            self._release.remove()
            self._release = None
        if self.optimizer is not None:
            resting.wake_all_(self.lowmem_optimizer.roster, self.lowmem_optimizer.model)


class LowMemTrainer(LowMemMixin, Trainer):  # type: ignore[misc]
    """transformers.Trainer on any strategy, configured by `LowMemArguments`.

    Example:
        >>> args = LowMemArguments(output_dir="out", optim="galore", optim_args="rank=128")
        >>> LowMemTrainer(model, args, train_dataset=rows).train()  # doctest: +SKIP
    """

    args: LowMemArguments


@functools.cache
def _sft_trainer() -> type[Any]:
    """`LowMemSFTTrainer`, a class made once."""
    sft_trainer: Any = importlib.import_module("trl").SFTTrainer

    class LowMemSFTTrainer(LowMemMixin, sft_trainer):  # type: ignore[misc]
        """trl.SFTTrainer on any strategy, configured by `LowMemSFTConfig`.

        In packed rows each example attends by itself, unless a FlashAttention package does that.
        """

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            model = self.accelerator.unwrap_model(self.model)
            if self.padding_free:
                pack(model, self.compute_loss_context_manager)

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            """The loss over label positions where their logits are few, TRL's tiled loss elsewhere."""
            if return_outputs or not self._counts_labels(inputs):
                # TRL's tiled head reads lm_head.weight past the module, where a probe cannot displace it.
                tiled = self._strategy.source.needs_autograd
                compute = super().compute_loss if tiled else functools.partial(Trainer.compute_loss, self)
                return compute(model, inputs, return_outputs, num_items_in_batch)
            loss = label_loss(model, inputs, num_items_in_batch)
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
            return loss

        def _counts_labels(self, inputs: Any) -> bool:
            stock = self.compute_loss_func or self.label_smoother or self.aux_loss_enabled
            if stock or not self.args.label_loss or self.args.loss_type != "nll" or "shift_labels" in inputs:
                return False
            model = self.accelerator.unwrap_model(self.model)
            if not supports(model):
                return False
            size = model.get_output_embeddings().weight
            few = pays(inputs["labels"], size.shape[0], size.element_size())
            return few or not self._strategy.source.needs_autograd

        def _probe(self, *args: Any) -> Tensor:
            """Probes are training: what TRL measures in them does not belong to the next evaluation."""
            loss: Tensor = super()._probe(*args)
            self._metrics["eval"].clear()
            return loss

        def create_model_card(self, *args: Any, **kwargs: Any) -> None:
            """Write TRL's card only for a model that goes to the Hub; a run's folder has its own report."""
            if self.args.push_to_hub:
                super().create_model_card(*args, **kwargs)

        def _send_telemetry(self) -> None:
            """Tell nobody: TRL would report the run to the Hub."""

    LowMemSFTTrainer.__module__, LowMemSFTTrainer.__qualname__ = __name__, "LowMemSFTTrainer"
    return LowMemSFTTrainer


def __getattr__(name: str) -> Any:
    """Make `LowMemSFTTrainer` when it is first asked for."""
    if name == "LowMemSFTTrainer":
        return _sft_trainer()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
