"""What leaves a message, or a whole row, out of the loss.

    {"role": "assistant", ..., "weight": 0}    an answer that is context only; so do `train: false` and others
    {"question": ..., "answer": ..., "weight": 0}    a row that is not learned at all

A message that asks for half a weight is refused: it would be learned in full. Of a row such
a number is only named, as it may say anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowmem.data.rows.fields import Fields, RowError

SWITCHES = ("weight", "train", "training", "trainable", "train_on_turn", "loss", "loss_weight")
PARTIAL = ("train_detail", "training_detail", "loss_mask", "mask", "masked")
OF_ROWS = (
    "weight",
    "train",
    "training",
    "trainable",
    "loss_weight",
)  # a row's loss may be what it cost before
_WORDS = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}


def counts(fields: Fields, role: str) -> bool:
    """Whether a message's own switches leave it in the loss; what they say of no answer stays unread.

    Args:
        fields: the message.
        role: whose it is.

    Raises:
        RowError: a switch that says neither yes nor no.

    Example:
        >>> counts(Fields({"content": "4", "weight": 0}), "assistant")
        False
    """
    counted = True
    for name in SWITCHES:
        value = fields.raw.get(name)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(f"has {name} {value!r}: give 1 (counts in the loss) or 0 (context only)")
        if role == "assistant" or not value:
            counted = counted and bool(fields[name])
    for name in PARTIAL:
        if fields.raw.get(name) is not None:
            raise RowError(
                f"has {name!r}, which is not understood: write train: false for what is context only"
            )
    return counted


def of_row(row: Mapping[str, Any]) -> dict[str, bool]:
    """What a row's own switches say, by name; in a table they are texts.

    Example:
        >>> of_row({"text": "a", "weight": "0", "train": 1, "loss": 0})
        {'weight': False, 'train': True}
    """
    said = {name: _WORDS.get(str(row[name]).strip().lower()) for name in OF_ROWS if name in row}
    return {name: value for name, value in said.items() if value is not None}
