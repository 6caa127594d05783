"""The picture of a run: training loss by step, and the held-out loss beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

History = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Colours:
    """Of page, writing, grid, logged and smoothed losses, and held-out losses."""

    page: str
    ink: str
    grid: str
    logged: str
    smooth: str
    held_out: str


LIGHT = Colours("#ffffff", "#1f2328", "#b0b7c0", "#9db8d9", "#1f5fa8", "#c1440e")
DARK = Colours("#0f1319", "#e6edf3", "#4b5665", "#41648c", "#6db0f2", "#ea7a55")


def loss_curve(history: History, title: str, path: Path, colours: Colours = LIGHT) -> None:
    """Draw the logged losses of a run to a PNG.

    Args:
        history: the Trainer's log; entries with "step" and "loss" or "eval_loss".
        title: above the picture.
        path: of the file.
        colours: LIGHT, or DARK for dark pages.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 4.2), dpi=130, layout="constrained", facecolor=colours.page)
    FigureCanvasAgg(figure)  # no window and no global state of pyplot
    axes = figure.add_subplot(facecolor=colours.page)
    steps, losses = _series(history, "loss")
    many = len(steps) > 12
    axes.plot(steps, losses, color=colours.logged, linewidth=1.0, label="training, each log")
    if many:
        axes.plot(steps, _smooth(losses), color=colours.smooth, linewidth=2.0, label="training, smoothed")
    steps, losses = _series(history, "eval_loss")
    if steps:
        line = "--" if len(steps) > 2 else ""  # two points are no curve
        drawn = axes.plot(steps, losses, color=colours.held_out, marker="o", label="held out")
        drawn[0].set(linestyle=line, linewidth=1.4)
        _label_ends(axes, steps, losses, colours)
    axes.set(title=title, xlabel="optimizer step", ylabel="loss (nats per label token)")
    axes.margins(x=0.06, y=0.12)
    axes.set_ylim(*_limits(history))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _dress(axes, colours)
    figure.savefig(path)


def _dress(axes: Any, colours: Colours) -> None:
    """Grid, frame, legend and writing in the colours of the page."""
    axes.grid(color=colours.grid, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(colours.ink)
    axes.tick_params(colors=colours.ink)
    for words in (axes.title, axes.xaxis.label, axes.yaxis.label):
        words.set_color(colours.ink)
    axes.legend(frameon=False, labelcolor=colours.ink)


def _limits(history: History) -> tuple[float | None, float | None]:
    """From below the lowest to above the highest loss, with room for a marker and its label.

    The axis spans a tenth of the loss at least, so that noise does not look like progress, and begins at
    zero only where that hides none. None leaves it to matplotlib.
    """
    drawn = [value for key in ("loss", "eval_loss") for value in _series(history, key)[1]]
    finite = [value for value in drawn if math.isfinite(value)]
    if not finite or max(finite) <= 0:
        return 0.0, None
    low, high = min(finite), max(finite)
    span = max(high - low, 0.1 * high)
    return max(0.0, low - 0.5 * span), high + 0.2 * span


def _label_ends(axes: Any, steps: Sequence[int], losses: Sequence[float], colours: Colours) -> None:
    """Write the first and the last held-out loss beside their points."""
    for index in sorted({0, len(steps) - 1}):
        axes.annotate(
            f"{losses[index]:.3f}",
            (steps[index], losses[index]),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            color=colours.held_out,
            bbox={"facecolor": colours.page, "edgecolor": "none", "alpha": 0.8, "pad": 1},
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
