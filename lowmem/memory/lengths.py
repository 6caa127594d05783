"""How long the rows of a data set are: what a plan of padded rows, or of texts in packed ones, goes by.

A batch of padded rows is as long as its longest row. The peak of a run is that of the longest batch,
while most batches take less; how much less is what a plan shows beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lowmem.console import Console
from lowmem.errors import UserError


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows of a data set, as they are cut.

    Args:
        rows: how many; typical: the median; longest: the greatest; cut: rows that were longer than seq_len.
    """

    rows: int
    typical: int
    longest: int
    cut: int

    def to_dict(self) -> dict[str, int]:
        """Plain values."""
        return asdict(self)

    def options(self, rows: str) -> dict[str, int]:
        """Options of a run over these rows: padded ones are as long as the longest of them, no longer.

        Raises:
            UserError: full rows, whose length is no matter of the data.
        """
        if rows == "full":
            raise UserError("data: full rows are as long as seq_len; give --rows padded or --rows packed")
        if rows == "packed":
            return {"longest": self.longest}
        return {"seq_len": max(2, self.longest), "typical": max(2, self.typical)}


def lengths(tokens: Sequence[int], seq_len: int) -> Lengths:
    """The lengths of rows of so many tokens, cut at seq_len.

    >>> lengths([10, 30, 20, 90], 64)
    Lengths(rows=4, typical=30, longest=64, cut=1)
    """
    cut = sorted(min(n, seq_len) for n in tokens)
    return Lengths(len(cut), cut[len(cut) // 2], cut[-1], sum(n > seq_len for n in tokens))


def of_data(model: str, data: str, seq_len: int) -> Lengths:
    """The lengths that the rows of a data set have for a model's tokenizer.

    Args:
        model: name, folder or Hub id; its tokenizer is loaded, no weights.
        data: as `lowmem finetune --data` takes it.
        seq_len: where rows are cut.

    Raises:
        UserError: the tokenizer or the data cannot be read.
    """
    from lowmem.data.fitting import fitting
    from lowmem.data.load import ensure_chat_template, load_data
    from lowmem.models.loading import load_tokenizer

    tokenizer: Any = load_tokenizer(model)
    rows = load_data(data)
    if rows.conversational:
        ensure_chat_template(tokenizer)
    found = fitting(rows, tokenizer, seq_len, Console())
    return lengths([len(example.ids) for example in found.examples], seq_len)
