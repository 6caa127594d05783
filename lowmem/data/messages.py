"""What a message says: the namings people use become the one that chat templates read.

    {"role": "system" | "user" | "assistant" | "tool", "content": text}
    an answer has besides    "tool_calls": [{"type": "function", "function": {"name", "arguments": {...}}}],
                             "reasoning_content": text, and "train": False where it is context only
    a tool's result has      "name", "tool_call_id"

Arguments are kept as objects, as templates that write them with `tojson` need them. What a
message asks for in a way that is not understood is refused, never trained on; fields that
nothing is made from are noted in the row, as `messages.NAME`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lowmem.data.fields import EMPTY, Fields, RowError, parsed
from lowmem.errors import nearest

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")  # roles whose text is a call, or a list of calls, as JSON
SWITCHES = ("weight", "train", "training", "trainable", "loss", "loss_weight")
PARTIAL = ("train_detail", "training_detail", "loss_mask", "mask", "masked")
REASONING = ("reasoning_content", "reasoning", "thinking")
TEXTS = ("text", "input_text", "output_text")  # types of content parts that are text


def read_messages(value: Any, key: str, row: Fields) -> list[Message]:
    """Messages in the one naming.

    Args:
        value: what stands in the row's field.
        key: name of that field.
        row: where unread fields of messages are noted.

    Raises:
        RowError: no list of messages, or a message that is not understood; it says which one.

    Example:
        >>> read_messages([{"from": "human", "value": "Where?"}], "conversations", Fields({}))
        [{'role': 'user', 'content': 'Where?'}]
    """
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r} is not a list of messages")
    return [_message(item, key, f"message {n} of {key!r}", row) for n, item in enumerate(value, 1)]


def read_tools(row: Fields) -> list[dict[str, Any]]:
    """The tools that a row offers, from `tools` or the older `functions`; a list, or a list as JSON text.

    Raises:
        RowError: it is no list of tools with names.
    """
    key = next((key for key in ("tools", "functions") if row.raw.get(key) not in EMPTY), None)
    if key is None:
        return []
    try:
        value = parsed(row[key])
    except RowError as error:
        raise RowError(f"field {key!r}: {error}") from error
    tools = [_tool(item) for item in value] if isinstance(value, list) else [None] * (value is not None)
    if None in tools:
        raise RowError(f"field {key!r} is not a list of tools, each with a name")
    return [tool for tool in tools if tool is not None]


def trained(message: Message) -> bool:
    """Whether an answer counts in the loss: it says something and is not context only."""
    return message["role"] == "assistant" and message.get("train") is not False


def _tool(item: Any) -> dict[str, Any] | None:
    """A tool with its wrapper; None for what is not one."""
    if not isinstance(item, Mapping):
        return None
    function = item.get("function", item)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    return dict(item) if "function" in item else {"type": "function", "function": dict(function)}


def _message(item: Any, key: str, where: str, row: Fields) -> Message:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is {type(item).__name__}, not a message with a role and a content")
    fields = Fields(item)
    try:
        message = _read(fields)
    except RowError as error:
        raise RowError(f"{where} {error}") from error
    row.leave(key, fields.unread())
    return message


def _read(fields: Fields) -> Message:
    said = _role(fields)
    role = ROLES[said]
    calls = _calls(fields, said)
    message: Message = {"role": role, "content": "" if said in CALLS else _content(fields, role, bool(calls))}
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and (reasoning := fields.extra(*REASONING)):
        message["reasoning_content"] = reasoning
    for name in ("name", "tool_call_id") if role == "tool" else ("name",):
        if text := fields.extra(name):
            message[name] = text
    counts = _counts(fields, role)
    if role == "assistant" and not (counts and (message["content"].strip() or calls)):
        message["train"] = False
    return message


def _role(fields: Fields) -> str:
    value = fields.first("role", "from")
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in ROLES:
        raise RowError(f"has the role {value!r}: {nearest(str(value), ROLES)}")
    return name


def _content(fields: Fields, role: str, calls: bool) -> str:
    """The text of a message; null is one beside tool calls."""
    value = fields.first("content", "value")
    if isinstance(value, str):
        return value
    if value is None and calls:
        return ""
    if isinstance(value, list) and value:
        return "".join(_part(part) for part in value)
    if isinstance(value, Mapping) and role == "tool":
        return json.dumps(value, ensure_ascii=False)
    raise RowError("has no text (content or value)")


def _part(part: Any) -> str:
    """The text of one content part."""
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind not in TEXTS or not isinstance(part.get("text"), str):
        raise RowError(f"has a content part of type {kind!r}: lowmem trains on text; take the row out")
    text: str = part["text"]
    return text


def _counts(fields: Fields, role: str) -> bool:
    """Whether a message's own switches leave it in the loss; what they say of no answer stays unread."""
    counts = True
    for name in SWITCHES:
        value = fields.raw.get(name)
        if value is None:
            continue
        if isinstance(value, str) or value not in (0, 1):
            raise RowError(f"has {name} {value!r}: give 1 (counts in the loss) or 0 (context only)")
        if role == "assistant" or not value:
            counts = counts and bool(fields[name])
    for name in PARTIAL:
        if fields.raw.get(name) is not None:
            raise RowError(
                f"has {name!r}, which is not understood: write train: false for what is context only"
            )
    return counts


def _calls(fields: Fields, said: str) -> list[dict[str, Any]]:
    """The tool calls of a message: `tool_calls`, the older `function_call`, or a text that is calls."""
    try:
        if said in CALLS:
            found = parsed(fields.first("content", "value"))
        else:
            found = parsed(fields.first("tool_calls", "function_call"))
    except RowError as error:
        raise RowError(f"has a tool call that is not understood: {error}") from error
    if found in EMPTY:
        if said in CALLS:
            raise RowError("has no tool call")
        return []
    if ROLES[said] != "assistant":
        raise RowError(f"calls tools, with the role {said!r}: only the assistant can")
    return [_call(item) for item in (found if isinstance(found, list) else [found])]


def _call(item: Any) -> dict[str, Any]:
    """One call, its arguments as an object."""
    unclear = "has a tool call that is not understood"
    if not isinstance(item, Mapping) or item.get("type") not in (None, "function"):
        raise RowError(f"{unclear}: give type function, with a function of a name and arguments")
    function = item["function"] if item.get("function") is not None else item
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name.strip():
        raise RowError(f"{unclear}: its function has no name")
    arguments = function.get("arguments")
    try:
        arguments = parsed(arguments if arguments is not None else function.get("parameters"))
    except RowError as error:
        raise RowError(f"{unclear}: the arguments of {name!r}: {error}") from error
    if not isinstance(arguments, Mapping | None):
        raise RowError(f"{unclear}: the arguments of {name!r} are {type(arguments).__name__}, not an object")
    call = {"type": "function", "function": {"name": name, "arguments": dict(arguments or {})}}
    return {"id": item["id"], **call} if isinstance(item.get("id"), str) else call
