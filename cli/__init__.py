"""The command line: `lowmem COMMAND`, one file per command, in rooms by what a user is about to do.

A file `cli/NAME.py` with a function `command` is the command `lowmem NAME`: it parses,
calls one library function or recipe, and hands the result to `render`, the only printer.
A room is a heading of `lowmem --help`, and its files are commands as well.
Heavy packages are imported inside `command`, so that `--help` stays instant.
"""

from __future__ import annotations

from .app import app

__all__ = ["app"]
