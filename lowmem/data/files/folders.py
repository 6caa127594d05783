"""Which files of a folder are data, and which split each of them belongs to.

A split is named by a word of a file's name or of the folders above it: `test.jsonl`,
`my_test.csv`, `eval-set/a.json`, `default/train/0000.parquet`. Where a name says two things
(`test/train.jsonl`), it is not training data. What is named after no split is training data
only where nothing else is: beside a file that says `train` it is left out.

Not data are hidden files, descriptions (README, LICENSE), and texts beside rows. Whatever
is left out is named: nobody should believe to have trained on it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from lowmem.data.files.source import suffixes
from lowmem.errors import UserError

TEXTS = (".txt", ".md")
SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "validate": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "devel": "validation",
    "development": "validation",
    "eval": "validation",
    "evaluation": "validation",
    "heldout": "heldout",
    "holdout": "heldout",
    "test": "test",
    "testing": "test",
}  # word of a name -> split
_WORD = re.compile(
    rf"({'|'.join(sorted(SPLITS, key=len, reverse=True))})(s|set|sets|data|dataset|split|file)?"
)
_DESCRIPTIONS = re.compile(r"(readme|licen[cs]e|changelog|contributing|notice|citation|data.?card)\b.*", re.I)
_OF_DATASETS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
_OTHER_DATA = re.compile(
    r"\.(arff|avro|db|feather|h5|hdf5|lz4|mat|msgpack|np[yz]|ods|orc|pick?le?|pkl|pt|rar|rds|sqlite3?"
    r"|tar|tfrecord|tgz|xlsx?|xml|7z|zip)(\.\w+)?"
)


@dataclass(frozen=True)
class DataFile:
    """One file of rows, or one folder that `datasets` saved.

    Attributes:
        path: where it is.
        name: what to call it: its path below the folder that was asked for.
        split: the split that it is named after, None where no word of its name says one.
        key: of a JSON object of splits, the one that is meant.
    """

    path: Path
    name: str
    split: str | None
    key: str | None = None


@dataclass(frozen=True)
class Found:
    """What a path holds.

    Attributes:
        path: what was asked for.
        files: all that can be read, in the order of their names.
        unread: names of what is not read, whatever the split.
    """

    path: Path
    files: tuple[DataFile, ...]
    unread: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, tuple[DataFile, ...]]:
        """Files by split; those that no name says anything about train where no other does."""
        names = sorted({file.split for file in self.files if file.split})
        found = {name: tuple(f for f in self.files if f.split == name) for name in names}
        unnamed = tuple(file for file in self.files if file.split is None)
        return {"train": unnamed, **found} if unnamed and "train" not in found else found

    @property
    def left_out(self) -> tuple[str, ...]:
        """Names of all that belongs to no split."""
        used = {file for files in self.splits.values() for file in files}
        unnamed = (f"{file.name} (named after no split)" for file in self.files if file not in used)
        return (*unnamed, *self.unread)

    def of(self, split: str) -> tuple[DataFile, ...]:
        """The files of a split.

        Raises:
            UserError: there is no such split.
        """
        if split not in self.splits:
            raise UserError(self._without(split))
        return self.splits[split]

    def _without(self, split: str) -> str:
        """That there is no such split, what there is, and what to do."""
        have = {name: listed([file.name for file in files], 2) for name, files in self.splits.items()}
        said = ", ".join(f"{name} ({files})" for name, files in have.items())
        first = next(iter(self.splits.values()))[0]
        other = "" if first.key else f", or give a file itself, as in {first.path}"
        kind = "key" if first.key else "file or folder"
        return f"{self.path} has no split {split!r}; it has {said}: name a {kind} {split!r}{other}"


def split_named(*names: str) -> str | None:
    """The split that names say, nearest first; None where no word of them is one.

    >>> split_named("my_test"), split_named("0000", "train"), split_named("train", "eval-set")
    ('test', 'train', 'validation')
    >>> split_named("heldout_reserved"), split_named("latest")
    ('heldout_reserved', None)
    """
    said = [split for name in names for split in _splits_in(name)]
    return next((split for split in said if split != "train"), said[0] if said else None)


def _splits_in(name: str) -> Iterator[str]:
    """Splits named by words of one name; what is reserved is a split of its own, used only when asked for."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    words = re.split(r"[^a-z]+", re.sub(r"\b(held|hold)[^a-z0-9]out", "heldout", apart.replace("_", " ")))
    for word in words:
        if match := _WORD.fullmatch(word):
            yield SPLITS[match[1]] + ("_reserved" if "reserved" in words else "")


def find(path: Path, readable: Collection[str]) -> Found:
    """Look what a file or a folder holds; nothing is read.

    Args:
        path: file or folder.
        readable: suffixes of files that can be read.

    Raises:
        UserError: no such path, or no data in it; what it holds instead is named.
    """
    known = f"lowmem reads {', '.join(readable)}, also compressed, and folders of them"
    if path.is_file():
        if suffixes(path)[0] not in readable:
            raise UserError(f"{path}: cannot read {path.suffix or 'a file without suffix'}; {known}")
        return Found(path, (DataFile(path, path.name, None),))
    if not path.is_dir():
        raise UserError(f"no such file or folder: {path}")
    if is_saved(path):
        return Found(path, (DataFile(path, path.name, None),))
    files, unread = _sorted_out(path, readable)
    if not files:
        instead = f" ({listed(unread)})" if unread else ""
        raise UserError(f"{path} holds no data{instead}: {known}")
    return Found(path, tuple(files), tuple(unread))


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved one split there (`save_to_disk`)."""
    return (path / "state.json").is_file() and (path / "dataset_info.json").is_file()


def listed(names: Collection[str], most: int = 5) -> str:
    """Some names, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = ", ".join(list(names)[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")


def _sorted_out(folder: Path, readable: Collection[str]) -> tuple[list[DataFile], list[str]]:
    """Data files of a folder, and the names of what is none."""
    files: list[DataFile] = []
    unread: list[str] = []
    for path, name in _entries(folder):
        if _is_hidden(name):
            unread.append(name)
        elif path.is_dir() and is_saved(path):
            files.append(DataFile(path, name, split_named(*reversed(Path(name).parts))))
        elif path.is_file() and _is_data(path, readable):
            stem, *above = reversed(Path(name).parts)
            stem = stem.removesuffix(path.suffix).removesuffix(suffixes(path)[0])
            files.append(DataFile(path, name, split_named(stem, *above)))
        elif path.name not in _OF_DATASETS:
            unread.append(name)
    files.sort(key=lambda file: file.name)
    rows = [file for file in files if file.path.is_dir() or suffixes(file.path)[0] not in TEXTS]
    if not rows and not any(_OTHER_DATA.search(name.lower()) for name in unread):
        return files, sorted(unread, key=_is_hidden)
    texts = [file.name for file in files if file not in rows]
    return rows, sorted([*texts, *unread], key=_is_hidden)


def _is_data(path: Path, readable: Collection[str]) -> bool:
    suffix = suffixes(path)[0]
    described = path.name in _OF_DATASETS or (suffix in TEXTS and _DESCRIPTIONS.fullmatch(path.name))
    cached = suffix == ".arrow" and path.name.startswith(("cache-", "tmp"))  # what `datasets` computed
    return suffix in readable and not described and not cached


def _is_hidden(name: str) -> bool:
    """Whether the last part of a path below the folder is one that listings do not show."""
    return name.rstrip("/").rpartition("/")[2].startswith((".", "__"))


def _entries(folder: Path) -> Iterator[tuple[Path, str]]:
    """Files and saved data sets below a folder with their names, in order; what is hidden stays closed."""
    seen: set[tuple[int, int]] = set()
    waiting = [(folder, "")]
    while waiting:
        here, above = waiting.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:  # a link into a folder above it
            continue
        seen.add((status.st_dev, status.st_ino))
        below = []
        for entry in sorted(_scan(here), key=lambda entry: entry.name):
            path, name = here / entry.name, f"{above}{entry.name}"
            if not path.is_dir() or is_saved(path):
                yield path, name
            elif _is_hidden(name):
                yield path, f"{name}/"
            else:
                below.append((path, f"{name}/"))
        waiting += reversed(below)


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from error
