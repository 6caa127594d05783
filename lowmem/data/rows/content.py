"""What the content of a message holds: a text, parts of several kinds, or an object.

    "hello"                                          a text
    [{"type": "text", "text": "hello"}, ...]         parts: text, and of an answer reasoning and calls
    {"type": "text", "text": "hello"}                one part
    {"content_type": "text", "parts": ["hello"]}     parts, as exports of chats have them

Any other object is what a tool returned, or a call, and becomes its JSON text there. As
what somebody said it is refused: nobody wants braces and quotes to be learned as an answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem.data.rows.fields import EMPTY, Fields, RowError

PARTS = {  # types of content parts
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "reasoning": "reasoning",
    "thinking": "reasoning",
    "tool_call": "tool_call",
}
PART_TEXTS = ("text", "value", "thinking", "reasoning")  # where their text stands
_KINDS = ("type", "content_type")


def read_content(fields: Fields, role: str, *, is_data: bool = False) -> dict[str, list[str]]:
    """The texts of a message's content by kind: text, and of an answer reasoning and tool_call.

    Args:
        fields: the message.
        role: whose it is.
        is_data: whether an object stands for itself, as the result of a tool or a call.

    Raises:
        RowError: a part or an object that holds no text.

    Example:
        >>> read_content(Fields({"content": {"type": "text", "text": "hello"}}), "assistant")
        {'text': ['hello']}
    """
    value = fields.first("content", "value")
    if isinstance(value, Mapping) and is_data:
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, str):
        return {"text": [value]}
    if value is not None and not isinstance(value, (list, Mapping)):
        raise RowError(f"has the content {value!r} ({type(value).__name__}), not text: put it in quotes")
    said: dict[str, list[str]] = {}
    for part in _parts(value) if isinstance(value, Mapping) else value or []:
        kind, text = _part(part, role, fields)
        said.setdefault(kind, []).append(text)
    return said


def _parts(value: Mapping[str, Any]) -> list[Any]:
    """The parts that an object as content stands for."""
    kind = next((value[key] for key in _KINDS if value.get(key) is not None), "text")
    if isinstance(value.get("parts"), list):
        return [{"type": kind, "text": part} if isinstance(part, str) else part for part in value["parts"]]
    if kind in PARTS and not any(isinstance(value.get(key), str) for key in PART_TEXTS):
        raise RowError(
            f"has an object as content, of {', '.join(map(repr, value)) or 'nothing'}: "
            'give a text, or {"type": "text", "text": ...}'
        )
    return [{"type": kind, **value}]


def _part(part: Any, role: str, fields: Fields) -> tuple[str, str]:
    """The kind of one part, and its text; what else it holds is noted."""
    is_object = isinstance(part, Mapping)
    kind = part.get("type") or part.get("content_type") or "text" if is_object else type(part).__name__
    key = next((key for key in PART_TEXTS if isinstance(part.get(key), str)), None) if kind in PARTS else None
    if key is None or (PARTS[kind] != "text" and role != "assistant"):
        raise RowError(f"has a content part of type {kind!r}: lowmem trains on text; take the row out")
    more = (name for name, inner in part.items() if name not in (key, *_KINDS) and inner not in EMPTY)
    fields.leave("content", more)
    return PARTS[kind], str(part[key])
