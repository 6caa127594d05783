"""Columns as people name them, read as the fields that formats are made of.

    Question, Answer                              capitals and blanks mean nothing
    prompt and response, problem and solution ... are question and answer, unless another format fits
    conversation, dialog, chat                    are messages where they hold some
    {"role": [...], "content": [...]}, '[{...}]'  a struct of lists and a text of JSON or Python are, too
    answers: {"text": [...]}, ["...", "..."]      the first of several right answers is the one
['...' '...'], array(['...'], dtype=object)   so are such lists as numpy prints them into a table

Which names are read as which depends on the names of a row alone and is said once.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowmem import texts
from lowmem.data.files.source import Row
from lowmem.data.rows.fields import RowError
from lowmem.data.rows.formats import Format, formats

PAIRS = (
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("problem", "solution"),
    ("input", "output"),
    ("inputs", "targets"),
)  # tried in this order, then each of the first with each of the second
ASKED = ("question", "query", "prompt", "problem", "instruction", "input", "inputs", "user", "human")
SAID = (
    *("answer", "answers", "response", "output", "outputs", "solution", "completion", "reply"),
    *("target", "targets", "assistant"),
)
MEANT = {
    "question_answer": ("question", "answer"),
    "prompt_completion": ("prompt", "completion"),
    "alpaca": ("instruction", "output"),
}  # format -> what the two are in it
_WHOLE = ("messages", "conversations")  # nothing but messages can stand there
_AS_MESSAGES = {"question": "prompt", "answer": "completion"}  # where one of them holds messages
SYSTEMS = ("system_prompt", "system_message", "system_instruction")
TALKS = ("conversation", "dialog", "dialogue", "chat", "turns")
SEVERAL = ("answers", "outputs", "targets")
"""A text there may be a list that a table has no other way to hold."""
_TEXT = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
_TOKEN = re.compile(rf"""{_TEXT}|array\(|,\s*dtype=[^()]*\)|[\[\]{{}}(),:]|\s+|[^\s\[\]{{}}(),:'"]+""")
_TEXTS = re.compile(rf"\s*\[\s*{_TEXT}(?:\s+(?:{_TEXT}|\.\.\.))+\s*\]\s*")
"""A list of texts as numpy prints it, and nothing that a person writes."""


class ElidedError(RowError):
    """A list of which a text holds the ends alone."""


@dataclass(frozen=True)
class Columns:
    """A row in the names of formats.

    Attributes:
        row: its fields.
        called: what each field was called that has another name now.
        left: what else of it is not used, in words.
    """

    row: Row
    called: Mapping[str, str]
    left: tuple[str, ...] = ()

    def original(self, name: str) -> str:
        """What the file calls a field."""
        return self.called.get(name, name)


def understood(row: Mapping[str, Any], chosen: Format | None = None) -> Columns:
    """Read a row's columns.

    Args:
        row: as it stands in the file.
        chosen: the format to read it as; the one that fits where None.

    Raises:
        RowError: messages as text that is not JSON.

    Example:
        >>> understood({"Prompt": "Where?", "Response": "Here."}).row
        {'question': 'Where?', 'answer': 'Here.'}
    """
    filled = tuple(key for key, value in row.items() if value is not None)
    talks = tuple(_plain(key) for key in filled if _plain(key) in TALKS and _is_talk(row[key]))
    called = dict(_names(tuple(row), filled, talks, chosen))
    back = {old: new for new, old in called.items()}
    found: Row = {back.get(key, key): value for key, value in row.items() if not _displaced(key, called)}
    displaced = tuple(key for key, value in row.items() if _displaced(key, called) and value is not None)
    for key in (*_WHOLE, *_AS_MESSAGES, *_AS_MESSAGES.values()):
        if key in found and (key in _WHOLE or _is_talk(found[key])):
            found[key] = _messages(found[key], key)
    answer = found.get("answer")
    if _plain(called.get("answer", "")) in SEVERAL or (isinstance(answer, str) and _TEXTS.fullmatch(answer)):
        found["answer"] = listed_in(answer)
    left = _one_answer(found)
    if "prompt" in found and "question" in called:  # it holds messages
        called = {_AS_MESSAGES.get(new, new): old for new, old in called.items()}
    return Columns(found, {new: old for new, old in called.items() if new != old}, (*displaced, *left))


def written_out(value: Any) -> Any:
    """Messages out of a text that holds them, as the cells of a table do; anything else as it is.

    >>> written_out('[{"role": "user", "content": "a"}]'), written_out("[sic]")
    ([{'role': 'user', 'content': 'a'}], '[sic]')
    """
    return _messages(value, "messages") if _is_talk(value) else value


def listed_in(value: Any) -> Any:
    """A list out of a text that holds one; anything else as it is.

    Raises:
        ElidedError: a text of numpy that does not hold all of it.

    >>> listed_in("['yes', 'no']"), listed_in("[sic]")
    (['yes', 'no'], '[sic]')
    """
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return _parsed(value, "")
    except ElidedError:
        raise
    except RowError:
        return value


def _displaced(key: str, called: Mapping[str, str]) -> bool:
    """Whether another column goes by this one's name: `solution` by that of a short `answer` beside it."""
    return called.get(key, key) != key and key not in called.values()


@functools.lru_cache(maxsize=256)
def _names(
    names: tuple[str, ...], filled: tuple[str, ...], talks: tuple[str, ...], chosen: Format | None
) -> tuple[tuple[str, str], ...]:
    """Pairs (new name, name in the file) for columns that are read under another name."""
    plain: dict[str, list[str]] = {}
    for name in names:
        plain.setdefault(_plain(name), []).append(name)
    called = {new: old[0] for new, old in plain.items() if len(old) == 1}  # one of two alike stays as it is
    have = {new for new, old in called.items() if old in filled} | set(filled)
    for new, old in _other_names(have, talks, chosen):
        called[new] = called.pop(old, old)
    return tuple(called.items())


def _other_names(have: set[str], talks: tuple[str, ...], chosen: Format | None) -> list[tuple[str, str]]:
    """What columns of these plain names stand for, as (name of a format's field, name)."""
    renamed = [("system", name) for name in SYSTEMS if name in have and "system" not in have][:1]
    fitting = [f.name for f in ([chosen] if chosen else formats().values()) if f.fits(have)]
    if fitting and (fitting[0] != "alpaca" or have & {"output", "response"}):
        return renamed
    if talks and (chosen is None or chosen.name in ("messages", "sharegpt")):
        return [*renamed, (chosen.fields[0] if chosen else "messages", talks[0])]
    if chosen is not None and chosen.name not in MEANT:
        return renamed
    crossed = ((asked, said) for asked in ASKED for said in SAID)
    for asked, said in (*PAIRS, *crossed):
        if {asked, said} <= have:
            usual = "alpaca" if asked == "instruction" else "question_answer"
            new = MEANT[chosen.name if chosen else usual]
            return [*renamed, *(pair for pair in zip(new, (asked, said), strict=True) if pair[0] != pair[1])]
    return renamed


def _plain(name: str) -> str:
    """A name without what people vary.

    >>> _plain(" System Prompt")
    'system_prompt'
    """
    return "_".join(name.lower().replace("-", " ").replace("_", " ").split())


def _is_talk(value: Any) -> bool:
    """Whether a column holds messages, in whatever wrapping."""
    try:
        value = _messages(value, "messages")
    except RowError:
        return False
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, Mapping) and ("role" in first or "from" in first)


def _messages(value: Any, key: str) -> Any:
    """A list of messages out of a struct of lists or of a text that holds them; anything else as it is."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        value = _parsed(value, key)
    parts = list(value.values()) if isinstance(value, Mapping) else []
    if parts and all(isinstance(part, list) for part in parts) and len(set(map(len, parts))) == 1:
        return [dict(zip(value, said, strict=True)) for said in zip(*parts, strict=True)]
    return value


def _parsed(text: str, key: str) -> Any:
    """What a text of JSON holds, or one of Python or numpy, as pandas writes a list into a table."""
    try:
        return texts.parse_json(text)
    except ValueError as error:
        python = _with_commas(text.strip())
        try:
            return ast.literal_eval(python)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise RowError(
                f"field {key!r} is text, and no JSON: {error}; write it with json.dumps, or the data as JSONL"
            ) from error


def _with_commas(text: str) -> str:
    """A list of numpy as one of Python, which would join texts that no comma parts; any other as it is.

    Raises:
        ElidedError: numpy has left out what is between the ends of a long one.

    >>> _with_commas("['a' 'b']"), _with_commas("{'text': array(['a', 'b'], dtype=object)}")
    ("['a','b']", "{'text':['a','b']}")
    """
    tokens = _TOKEN.findall(text)
    if "".join(tokens) != text:
        return text
    out, within, ended = list[str](), list[str](), False
    for token in tokens:
        if token.isspace():
            continue
        if token == "..." and within:
            raise ElidedError(
                f"{text[:60]!r} has '...' for what numpy left out: write the data anew, as JSONL"
            )
        if ended and within[-1:] == ["["] and token not in ",]":
            out.append(",")
        if token == "array(" or ((token in ")" or "dtype" in token) and within[-1:] == ["array("]):
            within = [*within, token] if token == "array(" else within[:-1]
        else:
            out.append(token)
            within = [*within, token] if token in "[{(" else within[:-1] if token in "]})" else within
        ended = token not in ",:[{(" and token != "array("
    return "".join(out)


def _one_answer(row: Row) -> tuple[str, ...]:
    """Make one text of a row's answer: the first of several right ones, "" of none; say what is left out."""
    if "question" not in row or "answer" not in row:
        return ()
    value = row["answer"]
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("text", "value", "answer") if key in value), value)
    several = isinstance(value, list) and all(isinstance(one, str) for one in value)
    row["answer"] = (value[0] if value else "") if several else value
    if any(_is_talk(row[key]) for key in _AS_MESSAGES):
        row.update({new: row.pop(old) for old, new in _AS_MESSAGES.items()})
    return ("all answers but the first",) if several and len(set(value)) > 1 else ()
