"""The bytes that a method's page states, as a formula of m and n, are those that it holds: of every method.

The formula is read from the page, "Bytes for an (m, n) weight ...: FORMULA", so that it cannot drift apart
from the code. Totals of Llama-2-7B are those of the papers and of published code, worked out by hand.
"""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

import lowmem
from tests.contract.cases import on_any_model

SHAPES = ((200, 300), (311, 193))
ANNOUNCED = re.compile(
    r"Bytes for an \(m, n\) weight[^:]*: (.*?)(?: with |,|;| and |\.$|\. | while | until )"
)
OF_THEIR_OWN = {
    # a formula that is one of several, or has a clause of its own before the colon
    "frugal": "8 m k + 4 k + 4",
    "galore": "4 s r + 8 r l + 4",
    "q_galore": "s r / 2 + 8 ceil(s r / 256) + 28 + 2 (r l + 4 ceil(r l / 256)) + 4",
    "subset_norm": "4 m n + 4 max(m, n) + 4",
    "zo_adamu": "4 m n",
}
NOT_FOR_A_SHAPE = {"microadam": "k of each block's elements: its page says it, and the total below"}


def formula(doc: str) -> str:
    """What a page states, as it stands there."""
    found = ANNOUNCED.search(" ".join(doc.split()) + " ")
    assert found, "a page states its bytes: Bytes for an (m, n) weight: FORMULA."
    return found.group(1)


def evaluated(text: str, names: dict[str, float]) -> float:
    """The value of a formula in which factors stand side by side."""
    text = re.sub(r"\((?:basis|moments|int8)\)", "", text).replace("^", "**")
    text = re.sub(r"(?<=[\w)])\s+(?=[\w(])", "*", text.strip())
    functions = {"ceil": math.ceil, "floor": math.floor, "round": round, "max": max, "min": min}
    return float(eval(text, {"__builtins__": {}}, {**functions, **names}))


def names_of(name: str, strategy: Any, m: int, n: int) -> dict[str, float]:
    """What the letters of a formula stand for."""
    s, options = min(m, n), strategy.options
    rank = options.get("rank", 0)
    a = next(a for a in range(math.isqrt(m * n), 0, -1) if m * n % a == 0)
    r = min(rank, s) if rank >= 1 else round(rank * s)
    k = math.floor(rank * (n if name == "frugal" else m * n)) if rank < 1 else 0
    sizes = {"m": m, "n": n, "d": m * n, "s": s, "l": max(m, n), "r": r, "k": k}
    return {**sizes, "a": a, "b": m * n // a, "probes": options.get("probes", 0)}


@pytest.mark.parametrize("name", sorted(set(on_any_model()) - set(NOT_FOR_A_SHAPE)))
def test_a_page_states_the_bytes_that_are_held(name: str) -> None:
    strategy = lowmem.create(name)
    text = OF_THEIR_OWN.get(name) or formula(lowmem.available()[name].doc)
    for m, n in SHAPES:
        held = lowmem.state_bytes(strategy, (m, n), torch.float32)
        assert held == pytest.approx(evaluated(text, names_of(name, strategy, m, n)), abs=4), text


HIDDEN, INNER, LAYERS, WORDS = 4096, 11008, 32, 32000
LLAMA_2_7B = [
    ((HIDDEN, HIDDEN), "matrix", 4 * LAYERS),
    ((INNER, HIDDEN), "matrix", 2 * LAYERS),
    ((HIDDEN, INNER), "matrix", LAYERS),
    ((HIDDEN,), "vector", 2 * LAYERS + 1),
    ((WORDS, HIDDEN), "embedding", 1),
    ((WORDS, HIDDEN), "head", 1),
]
TOTALS: list[tuple[str, dict[str, Any], float]] = [
    ("adamw", {}, 50.21),
    ("adamw", {"states": "bf16"}, 25.10),
    ("adamw_8bit", {}, 12.75),
    ("adamw_4bit", {}, 6.67),
    ("adamw_4bit_rank1", {}, 6.48),
    ("adafactor", {}, 0.011),
    ("ada_lomo", {}, 0.011),
    ("sm3", {}, 0.011),
    ("sm3", {"momentum": 0.9}, 25.11),
    ("came", {}, 25.12),
    ("adam_mini", {}, 25.11),
    ("smmf", {}, 0.80),
    ("microadam", {}, 5.65),
    ("lion", {"states": "bf16"}, 12.55),
    ("lion", {"states": "int8"}, 6.37),
    ("sgd_sai", {"states": "bf16"}, 12.55),
    ("ademamix", {}, 75.3),
    ("fish_mask", {}, 0.38),
    ("sgd", {}, 0.0),
]


@pytest.mark.parametrize(("name", "options", "gib"), TOTALS, ids=lambda x: str(x))
def test_totals_of_llama_2_7b(name: str, options: dict[str, Any], gib: float) -> None:
    assert sum(math.prod(shape) * count for shape, _, count in LLAMA_2_7B) == 6_738_415_616
    strategy = lowmem.create(name, **options)
    total = sum(
        lowmem.state_bytes(strategy, shape, torch.bfloat16, role=role) * count
        for shape, role, count in LLAMA_2_7B
    )
    assert total / 2**30 == pytest.approx(gib, abs=0.0051 if gib < 1 else 0.051 if gib > 70 else 0.0101)
