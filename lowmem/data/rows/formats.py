"""What a row means: six shapes of training data, recognised by their fields.

Each format turns a row into what TRL's SFTTrainer takes: `text` (loss on every token) or
`prompt` and `completion` (loss on the completion). Questions, instructions and
conversations become chat messages, so that the model's own chat template renders them.
A conversation is one row: the prompt runs up to the first answer that counts in the loss,
the completion from there to the last one; of a completion the answers count, unless
`train: False` stands in them. Rows that say which answer is good or bad are refused: half
of them must not be learned. A row notes which of its fields were read, so that the others
can be named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lowmem.data.files.folders import listed
from lowmem.data.rows.fields import EMPTY, Fields, RowError
from lowmem.data.rows.messages import Message, read_messages, read_tools, says, trained
from lowmem.errors import UserError, nearest

Row = dict[str, Any]

BETTER = ("chosen", "chosen_response", "chosen_messages", "preferred_output")
WORSE = ("rejected", "rejected_response", "rejected_messages", "non_preferred_output")
LABELS = ("label", "kto_tag", "desirable")
VERDICTS = (True, False, "true", "false", "True", "False", "1", "0")

_NO_NAME = re.compile(r"\s*|.*[.?!]\s*|[\d.,-]+|Unnamed: \d+|.*\.\d+|.{41,}|.*\n.*", re.DOTALL)

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


def detect_format(
    row: Mapping[str, Any], source: str = "the data", called: Mapping[str, str] | None = None
) -> Format:
    """Recognise a row by its fields.

    Args:
        row: in the names of formats.
        source: what an error calls it.
        called: what those of its fields are called in the file that have another name there.

    Raises:
        UserError: no format fits; the message names a field that is null, or lists fields and formats.

    Example:
        >>> detect_format({"question": "Where is Kenya?", "answer": "In Africa."}).name
        'question_answer'
    """
    columns = [key for key, value in row.items() if value is not None]
    try:
        _refuse_preferences(row)
    except RowError as error:
        raise UserError(f"{source} {error}") from error
    for candidate in _FORMATS:
        if candidate.fits(columns):
            return candidate
    null = [(f, key) for f in _FORMATS if f.fits(row) for key in f.fields if row[key] is None]
    if null:
        raise UserError(f"{source} ({null[0][0].name}): {_null(null[0][1])}")
    shapes = "; ".join(f"{f.name}: {f.example}" for f in _FORMATS)
    names = [str((called or {}).get(key, key)) for key in row]
    have = listed([name[:40] for name in names], 8) or "(none)"
    raise UserError(
        f"{source} has the fields {have}, which fit no format: {headless(names)}rename columns ({shapes})"
    )


def headless(names: Iterable[str]) -> str:
    """What to do first where names of fields read like the first row of a table that has no header.

    >>> headless(["What is one?", "One."])
    'where they are a row, put a line of names (question,answer) above it; else '
    >>> headless(["question", "text"])
    ''
    """
    like_row = any(_NO_NAME.fullmatch(str(name)) for name in names)
    return "where they are a row, put a line of names (question,answer) above it; else " if like_row else ""


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
        number = isinstance(value, (int, float))
        remedy = f': write what the model is to say in quotes ("{value}")' if number else ""
        raise RowError(f"field {key!r} is {type(value).__name__}, not text{remedy}")
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
    """`prompt` and `completion`: two texts, or messages on a side or on both."""
    if not any(isinstance(row.get(key), (list, Mapping)) for key in ("prompt", "completion")):
        prompt, completion = _string(row, "prompt"), _string(row, "completion")
        return [{"prompt": prompt, "completion": completion}] if completion.strip() else []
    asked = _led(row, _turns(row, "prompt", "user"), "prompt")
    return _chat(row, [*asked, *_turns(row, "completion", "assistant")], len(asked))


def _turns(row: Fields, key: str, role: str) -> list[Message]:
    """The messages of one side; a text beside messages is what `role` says."""
    _, value = _present(row, key)
    if isinstance(value, (list, Mapping)):
        return read_messages([value] if isinstance(value, Mapping) else value, key, row)
    if role == "user" and not _string(row, key).strip():
        raise RowError(f"field {key!r} is empty")
    return read_messages([{"role": role, "content": _string(row, key)}], key, row)


def _conversation(key: str) -> Convert:
    def convert(row: Fields) -> list[Row]:
        _, value = _present(row, key)
        return _chat(row, _led(row, read_messages(value, key, row), key))

    return convert


def _led(row: Fields, messages: list[Message], key: str) -> list[Message]:
    """The messages after the system message that stands beside them; the same one twice is one."""
    system = _system(row)
    if not system or messages[0]["role"] != "system":
        return [*system, *messages]
    if messages[0] != system[0]:
        raise RowError(f"two system messages, field 'system' and the first of {key!r}: keep one of them")
    return messages


def _chat(row: Fields, messages: list[Message], start: int = 0) -> list[Row]:
    """A conversation whose answers from message `start` on count in the loss; no row where none does."""
    if not any(m["role"] == "assistant" for m in messages[start:]):
        raise RowError("a conversation without an answer (no message of the assistant)")
    tools = read_tools(row)
    if not start and trained(messages[0]):  # there is nothing to answer: no prompt could be rendered
        row.note("an answer that opens a conversation")
    counting = [i for i, message in enumerate(messages) if i >= max(start, 1) and trained(message)]
    if not counting:
        off = any(map(says, messages[max(start, 1) :]))
        opens = "with no answer but the one that opens them"
        row.why = "whose answers have weight 0" if off else opens if says(messages[0]) else ""
        return []
    first, end = counting[0], counting[-1] + 1
    prompt = [{key: value for key, value in m.items() if key != "train"} for m in messages[:first]]
    chat = {"prompt": prompt, "completion": messages[first:end]}
    return [{**chat, "tools": tools} if tools else chat]


def _refuse_preferences(row: Mapping[str, Any]) -> None:
    """Refuse a row that holds a worse answer, or says whether its answer is a good one."""
    worse = next((key for key in WORSE if row.get(key) not in EMPTY), None)
    if worse is not None:
        better = next((key for key in BETTER if row.get(key) not in EMPTY), None)
        named = f", or say --columns completion={better}" if better and "prompt" in row else ""
        raise RowError(
            f"holds preferences ({', '.join(filter(None, (better, worse)))}); supervised fine-tuning learns "
            f"answers: train them with --task dpo, or {_kept(row, better)} and take `{worse}` out{named}"
        )
    answered = any(f.fits(row) for f in _FORMATS if f.name != "text")
    judged = next((key for key in LABELS if answered and row.get(key) in VERDICTS), None)
    if judged is not None:
        raise RowError(
            f"holds a judgement of its answer ({judged}: {row[judged]!r}); supervised fine-tuning learns "
            f"bad ones too: train with --task kto, or keep the rows with good ones and take `{judged}` out"
        )


def _kept(row: Mapping[str, Any], better: str | None) -> str:
    """What to do with the better answer of a row."""
    if better is None:
        return "keep the answer"
    talk = next((key for key in ("messages", "conversations") if row.get(key) not in EMPTY), None)
    if talk is not None:
        return f"append `{better}` to `{talk}`"
    whole = isinstance(row[better], list) and not isinstance(row.get("prompt"), list)
    return (
        f"rename `{better}` to `messages`" if whole else f"keep `prompt`, rename `{better}` to `completion`"
    )


def _single(convert: Convert) -> Convert:
    """A conversion that takes no preferences."""

    def checked(row: Fields) -> list[Row]:
        _refuse_preferences(row.raw)
        return convert(row)

    return checked


_FORMATS = (
    Format("messages", ("messages",), "messages [{role, content}]", _single(_conversation("messages"))),
    Format(
        "sharegpt",
        ("conversations",),
        "conversations [{from, value}]",
        _single(_conversation("conversations")),
    ),
    Format(
        "prompt_completion",
        ("prompt", "completion"),
        "prompt, completion",
        _single(_pair),
    ),
    Format("alpaca", ("instruction",), "instruction, input, output", _single(_alpaca)),
    Format("question_answer", ("question", "answer"), "question, answer", _single(_question)),
    Format("text", ("text",), "text", _single(_plain)),
)
