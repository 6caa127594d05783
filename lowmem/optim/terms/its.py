"""Attributes that are those of a part within: `uses = its("rule")` is `self.rule.uses`."""

from __future__ import annotations

from typing import Any


class _Its:
    def __init__(self, part: str) -> None:
        self.part = part

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return self if instance is None else getattr(getattr(instance, self.part), self.name)


def its(part: str) -> Any:
    """The attribute of the same name of a part.

    >>> from types import SimpleNamespace
    >>> class Around:
    ...     uses = its("rule")
    ...     rule = SimpleNamespace(uses="betas")
    >>> Around().uses
    'betas'
    """
    return _Its(part)
