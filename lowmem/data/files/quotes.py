r"""Quoted fields of a table, rewritten where their author has other habits than its reader.

    "He said \"hi\"",ok          \" for a quote inside; the reader knows ""
    q1, "yes, no"               a blank before the quote: the reader takes it for a word

Neither can be told from a field that means it so by itself; but where a quoted field goes on
behind its closing quote, or never closes, the reader would drop quotes in silence.
"""

from __future__ import annotations

import re

from lowmem.errors import UserError

_DOUBLED, _ESCAPED = r'[^"]++|""', r'[^"\\]++|\\.|""'


def rewritten(text: str, separator: str, source: str) -> str:
    r"""A table's text with quoted fields as its reader takes them; lines keep their numbers.

    Args:
        text: of the whole table.
        separator: between its fields.
        source: what an error calls the table.

    Raises:
        UserError: a quoted field that goes on behind its closing quote.

    Example:
        >>> print(rewritten('a, b\n"so \\"it\\" is", "yes, no"', ",", "a.csv"))
        a, b
        "so ""it"" is","yes, no"
    """
    if '"' not in text:
        return text
    inner = _ESCAPED if _has_escapes(text, separator) else _DOUBLED

    def field(match: re.Match[str]) -> str:
        lead, said, closed, rest = match.groups()
        if not closed or rest.strip():
            if closed and not lead.endswith(" "):
                raise UserError(_goes_on(source, text.count("\n", 0, match.end(2)) + 1, rest))
            return match[0]
        return f'{lead.rstrip(" ")}"{_plain(said) if inner == _ESCAPED else said}"'

    return _quoted(separator, inner).sub(field, text)


def _quoted(separator: str, inner: str) -> re.Pattern[str]:
    """A quoted field: what stands before it, its text, its closing quote, and what follows up to the next."""
    mark = re.escape(separator)
    return re.compile(rf'((?:\A|[{mark}\n]) *)"((?:{inner})*+)("?)([^{mark}\n]*)', re.DOTALL)


def _has_escapes(text: str, separator: str) -> bool:
    r"""Whether \" stands for a quote: a field with one goes on behind what would be its end."""
    if '\\"' not in text:
        return False
    fields = _quoted(separator, _DOUBLED).finditer(text)
    return any('\\"' in field[0] and (not field[3] or field[4].strip()) for field in fields)


def _plain(said: str) -> str:
    r"""The text of a field with its quotes doubled: \" is one, \\ a backslash, \n and others as they are."""
    return re.sub(r'\\(["\\])', lambda match: '""' if match[1] == '"' else "\\", said)


def _goes_on(source: str, line: int, rest: str) -> str:
    return (
        f"{source}, line {line}: a field in quotes is followed by {rest.strip()[:40]!r}: "
        'write a " inside of such a field as ""'
    )
