"""What all readers of dataset files share: records with their place, and how values and paths are shown."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.config.options import MAX_RECORD_CHARS

LARGEST_PIECE = 64 << 20
"""Bytes, or characters, that one record or one piece of a file may swell to, where that is more than the file itself
has. As Python objects they may be 20 times as many."""

LARGEST_TOTAL = 1 << 30
"""Bytes that a file may swell to in all, where that is more than ``SWELLING`` times its own."""
SWELLING = 50
"""Text of many like records becomes 10 to 20 times as short. What is over that, and over ``LARGEST_PIECE``, is no
dataset: 23 KB of Parquet may be 3 GB."""


@dataclass(frozen=True)
class Record:
    """A parsed record, or in ``error`` why it could not be parsed. ``place`` is ``record 7``, ``line 7``, ``row 7``."""

    place: str
    value: Any
    error: str = ""


class RecordStream(ABC):
    """Yields the records of a dataset file, once.

    Iteration raises:
        UserError: the file cannot be read, is not of its kind, or breaks off. Records yielded before must not be used
            then: ``salvage`` is for that.
    """

    def __init__(self, path: Path, max_chars: int = MAX_RECORD_CHARS) -> None:
        self.path, self.max_chars = path, max_chars
        self.hash = ""
        """SHA-256 of the file's bytes in hex, once iteration has ended, be it by an error."""
        self.num_lost = 0
        """Records lost by salvage; -1 where nobody can know how many."""

    @abstractmethod
    def __iter__(self) -> Iterator[Record]: ...


def shown_path(path: object) -> str:
    """A path, or another place, as printable text on one line, whatever characters its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def too_long(max_chars: int) -> str:
    """Why a record is bad that has more characters than it may."""
    return f"longer than {max_chars:,} characters; cut it, or give a larger --max-record-chars"


def kind(value: Any) -> str:
    """The JSON type of a value, for error messages."""
    names = {
        dict: "an object", list: "a list", str: "a string", bytes: "bytes", bool: "true or false", type(None): "null",
    }  # fmt: skip
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """A value as printable text of at most 80 characters, for error messages."""
    text = ascii(str(value))[1:-1] if not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def in_bytes(number: int) -> str:
    """A size for error messages: ``23 KB``, ``3.0 GB``."""
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{-(-number // 1000)} KB"
