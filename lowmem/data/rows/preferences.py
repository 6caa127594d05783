"""What a row means where more is learned than answers: preferences, judgements and questions.

    dpo, orpo, reward   prompt, chosen, rejected      which of two answers is better
    kto                 prompt, completion, label     whether an answer is good; a preference is two of them
    grpo                prompt                        answers are made and a function rewards them
    classify            prompt, candidates, label     which of several answers is right

Prompts are text, messages, a question or an instruction, as in `formats`; the chosen and the rejected
side may be text, one message or whole conversations, whose common beginning is the prompt.
For grpo all other fields stay beside the prompt: the reward function is given them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from lowmem.data.rows.columns import Columns, listed_in, written_out
from lowmem.data.rows.fields import EMPTY, Fields, RowError
from lowmem.data.rows.formats import BETTER, LABELS, WORSE, Format, Row, headless
from lowmem.data.rows.messages import read_messages
from lowmem.errors import UserError, nearest

Said = str | list[dict[str, Any]]

TASKS = ("dpo", "orpo", "reward", "kto", "grpo", "classify")
_SAID = {
    **dict.fromkeys(("dpo", "orpo", "reward"), "chosen=better,rejected=worse"),
    "kto": "completion=answer,label=good",
    "grpo": "prompt=task",
    "classify": "candidates=choices,label=right",
}  # an example of names for each task
_MAY_BE_TALKS = ("prompt", "chosen", "rejected", "completion", "messages", "conversations")
_NAMES = {"chosen": BETTER, "rejected": WORSE, "label": LABELS}


def formats_of(task: str) -> dict[str, Format]:
    """Formats that a task is trained on, by name.

    >>> list(formats_of("kto"))
    ['judgement', 'preference']
    """
    return {format.name: format for format in _FORMATS[task]}


def named_for(task: str, name: str) -> Format:
    """The format of a name.

    Raises:
        UserError: the task has none of that name.
    """
    known = formats_of(task)
    if name not in known:
        raise UserError(f"no data format {name!r} for task {task}: {nearest(name, known)}")
    return known[name]


def detect_for(task: str, row: Mapping[str, Any], source: str = "the data") -> Format:
    """Recognise a row by its fields.

    Raises:
        UserError: it is not what the task is trained on.

    Example:
        >>> detect_for("dpo", {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}).name
        'preference'
    """
    columns = [key for key, value in row.items() if value is not None]
    for candidate in _FORMATS[task]:
        if candidate.fits(columns):
            return candidate
    needs = " or ".join(f"{format.example}" for format in _FORMATS[task])
    raise UserError(
        f"{source} has the fields {', '.join(map(str, row)) or '(none)'}; task {task} needs {needs}: "
        f"{headless(row)}name them so, or say which they are with --columns {_SAID[task]}"
    )


def judged(row: Mapping[str, Any]) -> Columns:
    """A row with its verdicts under the usual names.

    Example:
        >>> judged({"prompt": "2 + 2?", "chosen_response": "4", "rejected_response": "5"}).called
        {'chosen': 'chosen_response', 'rejected': 'rejected_response'}
    """
    called = {
        new: next(old for old in names if row.get(old) not in EMPTY)
        for new, names in _NAMES.items()
        if any(row.get(old) not in EMPTY for old in names)
    }
    back = {old: new for new, old in called.items()}
    other = {new: old for new, old in called.items() if new != old}
    found = {back.get(key, key): value for key, value in row.items() if key not in other}
    said = {key: written_out(found[key]) for key in _MAY_BE_TALKS if key in found}
    return Columns({**found, **said}, other)


def _preference(row: Fields) -> list[Row]:
    """`prompt`, `chosen` and `rejected`, all texts or all messages; nothing where the two are one."""
    sides = [_said(row[key], key, row) for key in ("chosen", "rejected")]
    asked = _asked(row)
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise RowError("one of 'chosen' and 'rejected' is text, the other messages: write both alike")
    if asked is None:
        asked, sides = _parted(sides[0], sides[1])
    elif not (isinstance(asked, str) and isinstance(sides[0], str)):
        asked = _as_messages(asked, "user")
        sides = [_after(_as_messages(side, "assistant"), asked) for side in sides]
    if sides[0] == sides[1] or not all(map(_holds, sides)):
        return []
    return [{"prompt": asked, "chosen": sides[0], "rejected": sides[1]}]


def _both(row: Fields) -> list[Row]:
    """A preference as two judgements."""
    return [
        {"prompt": pair["prompt"], "completion": pair[key], "label": good}
        for pair in _preference(row)
        for key, good in (("chosen", True), ("rejected", False))
    ]


def _judgement(row: Fields) -> list[Row]:
    """`prompt`, `completion` and `label`; the last message of a conversation is its completion."""
    label = _label(row["label"])
    asked = _asked(row)
    key = next((key for key in ("completion", "answer", "output", "response") if key in row), None)
    if key is not None and asked is not None:
        said = _said(row[key], key, row)
    elif isinstance(asked, list) and len(asked) > 1 and asked[-1]["role"] == "assistant":
        asked, said = asked[:-1], asked[-1:]
    else:
        raise RowError("a judgement needs 'prompt' and 'completion', or messages that end with an answer")
    if not (isinstance(asked, str) and isinstance(said, str)):
        asked = _as_messages(asked, "user")
        said = _after(_as_messages(said, "assistant"), asked)
    return [{"prompt": asked, "completion": said, "label": label}] if _holds(said) else []


def _question(row: Fields) -> list[Row]:
    """The prompt, and every other field as it is."""
    asked = _asked(row)
    if isinstance(asked, list) and len(asked) > 1 and asked[-1]["role"] == "assistant":
        asked = asked[:-1]
    if asked is None:
        raise RowError("no field 'prompt', 'question', 'instruction' or 'messages'")
    if not _holds(asked):
        return []
    return [{"prompt": asked, **{key: row[key] for key in row if key not in _PROMPTS}}]


def _choice(row: Fields) -> list[Row]:
    """The prompt, the answers to choose from, and which of them is right: its place or its text."""
    asked, candidates = _asked(row), listed_in(row["candidates"])
    if asked is None:
        raise RowError("no field 'prompt', 'question', 'instruction' or 'messages'")
    texts = candidates if isinstance(candidates, list) else [candidates]
    if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
        raise RowError(f"field 'candidates' is {candidates!r}, not a list of two texts or more")
    if len(set(texts)) < len(texts):
        raise RowError(f"field 'candidates' has a text twice: {texts}")
    if not _holds(asked):
        return []
    return [{"prompt": asked, "candidates": texts, "label": _which(row["label"], texts)}]


def _which(label: Any, candidates: list[str]) -> int:
    """The place of the right candidate."""
    plain = [text.strip() for text in candidates]
    if isinstance(label, str) and label.strip() in plain:
        return plain.index(label.strip())
    if isinstance(label, str) and label.strip().isdecimal():
        label = int(label)  # the cell of a table
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(plain):
        return label
    raise RowError(f"field 'label' is {label!r}, neither one of {plain} nor a place among them, from 0 on")


_PROMPTS = ("prompt", "messages", "conversations")


def _asked(row: Fields) -> Said | None:
    """What was asked, None where no field says it."""
    if "prompt" in row and row["prompt"] is not None:
        return _said(row["prompt"], "prompt", row)
    for key in ("messages", "conversations"):
        if key in row and row[key] is not None:
            return read_messages(row[key], key, row)
    for key in ("question", "instruction"):
        if isinstance(row.raw.get(key), str):
            more = row.extra("input", "context")
            system = row.extra("system")
            led = [{"role": "system", "content": system}] if system else []
            content = f"{row[key]}\n\n{more}" if more else str(row[key])
            return [*led, {"role": "user", "content": content}]
    return None


def _said(value: Any, key: str, row: Fields) -> Said:
    """A text, or messages; one message is a list of one."""
    if isinstance(value, str):
        return value
    return read_messages([value] if isinstance(value, Mapping) else value, key, row)


def _as_messages(said: Said, role: str) -> list[dict[str, Any]]:
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def _after(messages: list[dict[str, Any]], asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows the prompt, in a side that repeats it."""
    return messages[len(asked) :] if messages[: len(asked)] == asked else messages


def _parted(one: Said, other: Said) -> tuple[Said, list[Said]]:
    """Two whole conversations as what they begin with, and what follows in each."""
    alike = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))
    if isinstance(one, str):
        alike = one[:alike].rfind(" ") + 1 if alike < min(len(one), len(other)) else alike
    if not alike:
        raise RowError("no field 'prompt', and 'chosen' and 'rejected' do not begin alike")
    return one[:alike], [one[alike:], other[alike:]]


def _holds(said: Said) -> bool:
    """Whether something is said."""
    return bool(said.strip() if isinstance(said, str) else any(m.get("content", "").strip() for m in said))


def _label(value: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False}
    found = words.get(str(value).strip().lower())
    if found is None:
        raise RowError(f"field 'label' is {value!r}, neither true nor false")
    return found


_PREFERENCE = Format("preference", ("chosen", "rejected"), "prompt, chosen, rejected", _preference)
_FORMATS = {
    **dict.fromkeys(("dpo", "orpo", "reward"), (_PREFERENCE,)),
    "kto": (
        Format("judgement", ("label",), "prompt, completion, label (true or false)", _judgement),
        Format("preference", ("chosen", "rejected"), "prompt, chosen, rejected", _both),
    ),
    "classify": (
        Format("choice", ("candidates", "label"), "prompt, candidates (a list of texts), label", _choice),
    ),
    "grpo": tuple(
        Format(key, (key,), key, _question)
        for key in ("prompt", "question", "instruction", "messages", "conversations")
    ),
}
