"""What an answer is worth, as a number that needs no gradient.

    accuracy    1 where answer and reference are the same words, else 0
    f1          2 c / (a + b) for c words in common of a and b (SQuAD's, arXiv 1606.05250)

Words are lower-cased, without punctuation and articles. A function of the user gets `prompts`,
`completions` and `answers` (what the data says) as lists of texts and gives one number for each; the
loss of a batch is minus their mean.
"""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from lowmem import outside
from lowmem.errors import UserError

Objective = Callable[..., Sequence[float]]

ARTICLES = {"a", "an", "the"}


def accuracy(completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float]:
    """1 where the words are the reference's, in its order.

    Example:
        >>> accuracy(["The cat.", "dog"], ["cat", "cat"])
        [1.0, 0.0]
    """
    return [float(words(a) == words(b)) for a, b in zip(completions, answers, strict=True)]


def f1(completions: Sequence[str], answers: Sequence[str], **_: Any) -> list[float]:
    """Harmonic mean of precision and recall of the reference's words.

    Example:
        >>> f1(["a black cat", "dog"], ["cat", "cat"])
        [0.6666666666666666, 0.0]
    """
    return [_overlap(words(a), words(b)) for a, b in zip(completions, answers, strict=True)]


BUILT_IN: dict[str, Objective] = {"accuracy": accuracy, "f1": f1}


def objective(name: str) -> Objective:
    """An objective by its name, or the user's function as `module:function` or `file.py:function`.

    Raises:
        UserError: no such function.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if ":" not in name:
        known = ", ".join(BUILT_IN)
        raise UserError(f"objective: {name!r} is none of {known}, nor of the form module:function")
    return outside.function(name, "objective")


def unknown(name: str) -> str:
    """What is wrong with a name, "" where it names an objective."""
    try:
        objective(name)
    except UserError as error:
        return str(error)
    return ""


def scored(
    judge: Objective, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str]
) -> list[float]:
    """What answers are worth.

    Raises:
        UserError: the objective does not give a number for each.
    """
    found = judge(prompts=prompts, completions=completions, answers=answers)
    try:
        values = [float(x) for x in found]
    except (TypeError, ValueError):
        values = []
    if len(values) != len(completions) or not all(map(math.isfinite, values)):
        raise UserError(
            f"objective: one number for each of {len(completions)} answers is needed, got {found!r}"
        )
    return values


def words(text: str) -> list[str]:
    """Of a text, as they are compared."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in plain.split() if word not in ARTICLES]


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    if not (a and b):
        return float(a == b)
    common = sum((Counter(a) & Counter(b)).values())
    return 2 * common / (len(a) + len(b))
