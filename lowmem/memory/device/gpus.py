"""How much of a card a run may use, and what is taken before its first tensor.

    capacity = usable - context

`usable` is what torch calls the card's capacity; the CUDA context lies outside torch's allocator, the
workspaces of cuBLAS inside: they count among what a run allocates. A table of common cards ships with lowmem
(`configs/gpus.yaml`), its assumptions written in it; a file made by `lowmem calibrate` on the card at hand
replaces them with measured numbers.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from lowmem.errors import UserError, nearest
from lowmem.texts import parse_json

MIB, GIB = 1 << 20, 1 << 30
ROOM = 0.05
"""Share of the capacity that the allocator's fragments take."""
UNITS = {"GiB": GIB, "GB": 10**9, "MiB": MIB, "MB": 10**6, "TiB": 1 << 40}
OTHERS = {
    "ROCm": "4-bit weights need a build of bitsandbytes for it.",
    "Metal": "Unified memory, less what other programs hold; bitsandbytes has no 4 bits there.",
}
"""What else is to be known of the makers whose cards are estimated."""
_CHIP = re.compile(r"(?:apple)?m[1-9](?:pro|max|ultra)?(?:([0-9]+)g(?:i?b)?)?")
_MAKERS = "nvidia|geforce|tesla|quadro|generation|amd|radeon|instinct"
_BOX = re.compile(r"([0-9]*\.?[0-9]+)g(?:i?b)?")
_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*([A-Za-z]*)")


@dataclass(frozen=True)
class Budget:
    """What a run may take, in bytes.

    Args:
        usable: of the card, or what the user gave.
        context: (least, most) outside torch's allocator; equal where measured.
        workspace: of libraries, inside it.
        capability: compute capability of the card; None where none is meant.
        name: of the card, None for a plain number of bytes.
        notes: assumptions, as sentences.
        calibrated: measured on the card at hand.
        estimated: of another maker than the one whose kernels are planned.
        unified: the host's memory is the same.
        cached: a caching allocator hands it out, by segments; False on a CPU.
    """

    usable: int
    context: tuple[int, int]
    workspace: int
    capability: float | None = None
    name: str | None = None
    notes: tuple[str, ...] = ()
    calibrated: bool = False
    estimated: bool = False
    unified: bool = False
    cached: bool = True

    @property
    def outside(self) -> int:
        """Context counted against a run: the middle of the range."""
        return sum(self.context) // 2

    @property
    def capacity(self) -> int:
        """Bytes left for torch's segments, library workspaces among them."""
        return self.usable - self.outside

    @property
    def room(self) -> int:
        """Bytes that tensors may take where nothing is simulated: the allocator's fragments take the rest."""
        return int((1 - ROOM) * self.capacity) if self.cached else self.capacity

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "usable": self.usable,
            "context": list(self.context),
            "workspace": self.workspace,
            "capability": self.capability,
            "calibrated": self.calibrated,
            "estimated": self.estimated,
        }


@functools.cache
def _table() -> Mapping[str, Any]:
    import yaml

    text = resources.files("lowmem.configs").joinpath("gpus.yaml").read_text(encoding="utf-8")
    table: Mapping[str, Any] = yaml.safe_load(text)
    return table


def calibration_file() -> Path:
    """Where `lowmem calibrate` leaves its measurements: one JSON object, card by card."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lowmem" / "calibration.json"


def calibrations(path: Path | None = None) -> Mapping[str, Mapping[str, Any]]:
    """Measured cards by name: usable, context, workspace in bytes, and capability where it was written.

    Empty where nothing was measured.

    Raises:
        UserError: the file is damaged.
    """
    file = path or calibration_file()
    if not file.is_file():
        return {}
    try:
        found: Mapping[str, Mapping[str, Any]] = parse_json(file.read_text(encoding="utf-8"))
        return {
            name: {
                **{key: int(values[key]) for key in ("usable", "context", "workspace")},
                **({"capability": float(values["capability"])} if "capability" in values else {}),
            }
            for name, values in found.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{file} is damaged ({error}): delete it and run `lowmem calibrate` again") from error


def available_gpus() -> dict[str, Budget]:
    """Every known card: the table, with local calibrations on top."""
    return {name: gpu(name) for name in sorted({*_table()["gpus"], *calibrations()})}


def gpu(name: str) -> Budget:
    """A card by name.

    Args:
        name: as in `lowmem gpus`; case, blanks, hyphens and the maker's name do not matter, nor does RTX
            before a number; or the size on the box, as in 24GB.

    Raises:
        UserError: an unknown card, with the nearest match; a family of several sizes, with their names.

    Example:
        >>> gpu("NVIDIA GeForce RTX 4090").name
        'rtx4090'
    """
    measured = calibrations()
    known = {_plain(key): key for key in (*_table()["gpus"], *measured)}
    plain = _plain(name)
    if box := _BOX.fullmatch(re.sub(f"{_MAKERS}|[^a-z0-9.]", "", name.lower())):
        return _of_size(float(box[1]))
    if chip := _CHIP.fullmatch(plain):
        plain = f"apple{chip[1] + 'gb' if chip[1] else ''}"  # its memory is what counts
    makers = ("", "rtx", "rx") if plain else ()
    plain = next((maker + plain for maker in makers if _begins(known, maker + plain)), plain)
    if plain not in known:
        family = sorted(key for short, key in known.items() if plain and short.startswith(plain))
        if len(family) > 1:
            raise UserError(f"GPU {name!r} comes in several sizes: say which of {', '.join(family)}")
        if not family:
            meant = f"rtx{plain}" if plain[:1].isdigit() else name.lower()
            raise UserError(
                f"unknown GPU {name!r}: {nearest(meant, known.values())}, or use --budget 23.5GiB"
            )
        plain = _plain(family[0])
    found = known[plain]
    return _measured(found, measured[found]) if found in measured else _tabled(found)


def limit_of(
    card: str | None, size: str | int | None, capability: float | None, device: str = "cuda"
) -> Budget | None:
    """What a run may take: of a card by name, a number of bytes, or unknown.

    Raises:
        UserError: both are given, or the one is unknown; a card for a run on a CPU.
    """
    if size is not None and card is not None:
        raise UserError("budget and gpu: give one of the two")
    if card is not None and device == "cpu":
        raise UserError(f"gpu {card}: device is cpu, which has no card; give budget, or leave device out")
    if size is not None:
        return budget(size, capability) if device != "cpu" else _of_host(size)
    return None if card is None else gpu(card)


def _of_host(size: str | int) -> Budget:
    """Bytes of a CPU's memory: there is no context, and tensors take what they take."""
    usable, notes = _parse(str(size))
    if not usable:
        raise UserError(f"budget {size}: nothing fits into it; give more, as in 8GiB")
    return Budget(usable, (0, 0), 0, None, None, notes, cached=False)


def _begins(known: Mapping[str, str], plain: str) -> bool:
    return any(short.startswith(plain) for short in known)


def _of_size(gib: float) -> Budget:
    """The least that cards sold with so many GB have."""
    sold = {name: row for name, row in _table()["gpus"].items() if row["nominal"] == gib * 1024}
    cards = {name: row for name, row in sold.items() if _is_cuda(row)}
    if not cards:
        sizes = sorted({row["nominal"] // 1024 for row in _table()["gpus"].values() if _is_cuda(row)})
        raise UserError(
            f"no card with {gib:g} GB is listed, sizes are {', '.join(map(str, sizes))}; "
            f"use --budget {gib:g}GiB"
        )
    least = min(cards, key=lambda name: cards[name]["usable"])
    found = _tabled(least)
    note = f"{gib:g} GB taken as {least}, the smallest of {len(cards)} listed cards of that size; name yours"
    return replace(found, notes=(note, *found.notes))


def _is_cuda(row: Mapping[str, Any]) -> bool:
    return isinstance(row["arch"], (int, float))


def _plain(name: str) -> str:
    short = re.sub(f"{_MAKERS}|[^a-z0-9]", "", name.lower())
    return re.sub(r"(pcie|sxm\d?|hbm\de?)", "", short)


def _measured(name: str, values: Mapping[str, int]) -> Budget:
    context = values["context"]
    note = f"{name}: measured on this machine by `lowmem calibrate`"
    arch = _table()["gpus"].get(name, {}).get("arch")
    capability = values.get("capability", arch if isinstance(arch, float) else None)
    return Budget(values["usable"], (context, context), values["workspace"], capability, name, (note,), True)


HANDLES = 2
"""Of cuBLAS in a run that trains, each with a workspace: the backward pass has a thread of its own."""


def library(capability: float | None) -> int:
    """Bytes that cuBLAS takes inside the allocator of a card with this compute capability; None: unknown."""
    table = _table()["assumptions"]["workspace"]
    return HANDLES * int(table["from-9.0" if (capability or 0.0) >= 9 else "before-9.0"] * MIB)


def _context(capability: float | None) -> tuple[int, int]:
    """Least and most bytes of a CUDA context."""
    table = _table()["assumptions"]["context"]
    low, high = table.get(capability, table["other"])
    return low * MIB, high * MIB


def _tabled(name: str) -> Budget:
    table = _table()
    row = table["gpus"][name]
    if not _is_cuda(row):
        return _estimated(name, row)
    arch = float(row["arch"])
    low, high = _context(arch)
    note = (
        f"{name}: {row['usable'] / 1024:.2f} GiB usable of {row['nominal'] / 1024:g} GiB nominal, without a "
        f"display or other processes; CUDA context {low // MIB} to {high // MIB} MiB; "
        "not measured, run `lowmem calibrate` on the card"
    )
    return Budget(row["usable"] * MIB, (low, high), library(arch), arch, name, (note,))


def _estimated(name: str, row: Mapping[str, Any]) -> Budget:
    """A card of another maker: by the kernels and the allocator of CUDA, with a margin."""
    low, high = _context(None)
    note = (
        f"{name} ({row['arch']}): an estimate, by the kernels and the allocator of CUDA; "
        f"{row['usable'] / 1024:.2f} of {row['nominal'] / 1024:g} GiB usable. {OTHERS[row['arch']]}"
    )
    return Budget(
        row["usable"] * MIB, (low, high), library(None), None, name, (note,), estimated=True,
        unified=row["arch"] == "Metal",
    )  # fmt: skip


def budget(text: str | int, capability: float | None = None) -> Budget:
    """A number of bytes that a run may take, context included.

    Args:
        text: "23.5GiB", "24GB" (10^9), "24564MiB", or a number: GiB up to 4096, bytes above.
        capability: compute capability of the card that is meant, if one is.

    Raises:
        UserError: no number, an unknown unit, or nothing left beside the context.

    Example:
        >>> budget("24GB").usable, budget("24GiB").usable
        (24000000000, 25769803776)
    """
    size, notes = _parse(str(text))
    found = Budget(size, _context(capability), library(capability), capability, None, notes)
    if found.capacity <= found.workspace:
        taken = (found.outside + found.workspace) // MIB
        raise UserError(
            f"budget {text}: context and workspaces alone take about {taken} MiB; give more, as in 8GiB"
        )
    return found


def _parse(text: str) -> tuple[int, tuple[str, ...]]:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"budget {text!r} is no size: write a number and a unit, as in 23.5GiB")
    number, word = float(match[1]), match[2]
    if number >= 2**60:
        raise UserError(
            f"budget {text[:40]}: no machine has so much; write a number and a unit, as in 23.5GiB"
        )
    units = {key.lower(): key for key in UNITS} | {"g": "GiB", "m": "MiB", "gib": "GiB"}
    if not word:
        unit = "B" if number > 4096 else "GiB"
        size = int(number * UNITS.get(unit, 1))
        return size, (f"budget {text} has no unit: taken as {unit} ({size / GIB:.2f} GiB)",)
    if word.lower() not in units:
        raise UserError(f"budget {text!r}: unknown unit {word!r}; {nearest(word, UNITS)}")
    unit = units[word.lower()]
    size = int(number * UNITS[unit])
    if word in ("GB", "MB") or word.lower() == unit.lower() == "gb":
        other = number * GIB if unit == "GB" else number * MIB
        power = 9 if unit == "GB" else 6
        note = f"budget {text} taken literally, 1 {unit} = 10^{power} bytes: {size / GIB:.2f} GiB; "
        return size, (note + f"cards sold as {number:g} GB have up to {other / GIB:.2f} GiB",)
    notes = () if word == unit else (f"budget {text}: {word} taken as {unit} ({size / GIB:.2f} GiB)",)
    return size, notes
