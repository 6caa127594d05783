"""Rows with several answers of which one is right, as tokens.

    prompt + candidate        for each candidate; what counts are the candidate's tokens

A text ends with its candidate: the token that ends a text is no part of an answer that others follow.
Of messages the chat template decides what ends a turn.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lowmem.console import Console
from lowmem.data.examples import Tokens, common, tokenized
from lowmem.data.fitting import kept_of
from lowmem.data.load import Data
from lowmem.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Choices:
    """Examples ready for scoring.

    Attributes:
        data: the rows they are made from.
        sides: of each row, its candidates as tokens.
    """

    data: Data
    sides: tuple[tuple[Tokens, ...], ...]

    def dataset(self, *, by_length: bool = False) -> Dataset:
        """A `datasets.Dataset`: `input_ids` and `labels` of each candidate, and which is `right`.

        Args:
            by_length: longest first, so that batches of rows that are judged one by one hold little padding.
        """
        from datasets import Dataset

        rows = list(zip(self.sides, (row["label"] for row in self.data.rows), strict=True))
        if by_length:
            rows.sort(key=lambda row: -max(len(side.ids) for side in row[0]))
        return Dataset.from_dict(
            {
                "input_ids": [[side.ids.tolist() for side in sides] for sides, _ in rows],
                "labels": [[side.labels() for side in sides] for sides, _ in rows],
                "right": [right for _, right in rows],
            }
        )


def choices(data: Data, tokenizer: PreTrainedTokenizerBase, seq_len: int, console: Console) -> Choices:
    """The rows all of whose candidates lie within `seq_len` tokens.

    Args:
        data: rows with `prompt`, `candidates` and `label`.
        tokenizer: the one they are trained with.
        seq_len: tokens of a prompt and a candidate together.
        console: told what is left out.

    Raises:
        UserError: no row is left, or a candidate adds no token to its prompt.
    """
    kept, found = list[int](), list[tuple[Tokens, ...]]()
    for i, row in enumerate(data.rows):
        try:
            sides = tuple(_side(row, candidate, tokenizer) for candidate in row["candidates"])
        except UserError as error:
            raise UserError(f"{data.places[i]}: {error}" if data.places else str(error)) from error
        if max(len(side.ids) for side in sides) <= seq_len:
            kept.append(i)
            found.append(sides)
    return Choices(kept_of(data, kept, f"exceed seq_len {seq_len}", console), tuple(found))


def _side(row: Mapping[str, Any], candidate: str, tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """A prompt and one of its candidates."""
    if not isinstance(row["prompt"], str):
        said = [{"role": "assistant", "content": candidate}]
        return tokenized({"prompt": row["prompt"], "completion": said}, tokenizer)[0]
    ids = list(tokenizer(row["prompt"] + candidate)["input_ids"])
    start = common(list(tokenizer(row["prompt"])["input_ids"]), ids)
    if start == len(ids):
        raise UserError(f"candidate {candidate!r} adds no token to its prompt")
    return Tokens(array("i", ids), ((start, len(ids)),))
