"""A part of a search in a second process, so that two cores share it.

    parent    methods that share the traces of all weights; then the other shares, the last first
    child     the other shares, the first first    -> the rows of each, by a pipe

The parent takes what is there and never waits. The child is started anew (no fork: torch has threads), before
anything heavy is imported here, and ends with its parent. Where it gives nothing (out of memory, an error),
the parent comes to all shares itself, and to the error.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from lowmem.memory.advice.search import Rows


class Beside:
    """Rows of a search that a process of its own looks for.

    Args:
        asked: what `aside` is called with; it is sent, so a model object must be picklable.
    """

    def __init__(self, **asked: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe(duplex=False)
        self._process = context.Process(target=_send, args=(there, asked), daemon=True)
        self._process.start()
        there.close()

    def rows(self) -> Rows:
        """Those that have come since the last call."""
        found: Rows = {}
        try:
            while self._here.poll():
                found |= self._here.recv()
        except (EOFError, OSError):  # it has ended
            pass
        return found

    def stop(self) -> None:
        """End the process, whatever it does."""
        self._here.close()
        self._process.kill()
        self._process.join()


def _send(there: Connection, asked: Mapping[str, Any]) -> None:
    """Look for rows and send them, without a word: what goes wrong is said by the parent."""
    from lowmem.models.quiet import LOGGERS

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        from lowmem.memory.advice.search import aside

        for rows in aside(**asked):
            there.send(rows)
    except Exception:
        return
