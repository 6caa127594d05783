"""The picture of a run: training loss by step, and the held-out loss beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

History = Sequence[Mapping[str, Any]]


def loss_curve(history: History, title: str, path: Path) -> None:
    """Draw the logged losses of a run to a PNG.

    Args:
        history: the Trainer's log; entries with "step" and "loss" or "eval_loss".
        title: above the picture.
        path: of the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no window and no global state of pyplot
    axes = figure.add_subplot()
    steps, losses = _series(history, "loss")
    many = len(steps) > 12
    axes.plot(steps, losses, color="#9db8d9", linewidth=1.0, label="training, each log")
    if many:
        axes.plot(steps, _smooth(losses), color="#1f5fa8", linewidth=2.0, label="training, smoothed")
    steps, losses = _series(history, "eval_loss")
    if steps:
        line = "--" if len(steps) > 2 else ""  # two points are no curve
        axes.plot(steps, losses, color="#c1440e", marker="o", linestyle=line, linewidth=1.4, label="held out")
        _label_ends(axes, steps, losses)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per label token)")
    axes.margins(x=0.06, y=0.12)
    axes.set_ylim(bottom=0, top=_top(history))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


def _top(history: History) -> float | None:
    """Above the highest loss, with room for a marker and its label; None leaves it to matplotlib."""
    drawn = [value for key in ("loss", "eval_loss") for value in _series(history, key)[1]]
    highest = max(filter(math.isfinite, drawn), default=0.0)
    return 1.12 * highest if highest > 0 else None


def _label_ends(axes: Any, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Write the first and the last held-out loss beside their points."""
    for index in sorted({0, len(steps) - 1}):
        axes.annotate(
            f"{losses[index]:.3f}",
            (steps[index], losses[index]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            color="#c1440e",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )


def _series(history: History, key: str) -> tuple[list[int], list[float]]:
    found = [(int(entry["step"]), float(entry[key])) for entry in history if key in entry]
    return [step for step, _ in found], [value for _, value in found]


def _smooth(values: Sequence[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, started without bias."""
    total, weight, smoothed = 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        smoothed.append(total / weight)
    return smoothed
