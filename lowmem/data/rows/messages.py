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

from collections.abc import Mapping
from typing import Any

from lowmem.data.rows.content import read_content
from lowmem.data.rows.fields import EMPTY, Fields, RowError, parsed
from lowmem.data.rows.switches import counts
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
REASONING = ("reasoning_content", "reasoning", "thinking")


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


def says(message: Message) -> bool:
    """Whether a message is an answer with something in it."""
    return message["role"] == "assistant" and bool(message["content"].strip() or message.get("tool_calls"))


def _tool(item: Any) -> dict[str, Any] | None:
    """A tool with its wrapper; None for what is not one.

    Nulls are dropped: columns of structs give every tool the fields of all of them.
    """
    item = _without_nulls(item)
    if not isinstance(item, Mapping):
        return None
    function = item.get("function", item)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return None
    return dict(item) if "function" in item else {"type": "function", "function": dict(function)}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


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
    name = _role(fields)
    role = ROLES[name]
    said = read_content(fields, role, is_data=role == "tool" or name in CALLS)
    if name in CALLS:
        said = {"tool_call": said.get("text", [""])}
    calls = _calls(fields, role, said.get("tool_call", []))
    if "text" not in said and not calls:
        raise RowError("has no text (content or value)")
    message: Message = {"role": role, "content": "".join(said.get("text", []))}
    if calls:
        message["tool_calls"] = calls
    if role == "assistant" and (
        reasoning := fields.extra(*REASONING) or "\n".join(said.get("reasoning", []))
    ):
        message["reasoning_content"] = reasoning
    for key in ("name", "tool_call_id") if role == "tool" else ("name",):
        if text := fields.extra(key):
            message[key] = text
    counted = counts(fields, role)
    if role == "assistant" and not (counted and (message["content"].strip() or calls)):
        message["train"] = False
    return message


def _role(fields: Fields) -> str:
    value = fields.first("role", "from")
    name = value.strip().lower() if isinstance(value, str) else ""
    if name not in ROLES:
        raise RowError(f"has the role {value!r}: {nearest(str(value), ROLES)}")
    return name


def _calls(fields: Fields, role: str, texts: list[str]) -> list[dict[str, Any]]:
    """The tool calls of a message: `tool_calls`, the older `function_call`, and texts that are calls."""
    found: list[Any] = []
    for value in (fields.first("tool_calls", "function_call"), *texts):
        try:
            calls = parsed(value)
        except RowError as error:
            raise RowError(f"has a tool call that is not understood: {error}") from error
        if calls not in EMPTY:
            found += calls if isinstance(calls, list) else [calls]
    if texts and not found:
        raise RowError("has no tool call")
    if found and role != "assistant":
        raise RowError(f"calls tools, with the role {role!r}: only the assistant can")
    return [_call(call) for call in found]


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
