"""Data sets of the Hugging Face Hub, without hanging where there is no network."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowmem.data.files.source import COMPRESSED, Place, Row
from lowmem.errors import UserError, first_line
from lowmem.models import hub

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".md", ".parquet", *COMPRESSED)


def looks_like_hub(name: str) -> bool:
    """Whether a name that is no local path can be `owner/name` or `owner/name:config`."""
    return _NAME.fullmatch(name) is not None and not name.lower().endswith(_SUFFIXES)


def read_hub(name: str, split: str) -> Iterator[tuple[Place, Row]]:
    """Rows of a Hub data set, from the local cache where there is no network.

    Raises:
        UserError: unknown, gated, unreachable, or no such split or config.
    """
    dataset = _load(name, split)
    for number, row in enumerate(dataset, 1):
        yield Place(f"{name} ({split})", "row", number), dict(row)


def _load(name: str, split: str) -> Any:
    from datasets import load_dataset

    repo, _, config = name.partition(":")
    if not hub.online() and not _cached(repo):
        raise UserError(
            f"the data set {repo} is not in the local cache and the Hub cannot be reached; "
            f"give a local file or folder, or the demo data: --data factbook"
        )
    try:
        return load_dataset(repo, config or None, split=split)
    except Exception as error:  # datasets raises many kinds; each says in its first line what is wrong
        line = first_line(error)
        raise UserError(f"cannot load the data set {name} ({split}): {line}") from error


def _cached(repo: str) -> bool:
    """Whether datasets keeps a prepared copy of a repository."""
    from datasets import config

    folder = Path(config.HF_DATASETS_CACHE) / repo.replace("/", "___")
    return folder.is_dir()
