"""The page of what a step of each method takes, beside every package that has the method.

step = plain + (with refresh - plain) / gap        where a basis is found anew
of AdamW's = step / torch's fused AdamW            both of one contest, in turn
of the fastest peer's = step / its step
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

FUSED = "torch AdamW fused"
"""Who takes part in every contest."""
OWN = {"adamw": (FUSED,)}
"""Methods of which that is a peer."""
SLOW = 6.0
"""Times torch's fused AdamW, above which a row wants a reason."""
UNKNOWN = "no reason is known"
COMMAND = "python -m lowmem.recipes.speed --output-dir speed"
HEAD = ("method", "ms", "of AdamW's", "fastest peer", "of its step", "other peers, ms")


def step(row: Row) -> float:
    """Milliseconds of a step, the refresh taken in."""
    plain = float(row["milliseconds"]["lowmem"])
    refresh = row["refresh"]
    return plain + max(0.0, refresh["milliseconds"] - plain) / refresh["gap"] if refresh else plain


def peers(row: Row) -> dict[str, float]:
    """Milliseconds of the packages that have the method, the fastest first."""
    every = row["milliseconds"]
    named = [name for name in every if name not in ("lowmem", FUSED)] + list(OWN.get(row["method"], ()))
    return dict(sorted(((name, every[name]) for name in named), key=lambda one: float(one[1])))


def slow(row: Row) -> bool:
    """Whether a row wants a reason: above its limit, or slower than the fastest peer."""
    return step(row) > SLOW * row["milliseconds"][FUSED] or any(step(row) > ms for ms in peers(row).values())


def markdown(document: Mapping[str, Any]) -> str:
    """The page of what the recipe found.

    Args:
        document: "machine", "parameters", "rows", "why" and perhaps "left_out".

    Example:
        >>> "Not yet measured" in markdown({"rows": []})
        True
    """
    lines = ["# The step of every method", ""]
    if not document["rows"]:
        return "\n".join([*lines, "Not yet measured.", ""])
    rows = sorted(document["rows"], key=lambda row: step(row) / row["milliseconds"][FUSED])
    lines += [*_about(document), "", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in rows]
    lines += [line for told in (_slow(rows, document["why"]), _missing(document)) for line in told]
    return "\n".join(lines) + "\n"


def _about(document: Mapping[str, Any]) -> list[str]:
    machine = document["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "python"))
    return [
        f"Made by `{COMMAND}`, then `--page docs/speed.md --of configs/measured/speed.json`.",
        f"One optimizer step of {document['parameters'] / 1e6:.1f} million fp32 weights in the shapes of a "
        "Llama, without the passes that make gradients. A contest is a method, its peers and torch's fused "
        "AdamW, each once a round in turn, and the medians of the rounds; milliseconds of two contests are "
        "not to be compared. A refresh is taken in at the method's own gap; that of peers is not.",
        f"{machine['device']}; {machine['date']}; {versions}.",
    ]


def _cells(row: Row) -> tuple[str, ...]:
    ours, others = step(row), list(peers(row).items())
    first = [f"{others[0][0]}, {others[0][1]:.1f} ms", f"{ours / others[0][1]:.2f}"] if others else ["", ""]
    more = ", ".join(f"{name} {ms:.1f}" for name, ms in others[1:])
    return (f"`{row['method']}`", f"{ours:.1f}", f"{ours / row['milliseconds'][FUSED]:.2f}", *first, more)


def _slow(rows: Iterable[Row], why: Mapping[str, str]) -> list[str]:
    """Methods by reason."""
    named: dict[str, list[str]] = {}
    for row in filter(slow, rows):
        named.setdefault(why.get(row["method"], UNKNOWN), []).append(f"`{row['method']}`")
    said = [f"- {', '.join(names)}: {reason}" for reason, names in named.items()]
    return ["", f"Above {SLOW:g} times AdamW's step, or above a peer's:", "", *said] if said else []


def _missing(document: Mapping[str, Any]) -> list[str]:
    said = [f"- {name}: {why}" for row in document["rows"] for name, why in row["missing"].items()]
    said += [f"- `{name}`: {why}" for name, why in document.get("left_out", {}).items()]
    return ["", "Left out:", "", *dict.fromkeys(said)] if said else []
