"""A Trainer whose model accelerate spreads over ranks by FSDP2.

    torchrun --nproc-per-node 8 train.py          with LowMemArguments(fsdp=True, ...)
    accelerate launch --use_fsdp --fsdp_version 2 train.py

accelerate shards a model together with its optimizer, so one is made with the other, also where an
evaluation comes before training. What it would do without a word is refused: shard nothing, flatten
parameters, or keep float32 copies of weights that are trained in bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowmem import several
from lowmem.errors import CheckpointError, ConfigError, UserError
from lowmem.models import sealed
from lowmem.optim.optimizer import LowMemOptimizer
from lowmem.optim.shards import shard_of
from lowmem.optim.tensors.marks import mark_, trains
from lowmem.training.folder import forms

IGNORED = ("MULTI_CPU",)
"""Kinds of processes between which accelerate does not shard, whatever is asked for."""


def of_arguments(args: Any) -> list[str]:
    """Problems of the Trainer's `fsdp` arguments, one sentence each.

    Args:
        args: training arguments, as they were given.
    """
    if not args.fsdp:
        return []
    return several.of_arguments(args, _config(args.fsdp_config))


def of_run(trainer: Any) -> list[str]:
    """What became of the request to shard: problems that only the running processes know.

    Args:
        trainer: a Hugging Face trainer, made.
    """
    args, state = trainer.args, trainer.accelerator.state
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if not trainer.is_fsdp_enabled:
        kind = getattr(state.distributed_type, "value", state.distributed_type)
        made = several.unsharded(f"here it made {kind} of {args.world_size}, each with the whole model")
        return [made] if args.fsdp or launched else []
    version = state.fsdp_plugin.fsdp_version
    return [f"fsdp_version: {several.flattens(version)}"] if version != 2 else []


def refuse_alone(args: Any) -> None:
    """Refuse to shard over one process.

    Args:
        args: training arguments, or what else a trainer was given for them.
    """
    if getattr(args, "fsdp", None) and args.world_size < 2:
        raise ConfigError([several.ALONE])


def of_processes(*, cuda: bool) -> list[str]:
    """What is known of a request to shard before any process has met another, and before a model loads.

    Args:
        cuda: whether there is a card.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return [several.ALONE]
    return [] if cuda or "MULTI_CPU" not in IGNORED else [several.unsharded("and there is none here")]


def _config(given: Any) -> dict[str, Any]:
    """The Trainer's `fsdp_config`, a mapping or the name of a file, without its old prefix."""
    if isinstance(given, str):
        try:
            given = json.loads(Path(given).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"fsdp_config: cannot read {given!r}: {error}") from error
    found: Mapping[str, Any] = given or {}
    return {name.removeprefix("fsdp_"): value for name, value in found.items()}


def refuse_masters(model: nn.Module, accelerator: Any) -> None:
    """Refuse what accelerate would do without a word: train float32 copies of weights that it shards.

    Raises:
        UserError: naming the first such tensor, the bytes, and the ways out.
    """
    short = [(n, p) for n, p in model.named_parameters() if trains(p) and p.dtype != torch.float32]
    if not short or accelerator.mixed_precision == "no":
        return
    (name, first), count = short[0], sum(p.numel() for _, p in short)
    dtype, kind = str(first.dtype).removeprefix("torch."), accelerator.mixed_precision
    more = count * (4 - first.element_size()) // accelerator.num_processes
    raise UserError(
        f"{kind}: {name} is trained in {dtype}, under fsdp {kind}=True would train float32 copies of such "
        f"weights: {more:,} bytes more on each of {accelerator.num_processes} ranks, as much of gradients; "
        f"leave {kind} out and the weights stay {dtype}, or load the model in float32"
    )


def _take_over(optimizer: LowMemOptimizer) -> None:
    """Let the tensors that accelerate put in an optimizer be what those before them were.

    Raises:
        UserError: one is not sharded, so that each rank would train its own.
    """
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if shard_of(p) is None:
                raise UserError(
                    f"fsdp: {name} is trained and not sharded: ranks would not share its gradient; take "
                    "its module out of ignored_modules, or freeze it"
                )
            if not p.requires_grad:  # only those that a schedule put aside are in a group without
                mark_(p)


class Sharded:
    """What a Hugging Face trainer needs where FSDP2 spreads its weights; mix in before it."""

    args: Any
    model: Any
    model_wrapped: Any
    optimizer: Any
    lowmem_optimizer: Any
    accelerator: Any
    is_fsdp_enabled: bool
    train_dataset: Any
    planned_steps: Callable[[], int]
    _steps: int | None

    def shard(self) -> None:
        """Spread model and optimizer now, where that is wanted and has not happened: before an evaluation."""
        if not self.is_fsdp_enabled or self._is_spread():
            return
        if self._steps is None and self.train_dataset is not None:
            self._steps = self.planned_steps()  # it decides what is compiled
        self.create_optimizer()  # type: ignore[attr-defined]
        model, self.optimizer = self._prepared(self.model, self.optimizer)
        self.model = self.model_wrapped = model
        if hasattr(model, "generate"):
            from torch.distributed.fsdp import register_fsdp_forward_method

            register_fsdp_forward_method(model, "generate")

    def reshard(self) -> None:
        """Let go of what a forward pass without a backward pass has left gathered: the last layers."""
        for module in self.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()

    def _is_spread(self) -> bool:
        return any(hasattr(p, "device_mesh") for p in self.model.parameters())

    @contextmanager
    def _spreading(self) -> Iterator[None]:
        """Meanwhile the Trainer gets model and optimizer sharded, and what is sharded as it is."""
        if not self.is_fsdp_enabled:
            yield
            return
        self.accelerator.prepare = self._prepared
        try:
            yield
        finally:
            del self.accelerator.prepare

    def _prepared(self, model: Any, optimizer: Any) -> tuple[Any, Any]:
        accelerator = self.accelerator
        if self._is_spread():  # sharded twice, empty shards would be taken for each other
            self.reshard()
            accelerator._models.append(model)
            accelerator._optimizers.append(optimizer)
            return model, optimizer
        model, optimizer = type(accelerator).prepare(accelerator, model, optimizer)
        _take_over(self.lowmem_optimizer)
        return model, optimizer

    def nonfinite(self) -> int:
        """Elements that were not stepped, on all ranks; these ask together."""
        own: int = self.lowmem_optimizer.nonfinite()
        if not self.is_fsdp_enabled:
            return own
        return int(self.accelerator.reduce(torch.tensor(own, device=self.args.device), "sum"))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate what is sharded."""
        self.shard()
        try:
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.reshard()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Leave a model that `from_pretrained` loads, also where checkpoints are sharded."""
        if self._form() != "sharded" or _internal_call:
            super().save_model(output_dir, _internal_call)  # type: ignore[misc]
            return
        whole = self.accelerator.get_state_dict(self.model) if self._is_spread() else None
        self._save(output_dir, state_dict=whole)  # type: ignore[attr-defined]

    def _form(self) -> str:
        """The form of the checkpoints that this run writes."""
        if not self.is_fsdp_enabled:
            return "plain"
        kind = str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return "full" if "FULL_STATE_DICT" in kind else "sharded"

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the weights, whatever the form in which they were saved."""
        folder = Path(resume_from_checkpoint)
        form = forms.form_in(folder) or self._form()
        if form == self._form():
            with forms.reading(folder):
                super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
            return
        if hasattr(self.model, "peft_config"):
            raise CheckpointError(
                f"cannot resume from {folder}: it holds an adapter in the form {form!r}, this run writes "
                f"{self._form()!r}; resume with as many processes and the same fsdp settings"
            )
        forms.load_weights_(folder, form, self.model)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """Load them, whatever the form in which they were saved."""
        form = forms.form_in(Path(folder)) if folder else None
        about = sealed.about(Path(folder)) if folder and form else {}
        if folder and form:
            self.lowmem_optimizer.adopt(about.get("optimizer", ""))
            if self.args.world_size > 1 or form != "plain":
                forms.refuse_misfit(Path(folder), form, self.lowmem_optimizer)
        if not folder or not form or form == self._form() == "plain":
            super()._load_optimizer_and_scheduler(folder)  # type: ignore[misc]
            return
        turn = forms.Turn(*about.get("turn", ()))
        forms.load_optimizer_(Path(folder), form, self.model, self.lowmem_optimizer, turn)
        schedule = torch.load(Path(folder) / "scheduler.pt", weights_only=True)
        self.lr_scheduler.load_state_dict(schedule)  # type: ignore[attr-defined]
