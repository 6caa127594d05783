"""How far a model can count: rows and answers longer than its positions.

Rotary and relative positions go on where training of the base ended, only worse. Learned ones are rows of
a table, and past its end there is nothing to look up: such a row is refused before it is met in the
middle of a run.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lowmem.errors import UserError

OFFSETS = range(5)  # rows before the first position: OPT has two


def longest(config: Any) -> int | None:
    """Longest sequence the model has positions for, None where it does not say."""
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    return None


def learned(model: Any) -> int | None:
    """Longest sequence of a model whose positions are a table that was learned; None for others."""
    most = longest(model.config)
    if most is None:
        return None
    words = model.get_input_embeddings()
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    return most if any(table.num_embeddings - most in OFFSETS for table in tables) else None


def check_fits(model: Any, tokens: int, what: str, *, answer: int = 0) -> None:
    """Refuse rows that reach past a table of positions.

    Args:
        model: its table is looked for.
        tokens: of the longest row; what: is that long, as in "rows".
        answer: tokens that are generated after it.

    Raises:
        UserError: the longest row is longer, with the seq_len that is not.
    """
    most = learned(model)
    if most is None or tokens + answer <= most:
        return
    after = f" and {answer} of an answer" if answer else ""
    least = most - answer
    way = f"give --seq-len {least} or less, where they are cut" if least > 1 else "give a smaller answer"
    raise UserError(f"seq_len: {what} have {tokens} tokens{after}, the model has {most} positions; {way}")


def room(model: Any, prompt: int, wanted: int) -> int:
    """How many of the wanted tokens fit after a prompt.

    Raises:
        UserError: none does.
    """
    most = longest(model.config)
    if prompt == 0 or (most and prompt >= most):
        limit = f" and fewer than {most}" if most else ""
        raise UserError(f"the prompt has {prompt} tokens; it must have at least 1{limit}")
    return min(wanted, most - prompt) if most else wanted
