"""What a model has learned: the loss on held-out rows, and answers to prompts.

    held-out loss = sum over label tokens of -log p(token) / label tokens

in nats per token. The Trainer's own evaluation averages over batches, so that it
depends on how rows fall into batches; this one does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lowmem.console import Console
from lowmem.errors import UserError
from lowmem.models.computing.loss import IGNORE
from lowmem.models.computing.wide import wide
from lowmem.models.positions import room
from lowmem.training.ranks.processes import own_batches, summed

_SHOWN = {  # what TRL's evaluations call it -> here
    "eval_loss": "loss",
    "eval_reward": "reward",
    "eval_rewards/accuracies": "accuracy",
    "eval_accuracy": "accuracy",
}


def held_out(trainer: Any, console: Console | None = None) -> dict[str, float]:
    """What the evaluation rows say: the loss; of preferences also the share ranked right.

    Of candidates also accuracy and F1, of an objective its score. Of reinforcement, whose loss says
    nothing, the mean reward.

    Args:
        trainer: of any task.
        console: as for `held_out_loss`.
    """
    task = getattr(trainer, "task", "sft")
    if task == "sft":
        return {"loss": held_out_loss(trainer, console)}
    if hasattr(trainer, "judge"):
        judged: dict[str, float] = trainer.judge(console)
        return judged
    due = trainer.control.should_log
    metrics = trainer.evaluate()
    trainer.control.should_log = due  # any log ends with False: the step's own loss would not be logged
    found = {short: float(metrics[name]) for name, short in _SHOWN.items() if name in metrics}
    if task == "grpo":
        found.pop("loss", None)
    return found


def held_out_loss(trainer: Any, console: Console | None = None) -> float:
    """Mean loss per label token over a trainer's evaluation rows, without dropout.

    Args:
        trainer: one whose `compute_loss` divides by `num_items_in_batch`; its processes share the rows.
        console: told after each batch.
    """
    whole, tokens, scaled = 0.0, 0, 1
    if trainer.args.average_tokens_across_devices:
        scaled = trainer.args.world_size
    for inputs, counts in evaluation_batches(trainer, console):
        with trainer.compute_loss_context_manager():
            loss = float(trainer.compute_loss(trainer.model, inputs, num_items_in_batch=1)) / scaled
        whole += loss if counts else 0.0
        tokens += int((inputs["labels"][..., 1:] != IGNORE).sum()) if counts else 0
    total, items = summed(trainer, whole, tokens)
    return total / max(items, 1)


def refuse_ruined(model: Any, name: str, loss: float | None) -> None:
    """Refuse a base whose loss is not finite before anything has been trained.

    Args:
        model: the base; name: as it was given; loss: on the held-out rows, None of a task that has none.

    Raises:
        UserError: with the tensors that are damaged, or the dtype that may be too narrow.
    """
    if loss is None or math.isfinite(loss):
        return
    held = [(n, p.detach()) for n, p in model.named_parameters() if p.is_floating_point()]
    ruined = [n for n, x in held if not bool(torch.isfinite(x).all())]
    if ruined:
        raise UserError(
            f"{name}: {len(ruined)} of its tensors hold numbers that are not finite (first {ruined[0]}): the "
            "weights are damaged, get them anew"
        )
    raise UserError(
        f"{name}: its loss is {loss} before any step, with weights that are finite: {model.dtype} may be too "
        "narrow for it; give --dtype bfloat16 or float32"
    )


def evaluation_batches(trainer: Any, console: Console | None = None) -> Iterator[tuple[dict[str, Any], bool]]:
    """This process's evaluation rows in batches, and whether each counts, for one may be another's.

    Meanwhile there is no dropout, no graph, and nothing for TRL to log later.

    Args:
        trainer: with evaluation rows; console: told after each batch.
    """
    trainer.shard()
    try:
        with measuring(trainer):
            for count, (batch, counts) in enumerate(own_batches(trainer), start=1):
                yield trainer._prepare_inputs(batch), counts
                if console is not None:
                    console.advance(count, {})
    finally:
        trainer.reshard()
        getattr(trainer, "_metrics", {"eval": {}})["eval"].clear()


@contextmanager
def measuring(trainer: Any) -> Iterator[None]:
    """The model as it would be saved for use now, without dropout and gradients; afterwards as it was.

    Args:
        trainer: of any task, before, during or after training.
    """
    model, was = trainer.model, trainer.model.training
    model.eval()
    try:
        with trainer.evaluated(), torch.no_grad():
            yield
    finally:
        model.train(was)


class HeldOut(TrainerCallback):
    """Evaluates during training, and keeps or stops by what it finds.

    Args:
        trainer: whose evaluation rows are used.
        every: steps between evaluations.
        patience: evaluations without a better one after which training ends; None never.
        keep: save a checkpoint at each best evaluation, which no later one pushes out.
    """

    def __init__(self, trainer: Any, every: int, patience: int | None = None, keep: bool = False) -> None:
        self.trainer, self.every, self.patience, self.keep = trainer, every, patience, keep

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Evaluate at every multiple of `every`; the last step is evaluated after training."""
        last = state.global_step >= state.max_steps
        if not (state.global_step % self.every == 0 and not last) and not (last and self.keep):
            return
        due = self.trainer.control.should_log
        found = held_out(self.trainer)
        if getattr(self.trainer, "task", "sft") == "sft" or hasattr(self.trainer, "judge"):
            self.trainer.log(
                {f"eval_{name}": value for name, value in found.items()}
            )  # others have logged it
        # Any log ends with should_log = False: without this the training loss of the step is not logged.
        self.trainer.control.should_log = due
        if self.keep or self.patience:
            raised = found.get("score", found.get("reward"))
            self._judge(found["loss"] if raised is None else -raised, state, control)

    def _judge(self, value: float, state: TrainerState, control: TrainerControl) -> None:
        """Lower is better; the best one is noted where the Trainer looks for it."""
        if math.isfinite(value) and (state.best_metric is None or value < state.best_metric):
            state.best_metric, state.best_global_step = value, state.global_step
            control.should_save = control.should_save or self.keep
        waited = (state.global_step - (state.best_global_step or 0)) // self.every
        if self.patience and waited >= self.patience:
            control.should_training_stop = True


def go_back_to_best(trainer: Any) -> str | None:
    """Load the weights of the best checkpoint of a run; its name, None where they are the present ones."""
    best = trainer.state.best_model_checkpoint
    if best is None or trainer.state.best_global_step == trainer.state.global_step:
        return None
    trainer._load_best_model()
    trainer.cut_log(trainer.state.best_global_step)
    return Path(best).name


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: int = 32,
    tell: Callable[[str], None] | None = None,
) -> list[str]:
    """Greedy answers to prompts, generated side by side.

    Args:
        model: its mode and its generation settings are left as they were.
        tokenizer: its chat template is used if there is one.
        prompts: one user message each, or the beginning of a text.
        max_new_tokens: longest answer.
        tell: told where the model has no positions for as many.

    Raises:
        UserError: a prompt that leaves no position for an answer.
    """
    if not prompts:
        return []
    was = model.training
    model.eval()
    inputs = _asked(tokenizer, prompts).to(model.device)
    try:
        most = room(model, inputs["input_ids"].shape[1], max_new_tokens)
        if tell is not None and most < max_new_tokens:
            tell(f"prompt: answers have at most {most} tokens, after the longest there are no more positions")
        return _answers(model, tokenizer, inputs, most)
    finally:
        model.train(was)


def _answers(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int) -> list[str]:
    with torch.no_grad(), wide(model):
        output = model.generate(**inputs, **greedy(tokenizer), max_new_tokens=max_new_tokens)
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [" ".join(text.split()) for text in texts]


def greedy(tokenizer: Any) -> dict[str, Any]:
    """Settings of `generate` for the likeliest token each time.

    The model's own sampling settings are unset, or transformers warns that greedy search ignores them.
    """
    off = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {**off, "use_cache": True, "pad_token_id": tokenizer.pad_token_id}


def _asked(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """Prompts as the model was trained on them: as messages, or as plain text without a chat template."""
    left = {"padding": True, "padding_side": "left"}  # what is generated follows the prompt without a gap
    if not tokenizer.chat_template:
        return tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False, **left)
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
        return_tensors="pt",
        return_dict=True,
    )
