"""What a long job tells the person who started it.

Recipes never print: they call a `Console`, and whoever started the job decides
what to show. The base class shows nothing, so a recipe called from Python is
silent; the command line passes one that draws bars, a notebook can pass its own.
One stage is open at a time.
"""

from __future__ import annotations


class Console:
    """Receiver of a job's events; each method does nothing unless overridden.

    >>> class Log(Console):
    ...     def say(self, text: str) -> None:
    ...         print(text)
    >>> Log().say("data: 3 rows of question/answer")
    data: 3 rows of question/answer
    """

    def say(self, text: str) -> None:
        """Tell one thing worth knowing (a format found, a checkpoint skipped), one line."""

    def start(self, stage: str, total: int | None = None) -> None:
        """Open a stage ("evaluate before", "train", ...) of `total` units, None where unknown."""

    def advance(self, done: int, values: dict[str, float]) -> None:
        """Report `done` units of the open stage, with what was measured last (loss, learning_rate, ...)."""

    def finish(self) -> None:
        """Close the open stage."""
