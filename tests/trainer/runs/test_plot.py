"""The picture of a run shows what it says, whatever the losses."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowmem.training.plot import History, loss_curve


def axes_of(history: History, path: Path, monkeypatch: pytest.MonkeyPatch):
    """The axes of the picture that `loss_curve` writes."""
    from matplotlib.figure import Figure

    seen, write = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, file: (seen.append(self), write(self, file)))
    loss_curve(history, "title", path)
    assert path.stat().st_size > 0
    return seen[0].axes[0]


@pytest.mark.parametrize(("first", "last"), [(10.69, 10.57), (4.0, 1.0), (1.0, 5.0)])
def test_labels_lie_below_the_title_and_markers_below_the_top(tmp_path, monkeypatch, first, last):
    history = [{"step": 0, "eval_loss": first}, {"step": 1, "loss": first}, {"step": 2, "eval_loss": last}]
    axes = axes_of(history, tmp_path / "loss.png", monkeypatch)
    low, high = axes.get_ylim()
    assert low < min(first, last)
    assert high > max(first, last)
    assert high - low > 0.05 * max(first, last)  # noise fills no picture
    assert abs(first - last) > 0.05 * (high - low)  # and progress can be seen
    top = axes.get_window_extent().y1
    assert len(axes.texts) == 2
    assert all(text.get_window_extent().y1 <= top for text in axes.texts)


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": float("nan")}]])
def test_nothing_to_draw_is_still_a_picture(tmp_path, monkeypatch, history):
    assert axes_of(history, tmp_path / "loss.png", monkeypatch).get_ylim()[0] == 0
