"""What stands in a file: its bytes, through whatever it is compressed with, and its text.

.gz .bz2 .xz .zst     unpacked in memory, in pieces, so that a file made to burst is refused
UTF-8, UTF-16, UTF-32 as a byte-order mark says, which is dropped, or the zeros of the first bytes
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowmem.errors import UserError, first_line
from lowmem.texts import is_pointer

Row = dict[str, Any]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
BURST, RATIO = (
    2**30,
    200,
)  # bytes, and times its size, that a compressed file may hold: text is packed 3 to 20 times
_PIECE = 2**22
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16: it begins alike
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): "utf-32-le",
    (True, True, True, False): "utf-32-be",
    (False, True, False, True): "utf-16-le",
    (True, False, True, False): "utf-16-be",
}  # which of the first bytes are zero, where a text begins with two letters of ASCII


@dataclass(frozen=True)
class Place:
    """Where a row stands: the file or data set, and what to call its number."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


def suffixes(path: Path) -> tuple[str, str]:
    """The suffix of the data, and that of its compression ("" without one).

    >>> suffixes(Path("train.jsonl.gz")), suffixes(Path("train.csv"))
    (('.jsonl', '.gz'), ('.csv', ''))
    """
    outer = path.suffix.lower()
    return (Path(path.stem).suffix.lower(), outer) if outer in COMPRESSED else (outer, "")


def content(path: Path) -> bytes:
    """A file's bytes, unpacked.

    Raises:
        UserError: it cannot be read, is damaged, or unpacks to far more than data does.
    """
    packed = suffixes(path)[1]
    refuse_pointer(path)
    try:
        return _unpack(path, packed) if packed else path.read_bytes()
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        how = f" as {packed}" if packed else ""
        reason = getattr(error, "strerror", None) or first_line(error)
        raise UserError(f"cannot read {path}{how}: {reason}") from error


def text_of(path: Path) -> str:
    """A file's text; a byte-order mark is dropped.

    Raises:
        UserError: as `content`, or the text is in another encoding than UTF-8.
    """
    raw = content(path)
    encoding = _encoding(raw)
    try:
        return raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{path} is not {name} text (byte {error.start}): save it as UTF-8") from error


def refuse_pointer(path: Path) -> None:
    """Refuse what git has in the place of a file that git LFS keeps elsewhere.

    Raises:
        UserError: it is such a pointer, or cannot be read.
    """
    try:
        pointer = is_pointer(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if pointer:
        raise UserError(f"{path} is a pointer of git LFS, not the data: run git lfs pull in its repository")


def _encoding(raw: bytes) -> str:
    """How a text is encoded, by its byte-order mark, else by the zeros among its first bytes."""
    marked = next((name for mark, name in _MARKS.items() if raw.startswith(mark)), None)
    return marked or _ZEROS.get(tuple(byte == 0 for byte in raw[:4]), "utf-8-sig")


def _unpack(path: Path, packed: str) -> bytes:
    """Read piece by piece, and stop where a file unpacks without end."""
    most = max(BURST, RATIO * path.stat().st_size)
    pieces: list[bytes] = []
    size = 0
    with closing(_opened(path, packed)) as stream:
        while piece := bytes(stream.read(_PIECE)):
            pieces.append(piece)
            size += len(piece)
            if size > most:
                raise UserError(f"{path} unpacks to more than {RATIO} times its size: unpack it yourself")
    return b"".join(pieces)


def _opened(path: Path, packed: str) -> Any:
    if packed == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return openers[packed](path)
