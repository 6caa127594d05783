"""Errors of lowmem.

    LowMemError
      UserError            the user can mend it: one line saying what and how; the CLI exits with 2
        KindError          something of a type that cannot stand there; also a TypeError
        ConfigError        every problem of a configuration at once
        CheckpointError    a damaged, partial or foreign checkpoint

A message says what was given, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class LowMemError(Exception):
    """Base of all errors raised on purpose."""


class UserError(LowMemError, ValueError):
    """Something the user can mend."""


class KindError(UserError, TypeError):
    """Something of a type that cannot stand there."""


class ConfigError(UserError):
    """All problems of one configuration.

    Args:
        problems: one sentence each.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems))


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed from."""


@contextmanager
def as_ours() -> Iterator[None]:
    """Raise what another package says of the user's arguments as errors of ours, which are its own kind too.

    >>> with as_ours():
    ...     int([])
    Traceback (most recent call last):
    lowmem.errors.KindError: int() argument must be a string, a bytes-like object or a real number, not 'list'
    """
    try:
        yield
    except UserError:
        raise
    except TypeError as error:
        raise KindError(str(error)) from error
    except ValueError as error:
        raise UserError(str(error)) from error


def first_line(error: BaseException) -> str:
    r"""What another package's error says, in one line; its class where it says nothing.

    >>> first_line(OSError("disk full\nat 3")), first_line(KeyError()), first_line(ValueError("of size:\n 3"))
    ('disk full', 'KeyError', 'of size: 3')
    """
    line, *rest = str(error).strip().splitlines() or [""]
    return (f"{line} {rest[0].strip()}" if rest and line.endswith(":") else line) or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the nearest known name and the whole list.

    >>> nearest("galor", ["adamw", "galore"])
    "did you mean 'galore'? Known: adamw, galore"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_MARKS = (
    "no space left",
    "disk quota",
    "write failed",
    "i/o error",
    "iostream error",
    "pytorchstreamwriter",
    "enforce fail at inline_container",
    "no usable temporary directory",
)


def ran_out_of_room(error: BaseException) -> str | None:
    r"""The line that says that a disk is full, of this error or of what led to it; None for other errors.

    Packages hide it: torch and safetensors have classes of their own, a compiler prints it, and Python
    finds no usable temporary folder.

    >>> ran_out_of_room(RuntimeError("C++ compile error\ncc1plus: No space left on device"))
    'cc1plus: No space left on device'
    """
    if isinstance(error, OSError) and error.errno in _ROOM:
        return f"{error.strerror}{f': {error.filename}' if error.filename else ''}"
    for line in str(error).splitlines():
        said = line.lower()
        if any(mark in said for mark in _MARKS) and "reader" not in said:  # that one read a damaged file
            return line.strip()[:200]
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return ran_out_of_room(before) if before is not None else None
