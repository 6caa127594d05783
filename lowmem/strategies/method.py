"""A method: a named point of the space, as a record of parts and defaults.

    register(Method("galore", DOC, paper="2403.03507", projector="power", rule="adam", rank=128, scale=0.25))

`projector`, `rule`, `residual`, `modifiers`, `schedule`, `source` and `writer` are the
axes: which part is taken of each kind. `embedding`, `head` and `vector` are rules of
their own for tensors of that role, `other` for all three. All else is an option of a chosen part, or of the
frame. A method says where it differs from `NEUTRAL`; a user may change everything.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lowmem.optim.strategy import Plain

NONE = "none"
"""The word for no projector and no modifiers."""

AXES = {
    "projector": NONE,
    "rule": "",
    "residual": "drop",
    "modifiers": NONE,
    "schedule": "always",
    "source": "backprop",
    "writer": "stochastic",
}
"""The axes, and the choice on each that leaves an ordinary optimizer; a method always names its rule."""

ROLES = ("other", "embedding", "head", "vector")
"""Tensors that may follow a rule of their own; "other" is all that is not a matrix."""


@dataclass(frozen=True)
class Advice:
    """What a source takes.

    Args:
        purpose: fine-tuning or pre-training; source: whose values these are, for which models.
        values: lr, betas, eps and weight_decay, and options of the method; where it is silent, defaults.

    Example:
        >>> print(Advice("fine-tuning", "paper", {"lr": 1e-4, "rank": 4}))
        lr=0.0001, rank=4
    """

    purpose: str
    source: str
    values: Mapping[str, Any]

    def __str__(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.values.items())


class Method:
    """A record of parts and defaults.

    Args:
        name: as `create` takes it.
        doc: the equation, the bytes for an (m, n) weight, the limits; its first line is the summary.
        paper: arXiv id.
        recommended: what its authors take, where that is known.
        defaults: a word for each axis that is not neutral, `rule` among them, and options.

    Raises:
        ValueError: no rule, or no summary.

    Example:
        >>> Method("mine", "Descent with momentum.", paper="1412.6980", rule="adam").summary
        'Descent with momentum.'
    """

    def __init__(
        self, name: str, doc: str, *, paper: str, recommended: Sequence[Advice] = (), **defaults: Plain
    ) -> None:
        self.name, self.doc, self.paper = name, inspect.cleandoc(doc), paper
        self.summary = self.doc.split("\n", 1)[0]
        self.module, self.recommended = "", tuple(recommended)
        self.defaults: Mapping[str, Plain] = defaults
        if "rule" not in defaults or not self.summary:
            raise ValueError(f"method {name!r} needs a rule, and a line that says what it is")

    def word(self, axis: str, given: Mapping[str, Any]) -> Any:
        """The choice on an axis: the user's, the method's, or the neutral one."""
        return given.get(axis, self.defaults.get(axis, AXES.get(axis, "")))

    @property
    def family(self) -> str:
        """What its module says it holds: the first words of the docstring, up to a colon or full stop."""
        doc = inspect.getdoc(sys.modules.get(self.module)) or self.module
        return re.split(r"[:.\n]", doc, maxsplit=1)[0]

    def __repr__(self) -> str:
        return f"Method({self.name!r})"


_METHODS: dict[str, Method] = {}


def register(method: Method) -> Method:
    """Make a method known by its name; it belongs to the family of the module that calls this.

    Raises:
        ValueError: a name that exists.
    """
    if method.name in _METHODS:
        raise ValueError(f"strategy {method.name!r} is registered twice; rename one of them")
    method.module = sys._getframe(1).f_globals["__name__"]
    _METHODS[method.name] = method
    return method


def methods() -> dict[str, Method]:
    """Every registered method by name, sorted; those of modules that are not imported yet are missing."""
    return dict(sorted(_METHODS.items()))
