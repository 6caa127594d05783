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

    >>> first_line(OSError("disk full\nat 3")), first_line(KeyError())
    ('disk full', 'KeyError')
    """
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """End of an error message: the nearest known name and the whole list.

    >>> nearest("galor", ["adamw", "galore"])
    "did you mean 'galore'? Known: adamw, galore"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"


def ran_out_of_room(error: BaseException) -> bool:
    """Whether a failed save is the disk's fault; torch reports a full disk as RuntimeError."""
    text = str(error).lower()
    marks = (
        "no space left",
        "inline_container",
        "write failed",
        "i/o error",
        "pytorchstreamwriter",
        "quota exceeded",
    )
    return isinstance(error, OSError) or any(mark in text for mark in marks)
