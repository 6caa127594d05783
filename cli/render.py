"""The only printer of the command line.

`emit` prints a result to stdout: tables for people, or one JSON document. Everything else
(progress, notes, warnings, errors) goes to stderr, so stdout can be piped.

What stands in data, names and prompts may steer a terminal. Whatever is printed goes through
`clean`, which writes control characters out; a line of an error or a note is cut in its middle.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lowmem.report.document import plain

LINE = 300  # characters of an error or a note
# Controls but tab and newline, what turns the direction of a line around, and halves of characters.
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

_stdout: TextIO | None = None  # the stream reserved for results while a command runs


def clean(text: str) -> str:
    r"""A text that cannot steer a terminal: each such character as its escape.

    >>> clean("a\x1b[2Jb")
    'a\\x1b[2Jb'
    """
    return _STEERING.sub(_escape, text)


def line(text: str, most: int = LINE) -> str:
    """A text as one clean line of at most `most` characters; one that is too long loses its middle.

    >>> line("what was given, " * 4 + "what to do", 40)
    'what was given, what w ... n, what to do'
    """
    if len(text) > 100 * most:  # a whole book may have been given
        text = text[: 50 * most] + text[-50 * most :]
    whole = clean(text).replace("\n", " ")
    tail = most // 3
    return (
        whole if len(whole) <= most else f"{whole[: most - tail - 5].rstrip()} ... {whole[-tail:].lstrip()}"
    )


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


@contextmanager
def reserved_stdout() -> Iterator[None]:
    """Keep stdout for `out` and `emit`; what anybody else prints there goes to stderr.

    A real file descriptor 1 is redirected too: compilers and worker processes write to it directly.
    """
    global _stdout
    before, real = _stdout, _descriptor(sys.stdout) == 1
    sys.stdout.flush()
    saved = os.dup(1) if real else -1
    _stdout = os.fdopen(saved, "w", encoding=sys.stdout.encoding, errors="replace") if real else sys.stdout
    if real:
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        stream, _stdout = _stdout, before
        stream.flush()
        if real:
            os.dup2(saved, 1)
            stream.close()


def reopen() -> None:
    """Give a process that was started with closed streams, as by `>&-`, others that keep nothing.

    Python has None in their place; the next file that is opened would get their number, and what
    is printed with it.
    """
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_WRONLY)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, "w"))


def _descriptor(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return -1


def out_console() -> Console:
    """Console on the reserved stdout."""
    stream = _stdout or sys.stdout
    # Piped output is read by programs and diffed by tests: a fixed width, no colour.
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False, soft_wrap=False)


def err_console() -> Console:
    """Console on stderr, for progress and notes."""
    return Console(file=sys.stderr, highlight=False, soft_wrap=True)


def out(*renderables: RenderableType) -> None:
    """Print results for people to stdout."""
    console = out_console()
    for renderable in renderables:
        if isinstance(renderable, str):  # as it is: paths and Markdown survive a narrow terminal
            console.print(Text(clean(renderable)), soft_wrap=True)
        else:
            console.print(renderable)


def stream(text: str) -> None:
    """Write a piece of a result to stdout as it comes, without a line's end."""
    target = _stdout or sys.stdout
    target.write(text)
    target.flush()


def speaks() -> bool:
    """Whether this process tells what happens: of several that `torchrun` starts the first one."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print one note to stderr."""
    if speaks():
        err_console().print(Text(line(text)))


def warning(text: str) -> None:
    """Print one warning line to stderr."""
    err_console().print(Text.assemble(("warning: ", "yellow"), line(" ".join(text.split()), LINE - 9)))


def error(text: str) -> None:
    """Print one error line to stderr."""
    err_console().print(Text.assemble(("error: ", "bold red"), line(" ".join(text.split()), LINE - 7)))


def emit(document: Any, table: RenderableType | Sequence[RenderableType] | None, as_json: bool) -> None:
    """Print a command's result: `document` as JSON, or `table` (one renderable or several) for people."""
    if as_json:
        stream = _stdout or sys.stdout
        text = json.dumps(plain(document), indent=2, ensure_ascii=False, allow_nan=False)
        stream.write(_STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n")
        stream.flush()
    elif table is not None:
        several = isinstance(table, Sequence) and not isinstance(table, str)
        out(*(table if several else [table]))  # type: ignore[misc]


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], right: Sequence[str] = ()
) -> Table:
    """A table; columns named in `right` are aligned to the right.

    Args:
        title: shown above; empty for none.
        columns: headings.
        rows: cells; None is shown as a dash.
        right: headings of numeric columns.
    """
    heading = Text(clean(title)) if title else None
    result = Table(title=heading, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for column in columns:
        result.add_column(
            Text(clean(column)), justify="right" if column in right else "left", overflow="fold"
        )
    for row in rows:
        result.add_row(*(Text("-" if cell is None else clean(str(cell))) for cell in row))
    return result


def size(count: int | float | None) -> str:
    """Bytes for people, in binary units.

    >>> size(489245184)
    '466.6 MiB'
    """
    if count is None:
        return "-"
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def seconds(count: float | None) -> str:
    """A duration for people.

    >>> seconds(137.2)
    '2 min 17 s'
    """
    if count is None:
        return "-"
    if count < 60:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
