"""What a row means: six shapes of training data, recognised by their fields.

Each format turns a row into what TRL's SFTTrainer takes: `text` (loss on every token) or
`prompt` and `completion` (loss on the completion). Questions, instructions and
conversations become chat messages, so that the model's own chat template renders them.
A conversation with several answers becomes one row per answer, each with what was said
before it: every answer is trained on once, whatever the template can mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.errors import UserError, nearest

Row = dict[str, Any]
Convert = Callable[[Mapping[str, Any]], list[Row]]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
}


class RowError(ValueError):
    """What is wrong with one row; whoever knows its place turns it into a UserError."""


@dataclass(frozen=True)
class Format:
    """One shape of rows.

    Attributes:
        name: what `data_format` calls it.
        fields: what a row must have; the first is what an error asks for.
        example: its fields in words, for listings.
        convert: a row to zero (empty answer), one or more rows for TRL.
    """

    name: str
    fields: tuple[str, ...]
    example: str
    convert: Convert

    def fits(self, columns: Iterable[str]) -> bool:
        """Whether rows with these columns can be of this format."""
        return set(self.fields) <= set(columns)


def formats() -> dict[str, Format]:
    """Every format by name, in the order in which they are looked for.

    >>> list(formats())
    ['messages', 'sharegpt', 'prompt_completion', 'alpaca', 'question_answer', 'text']
    """
    return {f.name: f for f in _FORMATS}


def named(name: str) -> Format:
    """The format of a name; `question/answer` and `Question-Answer` are the same.

    Raises:
        UserError: an unknown name, with the nearest one.
    """
    key = name.strip().lower().replace("-", "_").replace("/", "_").replace(" ", "_")
    if key not in formats():
        raise UserError(f"no data format {name!r}: {nearest(key, formats())}")
    return formats()[key]


def detect_format(row: Mapping[str, Any], source: str = "the data") -> Format:
    """Recognise a row by its fields.

    Raises:
        UserError: no format fits; the message lists the fields found and the formats.

    Example:
        >>> detect_format({"question": "Where is Kenya?", "answer": "In Africa."}).name
        'question_answer'
    """
    columns = [key for key, value in row.items() if value is not None]
    for candidate in _FORMATS:
        if candidate.fits(columns):
            return candidate
    if {"chosen", "rejected"} <= set(columns):
        raise UserError(
            f"{source} holds preferences (chosen, rejected); lowmem fine-tunes on answers: keep `prompt` "
            f"and rename `chosen` to `completion`"
        )
    shapes = "; ".join(f"{f.name}: {f.example}" for f in _FORMATS)
    raise UserError(f"{source} has the fields {', '.join(row) or '(none)'}, which fit no format ({shapes})")


def _string(row: Mapping[str, Any], *keys: str, needed: bool = True) -> str:
    """The text of the first field that the row has."""
    value = next((row[key] for key in keys if row.get(key) is not None), None)
    if value is None and not needed:
        return ""
    if value is None:
        raise RowError(f"no field {keys[0]!r} (it has {', '.join(map(str, row)) or 'none'})")
    if not isinstance(value, str):
        raise RowError(f"field {keys[0]!r} is {type(value).__name__}, not text")
    return value


def _exchange(question: str, answer: str) -> list[Row]:
    """One question and its answer as chat messages; nothing without an answer."""
    if not answer.strip():
        return []
    if not question.strip():
        raise RowError("the question is empty")
    prompt = [{"role": "user", "content": question}]
    return [{"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}]


def _plain(row: Mapping[str, Any]) -> list[Row]:
    text = _string(row, "text")
    return [{"text": text}] if text.strip() else []


def _question(row: Mapping[str, Any]) -> list[Row]:
    return _exchange(_string(row, "question"), _string(row, "answer"))


def _alpaca(row: Mapping[str, Any]) -> list[Row]:
    instruction, answer = _string(row, "instruction"), _string(row, "output", "response")
    extra = _string(row, "input", "context", needed=False)
    return _exchange(f"{instruction}\n\n{extra}" if extra.strip() else instruction, answer)


def _pair(row: Mapping[str, Any]) -> list[Row]:
    """`prompt` and `completion`: two texts, or two lists of messages."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        asked, answered = _messages(row["prompt"], "prompt"), _messages(row["completion"], "completion")
        spoken = any(m["content"].strip() for m in answered)
        return [{"prompt": asked, "completion": answered}] if spoken else []
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    return [{"prompt": prompt, "completion": completion}] if completion.strip() else []


def _conversation(key: str) -> Convert:
    def convert(row: Mapping[str, Any]) -> list[Row]:
        if row.get(key) is None:
            raise RowError(f"no field {key!r} (it has {', '.join(map(str, row)) or 'none'})")
        return list(_answers(_messages(row[key], key)))

    return convert


def _answers(messages: list[dict[str, str]]) -> Iterator[Row]:
    """One row per answer, with everything said before it."""
    if not any(m["role"] == "assistant" for m in messages):
        raise RowError("a conversation without an answer (no message of the assistant)")
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and i > 0 and message["content"].strip():
            yield {"prompt": messages[:i], "completion": [message]}


def _messages(value: Any, key: str) -> list[dict[str, str]]:
    """Messages with `role` and `content`, from either naming."""
    if not isinstance(value, list) or not value:
        raise RowError(f"field {key!r} is not a list of messages")
    return [_message(item, f"message {n} of {key!r}") for n, item in enumerate(value, 1)]


def _message(item: Any, where: str) -> dict[str, str]:
    if not isinstance(item, Mapping):
        raise RowError(f"{where} is {type(item).__name__}, not a message with a role and a content")
    role = item.get("role") if item.get("role") is not None else item.get("from")
    content = item.get("content") if item.get("content") is not None else item.get("value")
    if not isinstance(content, str):
        raise RowError(f"{where} has no text (content or value)")
    if role not in ROLES:
        raise RowError(f"{where} has the role {role!r}: {nearest(str(role), ROLES)}")
    return {"role": ROLES[role], "content": content}


_FORMATS = (
    Format("messages", ("messages",), "messages [{role, content}]", _conversation("messages")),
    Format(
        "sharegpt",
        ("conversations",),
        "conversations [{from, value}] or [{role, content}]",
        _conversation("conversations"),
    ),
    Format("prompt_completion", ("prompt", "completion"), "prompt, completion (texts or messages)", _pair),
    Format("alpaca", ("instruction",), "instruction, input, output", _alpaca),
    Format("question_answer", ("question", "answer"), "question, answer", _question),
    Format("text", ("text",), "text", _plain),
)
