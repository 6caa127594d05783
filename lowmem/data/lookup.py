"""Where data is: the demo data, a file, a folder, or the Hub; and which splits it has there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from lowmem.data.files import hub as hub_data
from lowmem.data.files.folders import listed
from lowmem.data.files.readers import held, look, read_path
from lowmem.data.files.source import Place, Row
from lowmem.errors import UserError, nearest

DEMO = ("factbook",)


def load_rows(name_or_path: str, split: str = "train") -> Iterator[tuple[Place, Row]]:
    """Raw rows one by one, each with its place, as they stand in the file or on the Hub.

    Raises:
        UserError: nothing of that name, no such split, or a damaged file.
    """
    path = local_path(name_or_path)
    if path is not None:
        yield from read_path(path, split)
    else:
        check_name(name_or_path)
        yield from hub_data.read_hub(name_or_path, split)


def check_name(name_or_path: str) -> None:
    """Look whether there may be data of a name; nothing is read, and nobody asked.

    Raises:
        UserError: neither a file, nor a folder, nor like a name on the Hub.
    """
    path = local_path(name_or_path)
    if path is not None:
        look(path)
    elif not hub_data.looks_like_hub(name_or_path):
        kind = "file or folder" if Path(name_or_path).suffix or "/" in name_or_path else "data"
        raise UserError(
            f"no {kind} {name_or_path!r}: give a file, a folder, a Hub name (owner/name) or the demo data; "
            f"{nearest(name_or_path, DEMO)}"
        )


def splits(name_or_path: str) -> tuple[str, ...]:
    """Splits that a path has: those that files, folders above them or keys are named after, else `train`.

    >>> splits("factbook")
    ('heldout', 'heldout_reserved', 'train', 'validation')
    """
    return tuple(sorted(files_by_split(name_or_path)))


def files_by_split(name_or_path: str) -> dict[str, tuple[str, ...]]:
    """The same, with the names of the files; on the Hub there are none to name."""
    path = local_path(name_or_path)
    if path is None:
        return {"train": ()}
    return {split: tuple(file.name for file in files) for split, files in held(path).splits.items()}


def local_path(name_or_path: str) -> Path | None:
    """The local path that is meant, None for what is not one."""
    if name_or_path in DEMO:
        folder = resources.files("lowmem.configs") / "data" / name_or_path
        return Path(str(folder))
    path = Path(name_or_path).expanduser()
    return path if path.exists() else None


def files_read(name_or_path: str, places: Iterable[Place]) -> tuple[tuple[str, int], ...]:
    """The files of a folder that were read, and the records of each."""
    path = local_path(name_or_path)
    if path is None or not path.is_dir():
        return ()
    counts = Counter(place.source for place in dict.fromkeys(places))
    return tuple((source.removeprefix(f"{path}/"), count) for source, count in counts.items())


def not_read(name_or_path: str) -> tuple[str, ...]:
    """A note about what a folder holds beside its splits."""
    path = local_path(name_or_path)
    left = held(path).left_out if path is not None else ()
    return (f"not read: {listed(left)}",) if left else ()
