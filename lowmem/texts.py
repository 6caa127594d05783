"""JSON and YAML from a stranger: what cannot be read is said in one line, and nothing bursts.

The parsers leave through RecursionError where brackets nest a thousand deep, a number of
5,000 digits is one that Python can neither make nor print, and ten lines of YAML that
repeat each other ten times stand for ten thousand million values. All are refused here like
any other damage, the last before it is unfolded.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.errors import UserError

DEPTH = 100  # brackets within brackets: what walks the values later recurses, too
_POINTER = b"version https://git-lfs"
NODES, SIZE = 10_000, 2**20  # values and characters of a YAML text: settings are a hundred lines


def parse_json(text: str) -> Any:
    """The value that a JSON text holds.

    Raises:
        ValueError: not JSON, nested deeper than `DEPTH`, or a number beyond any use; says which, in one line.

    Example:
        >>> parse_json('{"text": "a"}')
        {'text': 'a'}
    """
    try:
        value = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > DEPTH and _is_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def read_json(file: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        UserError: it cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        value = parse_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except ValueError as error:
        raise UserError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} holds a {type(value).__name__}, not an object with named fields")
    return value


def is_pointer(file: Path) -> bool:
    """Whether a file is what git has in the place of one that Git LFS keeps elsewhere.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as opened:
        return opened.read(len(_POINTER)) == _POINTER


def parse_yaml(text: str) -> tuple[dict[str, Any], list[str]]:
    """The mapping that a YAML text holds, and its keys as they stand there: repeated ones, too.

    Raises:
        ValueError: not YAML, not a mapping, or more than `NODES` values once all is unfolded.

    Example:
        >>> parse_yaml("lr: 0.1")
        ({'lr': 0.1}, ['lr'])
    """
    import yaml

    if len(text) > SIZE:
        raise ValueError(f"it has {len(text):,} characters, settings have at most {SIZE:,}")
    loader = None
    try:
        loader = yaml.SafeLoader(text)  # refuses control characters already
        node = loader.get_single_node()
        if _unfolded(node, {}) > NODES:
            raise ValueError(f"it stands for more than {NODES:,} values once its anchors are unfolded")
        value = loader.construct_document(node) if node is not None else None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except yaml.YAMLError as error:
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(value, dict) or not isinstance(node, yaml.MappingNode):
        raise ValueError(f"it must map names to values, as in 'lr: 1e-4'; got {type(value).__name__}")
    return {str(key): inner for key, inner in value.items()}, [str(key.value) for key, _ in node.value]


def _unfolded(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for once each alias is what it names; endless if it holds itself."""
    if id(node) not in known:
        known[id(node)] = NODES + 1  # until all inside is counted: so much is one that holds itself
        parts = getattr(node, "value", ())
        pairs = [one for part in parts for one in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_unfolded(p, known) for p in pairs if not isinstance(p, str))
    return known[id(node)]


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
