"""JSON from a stranger: what cannot be read is said in one line, and nothing bursts.

Python's parser leaves through RecursionError where brackets nest a thousand deep, and a number
of 5,000 digits is one that it can neither make nor print. Both are refused here like any
other damage.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import UserError

DEPTH = 100  # brackets within brackets: what walks the values later recurses, too


def parse(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: not JSON, nested deeper than `DEPTH`, or a number beyond any use; says which, in one line.

    Example:
        >>> parse('{"text": "a"}')
        {'text': 'a'}
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def read(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = parse(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object with named fields")
    return value


_TOO_DEEP = f"brackets nest more than {DEPTH} deep"


def _whole(digits: str) -> int:
    if len(digits) > 1000:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _is_deep(value: Any) -> bool:
    """Whether values nest deeper than `DEPTH`; walked level by level, without recursion."""
    level = [value]
    for _ in range(DEPTH):
        level = [inner for outer in level for inner in _inside(outer)]
        if not level:
            return False
    return True


def _inside(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return (one for one in inner if isinstance(one, (dict, list)))
