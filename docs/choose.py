"""The table of docs/guides/choose.md, made by the planner: `python docs/choose.py --write` (some minutes).

A cell is the first row of the planner's search that fits, among the methods that need least explanation;
where none trains all weights, adapters. Verdicts are those of the tensors of a few layers, with room for the
allocator, which is not simulated here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("guides") / "choose.md"
BEGIN, END = "<!-- table: made by docs/choose.py -->", "<!-- end of table -->"
MODELS = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b")
CARDS = {"8 GB": "rtx4060", "16 GB": "rtx4080", "24 GB": "rtx4090", "48 GB": "l40s"}
OPTIONS: dict[str, Any] = {"seq_len": 1024}
AMONG = ("adamw", "adamw_8bit", "lion", "galore", "apollo_mini", "adafactor")
SHORT = {"checkpointing": "C", "release": "R", "activation offload": "O", "chunked loss": "L"}


def cell(model: str, card: str) -> str:
    """What the search finds first."""
    from lowmem.memory.advice.search import search
    from lowmem.memory.device.gpus import gpu

    for full in (True, False):
        row = search(model, gpu(card), OPTIONS, full=full, among=AMONG, top=0)[0]
        if row.verdict == "fits":
            levers = "".join(SHORT[lever] for lever in row.levers)
            what = row.strategy.name
            if row.run.adapts or row.run.weights:
                what += f", {row.trains.removeprefix('all weights, ')}"
            return f"{what} +{levers}" if levers else what
    return "-"


def table(cells: Sequence[Sequence[str]]) -> str:
    """The Markdown of all cells, a row for each model."""
    head = ["| | " + " | ".join(CARDS) + " |", "|---|" + "---|" * len(CARDS)]
    return "\n".join(
        [*head, *(f"| {m} | " + " | ".join(row) + " |" for m, row in zip(MODELS, cells, strict=True))]
    )


def written() -> list[list[str]]:
    """The cells that the page has."""
    lines = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    return [[part.strip() for part in line.strip("|").split("|")][1:] for line in lines[2:]]


def main(arguments: Sequence[str]) -> None:
    """Make the table; print it, or write it into the page."""
    cells = []
    for model in MODELS:
        cells.append([cell(model, card) for card in CARDS.values()])
        sys.stderr.write(f"{model}: {cells[-1]}\n")
    if "--write" not in arguments:
        sys.stdout.write(table(cells) + "\n")
        return
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(cells)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
