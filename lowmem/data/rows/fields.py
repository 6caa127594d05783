"""A row, or a message of a row, that notes which of its fields were read; what was not read can be named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lowmem.texts import parse_json

EMPTY: tuple[Any, ...] = (None, "", [], {})


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place turns it into a UserError."""


class Fields(Mapping[str, Any]):
    """A row that notes which of its fields are read.

    Args:
        row: the raw row; kept as `raw`, where looking does not count as reading.

    Attributes:
        why: why nothing is made from it, in words that follow on a number of rows; "" where it is empty.

    Example:
        >>> fields = Fields({"question": "Where?", "id": 7})
        >>> fields["question"], fields.unread()
        ('Where?', ['id'])
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.raw = row
        self._read: set[str] = set()
        self._inner: dict[str, None] = {}
        self.why = ""

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self.raw[key]

    def __contains__(self, key: object) -> bool:
        return key in self.raw  # the inherited one would read the field

    def __iter__(self) -> Iterator[str]:
        return iter(self.raw)

    def __len__(self) -> int:
        return len(self.raw)

    def extra(self, *keys: str) -> str:
        """The first of these fields that holds a text; "" without one, and then none counts as read."""
        for key in keys:
            value = self.raw.get(key)
            if isinstance(value, str) and value.strip():
                self._read.add(key)
                return value
        return ""

    def first(self, *keys: str) -> Any:
        """The first of these fields that is not null, None without one."""
        key = next((key for key in keys if self.raw.get(key) is not None), None)
        return None if key is None else self[key]

    def leave(self, key: str, inner: Iterator[str] | list[str]) -> None:
        """Note fields of what stands in field `key` that were not read."""
        self._inner |= dict.fromkeys(f"{key}.{name}" for name in inner)

    def note(self, words: str) -> None:
        """Note, in words, what is left out that is no field."""
        self._inner[words] = None

    def was_read(self, key: str) -> bool:
        """Whether a field has been read."""
        return key in self._read

    def unread(self) -> list[str]:
        """Fields that hold something and were not read, those of messages after them."""
        own = [key for key, value in self.raw.items() if key not in self._read and value not in EMPTY]
        return [*own, *self._inner]


def parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is.

    Raises:
        RowError: a text that is no JSON.
    """
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise RowError(f"it is no JSON: {str(error)[:100]}") from error
