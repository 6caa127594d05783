"""How the state of one tensor is cut for a rule and a writer.

What a step does not change, such as the views of a state, costs as much as a small
kernel when it is found anew for every tensor at every step. A `Layout` is found
once and kept with the state (`Held`), whose tensors stay what they are.
"""

from __future__ import annotations

from torch import Tensor

from lowmem.optim.contract import Pointwise
from lowmem.optim.engine.cutting import pad, pieces
from lowmem.optim.terms.state import Held, State
from lowmem.optim.writers import Writer

ROW = 256
"""Elements of a row of a compiled chunk where the rule has no blocks."""

Views = list[Tensor]
Padded = list[tuple[Tensor, Tensor]]


class Layout:
    """Where the pieces of a state are, chunk by chunk.

    Args:
        rule, writer: whose state it is; None for none.
        s: the rule's state and constants; extra: the writer's state.
        live: chunks are compiled.
    """

    def __init__(
        self, rule: Pointwise | None, writer: Writer | None, s: State, extra: State, live: bool
    ) -> None:
        self.live = live
        self.keys = tuple(s)
        self.streams = (rule.streams if rule else ()) + (writer.streams if writer else ())
        # elements have places where something is drawn for them, or where columns have ages of their own
        self.placed = bool(self.streams) or ("age" in s and s["age"].dim() > 0)
        self.grain = rule.grain if rule else 1
        per, fill = (rule.per, rule.fill) if rule else ({}, {})
        self._parts = [(s[key], per.get(key, 0), fill.get(key, 0)) for key in self.keys]
        self._parts += [(tensor, writer.per.get(key, 1), 0) for key, tensor in extra.items() if writer]
        self._views: dict[tuple[int, int, int], Views] = {}

    def width(self, size: int) -> int:
        """Elements of a row of a chunk."""
        if self.grain > 1:
            return self.grain
        return ROW if self.live else size

    @staticmethod
    def _seen(rows: int, entries: int) -> tuple[int, int]:
        """A state of one dimension by the rows of a chunk, unless an entry is of several rows."""
        return (rows, entries // rows) if entries % rows == 0 else (entries, 1)

    def cut(self, start: int, length: int, size: int, width: int = 0) -> tuple[Views, Padded]:
        """Views of the state for one chunk; where it must be padded, copies and where they go back.

        Args:
            start, length: the elements of the chunk; size: with padding.
            width: of a row; what is usual, if 0.
        """
        rows = size // (width or self.width(size))
        if (start, size, rows) in self._views:
            return self._views[start, size, rows], []
        views: Views = []
        back: Padded = []
        for tensor, per, fill in self._parts:
            if not per:
                views.append(tensor)
                continue
            piece = pieces(tensor, per, start, length)
            entries = -(-size // per)
            if piece.shape[0] != entries:
                padded = pad(piece, entries, fill)
                back.append((piece, padded))
                piece = padded
            views.append(piece.view(*self._seen(rows, entries)) if piece.dim() == 1 else piece)
        if not back:
            self._views[start, size, rows] = views
        return views, back


def layout(rule: Pointwise | None, writer: Writer | None, s: State, extra: State, live: bool) -> Layout:
    """The layout of a state, kept with it where it is `Held`."""
    if not isinstance(s, Held) or (writer and writer.beside):  # what is beside a weight is not of its state
        return Layout(rule, writer, s, extra, live)
    key = (id(rule), id(writer), live)
    if key not in s.layouts:
        s.layouts[key] = Layout(rule, writer, s, extra, live)
    found: Layout = s.layouts[key]
    return found
