"""Trainers whose loss is about whole answers: one of several candidates, or a text that is generated.

    LowMemChoiceTrainer    -log softmax(mean log-likelihood of each candidate)[the right one], any strategy
    LowMemAnswerTrainer    minus what an objective says of generated answers, strategies without gradients

With an objective the first one is trained by
what the likeliest candidate is worth. A loss is a sum over rows, divided by the rows of all micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from lowmem.config import RunConfig
from lowmem.console import Console
from lowmem.data.choices import choices
from lowmem.data.fitting import fitting
from lowmem.data.load import Data
from lowmem.errors import UserError
from lowmem.models.choosing import candidate_scores, choice_loss, f1, padded
from lowmem.models.computing.loss import IGNORE
from lowmem.models.computing.wide import wide
from lowmem.training.evaluation import evaluation_batches, greedy
from lowmem.training.ranks.processes import joined
from lowmem.training.trainer import LowMemSFTTrainer
from lowmem.training.zeroth.objectives import Objective, objective, scored

ANSWER = 32
"""Tokens of a generated answer, at most, where nothing is said."""


class Rows:
    """A loss over whole rows; mix in before a trainer."""

    accelerator: Any
    args: Any
    objective: Objective | None

    def _get_num_items_in_batch(self, batch_samples: list[Mapping[str, Any]], device: Any) -> Tensor | None:
        """Rows of a window, those of other processes too; the stock way counts label tokens."""
        if not batch_samples:
            return None
        count = torch.tensor(sum(len(batch["rows"]) for batch in batch_samples), device=device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count).sum()
        return count

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The sum over rows, divided by the rows of the window."""
        total, scores = self._judged(model, inputs)  # type: ignore[attr-defined]
        items = len(inputs["rows"]) if num_items_in_batch is None else num_items_in_batch
        loss = total * (self.args.world_size if num_items_in_batch is not None else 1) / items
        return (loss, {"scores": scores}) if return_outputs else loss

    def worth(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str]) -> list[float]:
        """What the objective says of answers to rows with `prompt` and `answer`."""
        assert self.objective is not None
        asked, right = ([row[key] for row in rows] for key in ("prompt", "answer"))
        return scored(self.objective, asked, completions, right)


class LowMemChoiceTrainer(Rows, LowMemSFTTrainer):  # type: ignore[misc]
    """Learns which of several candidates is right, on any strategy; rows are made by `data.choices`.

    Args:
        objective: with a strategy without gradients, what the likeliest candidate is worth.
    """

    task = "classify"

    def __init__(self, *args: Any, objective: Objective | None = None, **kwargs: Any) -> None:
        self.objective = objective
        super().__init__(*args, data_collator=Candidates(kwargs["processing_class"]), **kwargs)
        self.model_accepts_loss_kwargs = True

    def scores(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """(rows, candidates), -inf where a row has fewer."""
        return padded(candidate_scores(model, inputs), inputs["counts"])

    def _judged(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        scores = self.scores(model, inputs)
        if self.objective is None:
            return choice_loss(scores, inputs["right"]), scores
        return scores.new_tensor(-sum(self._worth(inputs["rows"], scores))), scores

    def _worth(self, rows: Sequence[Mapping[str, Any]], scores: Tensor) -> list[float]:
        chosen = zip(rows, scores.argmax(1).tolist(), strict=True)
        return self.worth(rows, [row["candidates"][place] for row, place in chosen])

    def judge(self, console: Console | None = None) -> dict[str, float]:
        """Loss, accuracy and macro F1 over the evaluation rows; what the objective says, if there is one."""
        found: list[tuple[float, list[int], list[int], list[float]]] = []
        for inputs, counts in evaluation_batches(self, console):
            with self.compute_loss_context_manager():
                scores, right = self.scores(self.model, inputs), inputs["right"]
            worth = self._worth(inputs["rows"], scores) if self.objective else []
            loss = float(choice_loss(scores, right))
            found += [(loss, scores.argmax(1).tolist(), right.tolist(), worth)] if counts else []
        losses, *lists = zip(*joined(found, self.args.world_size), strict=True)
        places, truth, worth = (list(chain(*each)) for each in lists)
        chosen, right = torch.tensor(places), torch.tensor(truth)
        told = {"loss": sum(losses) / len(right), "accuracy": float((chosen == right).float().mean())}
        score = {"score": sum(worth) / len(worth)} if worth else {}
        return {**told, "f1": f1(chosen, right), **score}


class LowMemAnswerTrainer(Rows, LowMemSFTTrainer):  # type: ignore[misc]
    """Raises what an objective says of greedy answers, on a strategy without gradients.

    Args:
        objective: gets prompts, completions and answers, gives a number for each.
        max_completion: tokens of an answer.
    """

    task = "answer"

    def __init__(self, *args: Any, objective: Objective, max_completion: int = ANSWER, **kwargs: Any) -> None:
        self.objective, self.max_completion = objective, max_completion
        super().__init__(*args, data_collator=Questions(kwargs["processing_class"]), **kwargs)
        self.model_accepts_loss_kwargs = True
        if self._strategy.source.needs_autograd:
            raise UserError("objective: no gradient goes through generated text; use mezo, fzoo or qzo")

    def said(self, model: Any, inputs: Mapping[str, Any]) -> list[str]:
        """Greedy answers to a batch."""
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        with wide(model):
            made = model.generate(
                **asked, **greedy(self.processing_class), max_new_tokens=self.max_completion
            )
        new = made[:, asked["input_ids"].shape[1] :]
        texts = self.processing_class.batch_decode(new, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _judged(self, model: Any, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        worth = torch.tensor(self.worth(inputs["rows"], self.said(model, inputs)))
        return -worth.sum(), worth

    def judge(self, console: Console | None = None) -> dict[str, float]:
        """The mean of what the objective says over the evaluation rows."""
        found: list[float] = []
        for inputs, counts in evaluation_batches(self, console):
            worth = self.worth(inputs["rows"], self.said(self.model, inputs))
            found += worth if counts else []
        worth = joined(found, self.args.world_size)
        return {"score": sum(worth) / len(worth)}


def make(
    config: RunConfig,
    args: Any,
    model: Any,
    parts: Sequence[Data],
    tokenizer: Any,
    console: Console,
    **rest: Any,
) -> Any:
    """The trainer of a run with candidates, or with an objective over generated answers.

    Args:
        config, args, model, parts, tokenizer, console, rest: as for `lowmem.training.tasks.make`.

    Raises:
        UserError: no row is left, rows that ask nothing, or no such objective.
    """
    judge = objective(config.objective) if config.objective else None
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if config.task == "classify":
        chosen = [choices(part, tokenizer, config.seq_len, console) for part in parts]
        train, held_out = chosen[0].dataset(), chosen[1].dataset(by_length=True)
        kept: list[Data] = [part.data for part in chosen]
        kind: type[Any] = LowMemChoiceTrainer
        more: dict[str, Any] = {}
    else:
        fitted = [fitting(part, tokenizer, config.seq_len, console) for part in parts]
        train, held_out = (questions(part.examples, tokenizer) for part in fitted)
        kept = [part.data for part in fitted]
        kind, more = LowMemAnswerTrainer, {"max_completion": config.max_completion or ANSWER}
    rows = {"train_dataset": train, "eval_dataset": held_out}
    trainer: Any = kind(model, args, processing_class=tokenizer, objective=judge, **rows, **more, **rest)
    trainer.data_summary = dict(zip(("train", "held_out"), (part.summary() for part in kept), strict=True))
    return trainer


def questions(examples: Sequence[Any], tokenizer: Any) -> Any:
    """A `datasets.Dataset` of prompts as tokens and as texts, and of the answers that are right.

    Args:
        examples: `lowmem.data.examples.Tokens`; of several answers the first counts.

    Raises:
        UserError: a plain text, which asks nothing.
    """
    from datasets import Dataset

    spans = [example.spans[0] for example in examples]
    if not all(start for start, _ in spans):
        raise UserError("objective: a plain text asks nothing; give rows with prompt and completion")
    ids = [e.ids.tolist() for e in examples]
    asked = [one[:start] for one, (start, _) in zip(ids, spans, strict=True)]
    right = [one[start:stop] for one, (start, stop) in zip(ids, spans, strict=True)]
    texts = [[t.strip() for t in tokenizer.batch_decode(x, skip_special_tokens=True)] for x in (asked, right)]
    return Dataset.from_dict({"input_ids": asked, "prompt": texts[0], "answer": texts[1]})


class Candidates:
    """Rows with candidates as a batch of what has to be read to score them.

    The last token of a text says nothing of itself: it is left out. What is then the same for several
    candidates, as for all of one token, is read once. Padded on the right.

    Args:
        tokenizer: says what pads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What `candidate_scores` takes, candidates of each row (`counts`), `right` places, and `rows`."""
        texts = [list(self._texts(row)) for row in rows]
        sides = [side for row in rows for side in zip(row["input_ids"], row["labels"], strict=True)]
        return {
            **self._read(sides),
            "counts": torch.tensor([len(row["input_ids"]) for row in rows]),
            "right": torch.tensor([row["right"] for row in rows]),
            "rows": [
                {"prompt": asked, "candidates": said, "answer": said[row["right"]]}
                for row, (asked, *said) in zip(rows, texts, strict=True)
            ],
        }

    def _read(self, sides: Sequence[tuple[Sequence[int], Sequence[int]]]) -> dict[str, Tensor]:
        """Sequences, the places of them that are kept, and what is read there; of (tokens, labels)."""
        found: dict[tuple[int, ...], int] = {}
        starts = [found.setdefault(tuple(ids[:-1]), len(found)) for ids, _ in sides]
        said = [[i for i, label in enumerate(labels) if label != IGNORE] for _, labels in sides]
        reads = [
            (start, i - 1, ids[i], side)
            for side, ((ids, _), start, places) in enumerate(zip(sides, starts, said, strict=True))
            for i in places
        ]
        kept = {at: k for k, at in enumerate(sorted({(start, place) for start, place, *_ in reads}))}
        keep = _filled([[False] * len(ids) for ids in found], False)
        keep[tuple(torch.tensor(list(kept)).T)] = True
        means = torch.zeros(len(sides), len(reads))
        for k, (*_, side) in enumerate(reads):
            means[side, k] = 1 / len(said[side])
        return {
            "input_ids": _filled(list(found), self.tokenizer.pad_token_id),
            "attention_mask": _filled([[1] * len(ids) for ids in found], 0),
            "keep": keep,
            "reads": torch.tensor([(kept[start, place], token) for start, place, token, _ in reads]).T,
            "means": means,
        }

    def _texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        """The prompt and the candidates of a row."""
        first = next(i for i, label in enumerate(row["labels"][0]) if label != IGNORE)
        said = [[label for label in labels if label != IGNORE] for labels in row["labels"]]
        for one in (row["input_ids"][0][:first], *said):
            yield self.tokenizer.decode(one, skip_special_tokens=True).strip()


class Questions:
    """Prompts as a batch, padded on the left.

    Args:
        tokenizer: says what pads.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`input_ids`, `attention_mask`, and the `rows` with `prompt` and `answer`."""
        ids = [row["input_ids"][::-1] for row in rows]
        return {
            "input_ids": _filled(ids, self.tokenizer.pad_token_id).flip(1),
            "attention_mask": _filled([[1] * len(one) for one in ids], 0).flip(1),
            "rows": [{key: row[key] for key in ("prompt", "answer")} for row in rows],
        }


def _filled(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """One tensor of rows of different lengths."""
    tensors = [torch.tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
