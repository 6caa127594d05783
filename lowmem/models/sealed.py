"""Folders of which every byte is listed.

`seal` syncs the files of a folder to the disk and then writes `manifest.json`, last: names, sizes,
hashes, and what the folder belongs to. A folder without one was cut off, or is somebody else's; one
that differs from its list was damaged. So a folder is whole or it says what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowmem.texts import parse_json

MANIFEST = "manifest.json"
FORMAT = 3


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Sync every file of `folder` to disk, then write the manifest, last.

    Args:
        folder: complete but for the manifest.
        about: what it belongs to (plain values).
    """
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    for name in files:
        sync(folder / name)
    listed = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in files
    }
    told = {"files": listed, "about": dict(about)}
    text = json.dumps({"format": FORMAT, **told, "seal": _seal(told)}, indent=1, sort_keys=True)
    unsealed = folder / (MANIFEST + ".part")
    unsealed.write_text(text, encoding="utf-8")
    sync(unsealed)
    os.rename(unsealed, folder / MANIFEST)
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync(directory)


def broken(folder: Path) -> str | None:
    """Say what keeps a folder from being what was sealed, None when it is whole."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        manifest = _read(folder)
        if manifest["format"] != FORMAT:
            read = f"its manifest has format {manifest['format']!r}, this version of lowmem reads {FORMAT}"
            return f"{read}: go on with the version that wrote it, or start afresh in another folder"
        if manifest["seal"] != _seal(manifest):
            return f"{MANIFEST} is not what was written"
        for name, expected in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
            if _digest(path) != expected["sha256"]:
                return f"{name} is not what was written"
    except FileNotFoundError:
        return "it has no manifest.json: its save was cut off, or lowmem did not write it"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"it cannot be read ({error})"
    return None


def ours(folder: Path) -> bool:
    """Whether lowmem sealed this folder, damaged since or not; a link to one is not."""
    try:
        return not folder.is_symlink() and {"format", "files", "about"} <= _read(folder).keys()
    except (OSError, ValueError, AttributeError):
        return False


def files(folder: Path) -> list[str]:
    """Names that the manifest lists."""
    return list(_read(folder)["files"])


def added(folder: Path) -> list[str]:
    """Names of files that were put there after it was sealed; hidden ones do not count."""
    present = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    names = {p.as_posix() for p in present if not any(part.startswith(".") for part in p.parts)}
    return sorted(names - {MANIFEST, *files(folder)})


def about(folder: Path) -> dict[str, Any]:
    """What a sealed folder belongs to, as given to `seal`."""
    told: dict[str, Any] = _read(folder)["about"]
    return told


def discard(path: Path) -> None:
    """Delete a file or a folder if it is there; of a link the link itself."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


def sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = parse_json((folder / MANIFEST).read_text(encoding="utf-8"))
    if not all(isinstance(part, dict) for part in (read, read.get("files"), read.get("about"))):
        raise ValueError("its manifest is not one that lowmem wrote")
    return read


def _seal(manifest: Mapping[str, Any]) -> str:
    """Hash of what a manifest says, so that it too can be told from an edited one."""
    told = json.dumps({key: manifest[key] for key in ("files", "about")}, sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()


def _digest(path: Path) -> str:
    """Hash of the whole file; the processor has instructions for sha256, so it is quicker than blake2b."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
