"""What a row means: six shapes of training data, recognised by their fields.

Each format turns a row into what TRL's SFTTrainer takes: `text` (loss on every token) or
`prompt` and `completion` (loss on the completion). Questions, instructions and
conversations become chat messages, so that the model's own chat template renders them.
A conversation with several answers becomes one row per answer, each with what was said
before it: every answer is trained on once, whatever the template can mark. A row notes
which of its fields were read, so that the others can be named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.data.folders import listed
from lowmem.errors import UserError, nearest

Row = dict[str, Any]

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


class Fields(Mapping[str, Any]):
    """A row that notes which of its fields are read.

    Args:
        row: the raw row.
    """

    def __init__(self, row: Mapping[str, Any]) -> None:
        self._row = row
        self._read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self._read.add(key)
        return self._row[key]

    def __contains__(self, key: object) -> bool:
        return key in self._row  # the inherited one would read the field

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)

    def extra(self, *keys: str) -> str:
        """The first of these fields that holds a text; "" without one, and then none counts as read."""
        for key in keys:
            value = self._row.get(key)
            if isinstance(value, str) and value.strip():
                self._read.add(key)
                return value
        return ""

    def unread(self) -> list[str]:
        """Fields that hold something and were not read."""
        empty: tuple[Any, ...] = (None, "", [], {})
        return [key for key, value in self._row.items() if key not in self._read and value not in empty]


Convert = Callable[[Fields], list[Row]]


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
        UserError: no format fits; the message names a field that is null, or lists fields and formats.

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
    null = [(f, key) for f in _FORMATS if f.fits(row) for key in f.fields if row[key] is None]
    if null:
        raise UserError(f"{source} ({null[0][0].name}): {_null(null[0][1])}")
    shapes = "; ".join(f"{f.name}: {f.example}" for f in _FORMATS)
    have = listed([key[:40] for key in row], 8) or "(none)"
    raise UserError(f"{source} has the fields {have}, which fit no format: rename columns ({shapes})")


def _null(key: str) -> str:
    return f"field {key!r} is null: fill it in or take the row out"


def _present(row: Fields, *keys: str) -> tuple[str, Any]:
    """The first of these fields that is not null, and its name."""
    found = [key for key in keys if key in row]
    key = next((key for key in found if row[key] is not None), None)
    if key is not None:
        return key, row[key]
    if found:
        raise RowError(_null(found[0]))
    raise RowError(f"no field {keys[0]!r} (it has {', '.join(map(str, row)) or 'none'})")


def _string(row: Fields, *keys: str) -> str:
    """The text of the first of these fields that is not null."""
    key, value = _present(row, *keys)
    if not isinstance(value, str):
        raise RowError(f"field {key!r} is {type(value).__name__}, not text")
    return value


def _system(row: Fields) -> list[dict[str, str]]:
    """The system message that stands beside question or messages, if there is one."""
    said = row.extra("system")
    return [{"role": "system", "content": said}] if said else []


def _exchange(row: Fields, question: str, answer: str) -> list[Row]:
    """One question and its answer as chat messages; nothing without an answer."""
    if not answer.strip():
        return []
    if not question.strip():
        raise RowError("the question is empty")
    prompt = [*_system(row), {"role": "user", "content": question}]
    return [{"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}]


def _plain(row: Fields) -> list[Row]:
    text = _string(row, "text")
    return [{"text": text}] if text.strip() else []


def _question(row: Fields) -> list[Row]:
    question, answer, passage = _string(row, "question"), _string(row, "answer"), row.extra("context")
    return _exchange(row, f"{passage}\n\n{question}" if passage and question.strip() else question, answer)


def _alpaca(row: Fields) -> list[Row]:
    instruction, answer = _string(row, "instruction"), _string(row, "output", "response")
    extra = row.extra("input", "context")
    return _exchange(row, f"{instruction}\n\n{extra}" if extra else instruction, answer)


def _pair(row: Fields) -> list[Row]:
    """`prompt` and `completion`: two texts, or two lists of messages."""
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        asked, answered = _messages(row["prompt"], "prompt"), _messages(row["completion"], "completion")
        spoken = any(m["content"].strip() for m in answered)
        asked = _led(row, asked, "prompt")
        return [{"prompt": asked, "completion": answered}] if spoken else []
    prompt, completion = _string(row, "prompt"), _string(row, "completion")
    return [{"prompt": prompt, "completion": completion}] if completion.strip() else []


def _conversation(key: str) -> Convert:
    def convert(row: Fields) -> list[Row]:
        _, value = _present(row, key)
        return list(_answers(_led(row, _messages(value, key), key)))

    return convert


def _led(row: Fields, messages: list[dict[str, str]], key: str) -> list[dict[str, str]]:
    """The messages after the system message that stands beside them; the same one twice is one."""
    system = _system(row)
    if not system or messages[0]["role"] != "system":
        return [*system, *messages]
    if messages[0] != system[0]:
        raise RowError(f"two system messages, field 'system' and the first of {key!r}: keep one of them")
    return messages


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
    if not isinstance(role, str) or role not in ROLES:
        raise RowError(f"{where} has the role {role!r}: {nearest(str(role), ROLES)}")
    return {"role": ROLES[role], "content": content}


_FORMATS = (
    Format("messages", ("messages",), "messages [{role, content}]", _conversation("messages")),
    Format(
        "sharegpt",
        ("conversations",),
        "conversations [{from, value}]",
        _conversation("conversations"),
    ),
    Format("prompt_completion", ("prompt", "completion"), "prompt, completion", _pair),
    Format("alpaca", ("instruction",), "instruction, input, output", _alpaca),
    Format("question_answer", ("question", "answer"), "question, answer", _question),
    Format("text", ("text",), "text", _plain),
)
