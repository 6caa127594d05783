"""What a recipe reports while it works, drawn as bars on stderr, or as lines where that is no terminal."""

from __future__ import annotations

import logging
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lowmem.console import Console

from . import render

_SHOWN = {
    "loss": "loss {:.3f}",
    "eval_loss": "held-out loss {:.3f}",
    "reward": "reward {:.3f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}
_SLOW = 10
"""Tokens per second below which a decimal is shown: a first step that compiles takes minutes."""


def _told(key: str, value: float) -> str:
    """A number with its unit; nothing for a rate that would read as 0."""
    if key == "tokens_per_second" and value < _SLOW:
        return f"{value:.1f} tokens/s" if value >= 0.05 else ""
    return _SHOWN[key].format(value)


class _Said(logging.Handler):
    """Says what the library logs, such as that a first step compiles."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(record.getMessage())


class Bars(Console):
    """A console for recipes; use it as a context manager."""

    def __init__(self) -> None:
        console = render.err_console()
        self._live = console.is_terminal and render.speaks()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._stage = self._note = ""
        self._total: int | None = None
        self._task: TaskID | None = None
        self._said = _Said(self)
        self._level = logging.NOTSET

    def __enter__(self) -> Bars:
        """Begin to draw."""
        logger = logging.getLogger("lowmem")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self._said)
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, *_: Any) -> None:
        """Stop drawing, also after an error."""
        logger = logging.getLogger("lowmem")
        logger.removeHandler(self._said)
        logger.setLevel(self._level)
        self.finish()
        if self._live:
            self._bars.stop()

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        if self._live:
            self._bars.console.print(render.line(text), markup=False)
        else:
            render.say(text)

    def start(self, stage: str, total: int | None = None) -> None:
        """Open a bar, or print its name."""
        self.finish()
        self._stage, self._total, self._note = stage, total, ""
        if self._live:
            self._task = self._bars.add_task(stage, total=total, note="")
        else:
            render.say(stage if total is None else f"{stage}: {total} step{'s' * (total != 1)}")

    def advance(self, done: int, values: dict[str, float]) -> None:
        """Move the bar; without a terminal print a line at each tenth of the stage."""
        shown = (_told(key, values[key]) for key in _SHOWN if key in values)
        self._note = ", ".join(text for text in shown if text) or self._note
        if self._task is not None:
            self._bars.update(self._task, completed=done, note=self._note)
        elif self._total and done % max(1, self._total // 10) == 0:
            render.say(f"  {self._stage} {done}/{self._total} {self._note}".rstrip())

    def finish(self) -> None:
        """Close the bar."""
        if self._task is not None:
            if self._total is None:  # else it stays where it stopped: an interrupted stage is not done
                self._bars.update(self._task, total=1, completed=1)
            self._bars.stop_task(self._task)
        self._task, self._stage, self._total = None, "", None
