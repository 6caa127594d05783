"""The table of docs/guides/reduce.md, from what the recipe `memory_matrix` measured: `python docs/levers.py`.

Each row is one change of plain AdamW; rows of 64 tokens, where state binds, beside rows of 256, where the
loss does.
"""

from __future__ import annotations

import sys
from pathlib import Path

MEASURED = Path(__file__).parents[1] / "configs" / "measured" / "memory_matrix.md"
MODEL, BATCHES = "llama", ("2 x 64", "4 x 256")
LEVERS = (
    ("plain AdamW", ("adamw", "no", "no")),
    ("`--optim adamw_8bit`", ("adamw_8bit", "no", "no")),
    ("`--optim adafactor`", ("adafactor", "no", "no")),
    ("`--optim mezo`, no gradients", ("mezo", "no", "no")),
    ("`--gradient-release`", ("adamw", "no", "yes")),
    ("`--gradient-checkpointing`", ("adamw", "yes", "no")),
    ("checkpointing and release", ("adamw", "yes", "yes")),
    ("both, and `adafactor`", ("adafactor", "yes", "yes")),
)


def measured() -> dict[tuple[str, ...], tuple[float, str]]:
    """Peak in MiB and where it is, by strategy, checkpointing, release and batch."""
    found = {}
    for line in MEASURED.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and cells[0] == MODEL:
            found[tuple(cells[1:5])] = (float(cells[6]), cells[8])
    return found


def table() -> str:
    """The Markdown: what is left of plain AdamW's peak, and what binds then."""
    found = measured()
    heads = [f"{batch}: peak, of AdamW's | peak at" for batch in BATCHES]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * (2 * len(BATCHES))]
    for name, key in LEVERS:
        cells = []
        for batch in BATCHES:
            (peak, at), (plain, _) = found[(*key, batch)], found[(*LEVERS[0][1], batch)]
            cells.append(f"{peak:.1f} MiB, {peak / plain:.0%} | {at}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
