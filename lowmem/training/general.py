"""What a model keeps of what it knew: its loss on general text, and scores of lm-evaluation-harness.

A run can lower the loss on rows like its own and forget the rest. The text is shipped beside the demo data
(passages of many kinds, written for this), so it is in nobody's training rows; the same before and after:

    forgetting = loss on general text after - before, nats per token
"""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

from torch.nn import functional

from lowmem.errors import UserError, first_line
from lowmem.training.evaluation import measuring

LONGEST = 512  # tokens of a passage


def passages() -> list[str]:
    """The general text.

    >>> len(passages()) > 10
    True
    """
    file = resources.files("lowmem.configs") / "data" / "general" / "passages.jsonl"
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def general_loss(trainer: Any) -> float:
    """Mean loss per token of the general text, without dropout.

    Args:
        trainer: whose `model` is a causal language model and whose `processing_class` its tokenizer.
    """
    model, total, count = trainer.model, 0.0, 0
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", None) or LONGEST)
    with measuring(trainer), trainer.compute_loss_context_manager():
        for text in passages():
            ids = trainer.processing_class(text, return_tensors="pt")["input_ids"][:, :longest]
            ids = ids.to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            total += float(functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    return total / count


def scores(trainer: Any, asked: str) -> dict[str, float]:
    """What lm-evaluation-harness says of a model, by task and metric; nothing where nothing is asked.

    Args:
        trainer: as for `general_loss`; asked: "lm_eval:TASK,TASK", by name or YAML file of your own.

    Raises:
        UserError: an unknown task, or one whose data cannot be had.
    """
    if not asked:
        return {}
    tasks = [task.strip() for task in asked.partition(":")[2].split(",") if task.strip()]
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    own = all(
        task.endswith((".yaml", ".yml")) for task in tasks
    )  # else thousands are read, for half a minute
    size = trainer.args.per_device_eval_batch_size
    try:
        with measuring(trainer):
            model = HFLM(
                pretrained=trainer.accelerator.unwrap_model(trainer.model),
                tokenizer=trainer.processing_class,
                batch_size=size,
            )
            known = TaskManager(include_defaults=not own)
            found = simple_evaluate(
                model, tasks=tasks, task_manager=known, bootstrap_iters=0, log_samples=False
            )
    except Exception as error:  # the harness's, or that of the place where a task's data lies
        raise UserError(f"eval: lm_eval fails on {', '.join(tasks)}: {first_line(error)}") from error
    return {
        f"{task} {metric.removesuffix(',none')}": float(value)
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, (int, float)) and "stderr" not in metric and metric != "sample_len"
    }
