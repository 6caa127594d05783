"""Several data sets as one, each seen as often as its weight says.

    chat.jsonl                       as it is
    chat.jsonl + maths.jsonl=2       the rows of the second twice per epoch
    chat.jsonl + maths.jsonl=0.25    a random quarter of the second, the same in every epoch

Held-out rows are taken out of each before, are never weighted, and are not among what is trained on.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowmem.data.load import Data, check_name, load_data
from lowmem.data.lookup import local_path
from lowmem.data.split import disjoint, train_and_held_out
from lowmem.errors import UserError

AND = " + "
MOST = 1000.0


def weights(text: str) -> dict[str, float]:
    """Names of data sets and their weights, 1 where none is given.

    Raises:
        UserError: a weight out of range, or one data set twice.

    Example:
        >>> weights("chat.jsonl + owner/name:config=0.5")
        {'chat.jsonl': 1.0, 'owner/name:config': 0.5}
    """
    found: dict[str, float] = {}
    for part in text.split(AND):
        name, weight = _weighted(part.strip())
        if name in found:
            raise UserError(f"data: {name} is named twice; give it a weight instead, as in {name}=2")
        found[name] = weight
    return found


def check_names(text: str) -> None:
    """As `load.check_name`, of each.

    Raises:
        UserError: nothing of one of the names, or a weight out of range.
    """
    for name in weights(text):
        check_name(name)


def mixed(
    data: str, held_out: str | None = None, *, rows: int = 80, seed: int = 0, **given: Any
) -> tuple[Data, Data]:
    """Rows to train on and rows to evaluate on, as `train_and_held_out`, of one data set or several.

    Args:
        data: names, joined by `AND`, each perhaps with a weight.
        held_out: other data to evaluate on.
        rows: most rows to evaluate on, of all together.
        seed: of the choices.
        **given: for `load_data`.

    Raises:
        UserError: as `load_data`; a weight out of range; texts in one and messages in the other.
    """
    named = weights(data)
    each = math.ceil(rows / len(named))
    first, *others = named
    parts = [train_and_held_out(first, held_out, rows=rows if held_out else each, seed=seed, **given)]
    for name in others:  # held-out data of its own is read once
        alone = train_and_held_out(name, rows=each, seed=seed, **given) if held_out is None else None
        parts.append(alone or (load_data(name, **given), parts[0][1]))
    if len(parts) == 1 and named[first] == 1:
        return parts[0]
    _check_alike([train for train, _ in parts])
    train = _together([_seen(part, named[name], seed) for name, (part, _) in zip(named, parts, strict=True)])
    evaluated = parts[0][1] if held_out else _together([part for _, part in parts])
    return train, disjoint(evaluated, train)


def _weighted(part: str) -> tuple[str, float]:
    if local_path(part) is not None:
        return part, 1.0  # a sign in the name of a folder, even where it looks like a weight
    name, _, text = part.rpartition("=")
    try:
        weight = float(text)
    except ValueError:
        return part, 1.0  # no weight, or a sign in a file's name
    if not name:
        return part, 1.0
    if not 0 < weight <= MOST:
        raise UserError(f"data: the weight of {name} is {text}; use a number above 0, at most {MOST:.0f}")
    return name, weight


def _check_alike(parts: Sequence[Data]) -> None:
    """Refuse texts beside messages: one tokenizer call takes one of them."""
    if len({(part.conversational, "text" in part.rows[0]) for part in parts}) > 1:
        said = ", ".join(f"{part.name} ({part.format})" for part in parts)
        raise UserError(f"data: texts and messages do not mix: {said}; write all rows alike")


def _seen(data: Data, weight: float, seed: int) -> Data:
    """The rows of a data set as often as its weight says."""
    whole, rest = divmod(weight, 1)
    more = random.Random(seed).sample(range(len(data.rows)), round(rest * len(data.rows)))
    indices = [*list(range(len(data.rows))) * int(whole), *sorted(more)]
    if not indices:
        raise UserError(f"data: weight {weight:g} leaves none of the {len(data.rows)} rows of {data.name}")
    return data if weight == 1 else data.only(indices, notes=(*data.notes, f"{data.name} x {weight:g}"))


def _together(parts: Sequence[Data]) -> Data:
    """One data set of several."""
    formats = dict.fromkeys(part.format for part in parts)
    counts = tuple(f"{part.name}: {len(part.rows)}" for part in parts) if len(parts) > 1 else ()
    return replace(
        parts[0],
        name=AND.join(part.name for part in parts),
        format=" and ".join(formats),
        rows=tuple(row for part in parts for row in part.rows),
        places=tuple(place for part in parts for place in part.places),
        skipped=sum(part.skipped for part in parts),
        ignored=tuple(dict.fromkeys(name for part in parts for name in part.ignored)),
        files=tuple(file for part in parts for file in part.files),
        notes=(*counts, *(note for part in parts for note in part.notes)),
    )
