"""TRL's own losses, called on a model and a batch without numbers.

A trainer is stood in for by an object of its class that was never initialised: it holds the defaults of its
configuration and an accelerator of one process. What a loss does by the values of its tensors (how many
tokens belong to an answer, which rows are chosen, the metrics it logs) is answered by the largest case.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowmem.memory.run import Run
from lowmem.memory.trace.tasks.generation import tokens_of_answer
from lowmem.memory.trace.tasks.kinds import PLANNED


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers what depends on values by the largest case: every element is chosen, every number is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if func is aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype == torch.bool:
            x, mask = args[0], args[1][0]
            return x.new_empty((mask.numel(), *x.shape[mask.ndim :]))
        return func(*args, **(kwargs or {}))


def batch(run: Run) -> dict[str, Tensor]:
    """What the collator of a run's task makes: rows of full length, each token part of an answer.

    Args:
        run: batch_size rows of the data, seq_len tokens each.
    """
    rows = PLANNED[run.task].rows * run.batch_size
    return _MADE[run.task](run, torch.zeros((rows, run.seq_len), dtype=torch.long))


def _pairs(run: Run, ids: Tensor) -> dict[str, Tensor]:
    reference = torch.zeros(run.batch_size)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "completion_mask": torch.ones_like(ids),
        "ref_chosen_logps": reference,
        "ref_rejected_logps": reference.clone(),
    }


def _sides(run: Run, ids: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        mine = ids[: run.batch_size].clone()
        found |= {f"{side}_input_ids": mine, f"{side}_labels": mine.clone()}
        found[f"{side}_attention_mask"] = torch.ones_like(mine)
    return found


def _scored(run: Run, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _judged(run: Run, ids: Tensor) -> dict[str, Tensor]:
    once = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": torch.ones_like(ids)}
    again = {f"KL_{name}": x.clone() for name, x in once.items()}
    reference = torch.zeros(run.batch_size)
    label = torch.ones(run.batch_size, dtype=torch.bool)
    return {**once, **again, "label": label, "ref_logps": reference, "ref_KL_logps": reference.clone()}


def _answered(run: Run, ids: Tensor) -> dict[str, Tensor]:
    """The first part of the answers that grew: of those of all micro-batches, which are held meanwhile."""
    rows = run.batch_size * run.accumulation
    prompts = ids.new_zeros((rows, run.seq_len))
    answers = ids.new_zeros((rows, tokens_of_answer(run)))
    whole = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": answers,
        "completion_mask": torch.ones_like(answers),
        "advantages": torch.zeros(rows),
    }
    part = {name: x[: run.batch_size] for name, x in whole.items()}
    return {**part, "num_items_in_batch": torch.ones(())}


_MADE: Mapping[str, Callable[[Run, Tensor], dict[str, Tensor]]] = {
    "dpo": _pairs,
    "orpo": _sides,
    "reward": _scored,
    "kto": _judged,
    "grpo": _answered,
}


def loss(model: nn.Module, inputs: Mapping[str, Tensor], run: Run) -> Tensor:
    """The loss of the run's task, by TRL's own code.

    Args:
        model: as it is trained; inputs: from `batch`.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        if run.rows == "full":  # a mask of ones alone, of which no attention makes anything
            kwargs.pop("attention_mask", None)
        return model(*args, **kwargs)

    trainer = _stand_in(model, run)
    with Largest():  # type: ignore[no-untyped-call]
        found: Tensor = trainer.compute_loss(called, dict(inputs))
    return found


def _stand_in(model: Any, run: Run) -> Any:
    task = PLANNED[run.task]
    home, stem = task.trainer
    module = importlib.import_module(home)
    given = _defaults(getattr(module, f"{stem}Config"))
    kind: Any = getattr(module, f"{stem}Trainer")
    made = object.__new__(kind)
    config = model.config.get_text_config()
    coefficient = getattr(config, "router_aux_loss_coef", 0.0)
    vars(made).update(given)
    vars(made).update(
        model=model,
        args=SimpleNamespace(**{**given, "steps_per_generation": 1}, device=torch.device("cpu")),
        accelerator=_Alone(),
        aux_loss_enabled=hasattr(config, "output_router_logits") and coefficient != 0.0,
        router_aux_loss_coef=coefficient,
        _metrics={mode: defaultdict(list) for mode in ("train", "eval")},
        _total_train_tokens=0,
        _tp_size=1,
        **(task.renamed or {}),
    )
    return made


def _defaults(config: type[Any]) -> dict[str, Any]:
    """The defaults of a dataclass, without making one: training arguments look for devices."""
    found = {}
    for field in dataclasses.fields(config):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
    return found


class _Alone:
    """What a loss asks an accelerator for, on one device."""

    device = torch.device("cpu")
    num_processes = 1
    is_main_process = False
    autocast = nullcontext

    @staticmethod
    def gather(x: Tensor) -> Tensor:
        return x

    @staticmethod
    def reduce(x: Tensor, reduction: str = "sum") -> Tensor:
        return x

    gather_for_metrics = gather
