"""Digests of what raylora writes, kept with it and checked when it is read: SHA-256, in hex.

A JSON product holds the digest of all else in it (``digest``), a Parquet file that of its other bytes in front of its
footer, a stage's JSON file those of the files beside it (``files``). A power cut leaves blocks of zeros, a bad disk
flips a bit: without a digest a flipped digit is another accuracy. What an older version wrote has none, and is taken if
it can be read.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open

from raylora.errors import DamagedError
from raylora.records import digest
from raylora.storage.atomic import parse_json, to_json

DIGEST = "digest"
"""The key of a JSON product's digest."""
_MARK = b"raylora-sha256:"
_SLOT = len(_MARK) + 64
_KEY = b"raylora_digest"


# JSON


def seal(value: Mapping[str, Any]) -> str:
    """A JSON product as text, with its digest as its last value. ``value`` has no key ``digest``."""
    assert DIGEST not in value
    plain = json.loads(to_json(value))  # as it will be read: without NaN, tuples and keys that are numbers
    return to_json({**plain, DIGEST: digest(plain)})


def unseal(data: bytes) -> dict[str, Any] | None:
    """The JSON product in ``data``, without its digest; None where it is no JSON object, or not what was written."""
    value = parse_json(data)
    if value is None or DIGEST not in value:
        return value
    given = value.pop(DIGEST)
    return value if given == digest(value) else None


# Parquet


def write_parquet(table: pa.Table | pd.DataFrame, path: Path) -> None:
    """Write a Parquet file with the digest of all its other bytes, which stands between its data and its footer.

    Any reader of Parquet passes over it. Data and digest are one file, so that no kill and no other machine parts them.
    """
    if isinstance(table, pd.DataFrame):
        table = pa.Table.from_pandas(table, preserve_index=False)
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        # Says that there is a digest. Zeros that cover both this and the digest cover what is needed to read the file.
        writer.add_key_value_metadata({_KEY.decode(): "SHA-256"})
    data = sink.getvalue().to_pybytes()
    footer = _footer_of(data)
    path.write_bytes(data[:footer] + _MARK + _digest_of(data[:footer], data[footer:]) + data[footer:])


def _footer_of(data: bytes) -> int:
    """Where the footer of a Parquet file begins: its length is in front of the last four bytes."""
    return len(data) - 8 - int.from_bytes(data[-8:-4], "little")


def _digest_of(*parts: bytes | memoryview) -> bytes:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest().encode()


def check_parquet(data: bytes) -> None:
    """Check the digest of a Parquet file; one without a digest passes.

    Raises:
        DamagedError: it is not what was written.
    """
    view, footer = memoryview(data), max(0, _footer_of(data))
    start = max(0, footer - _SLOT)
    slot = data[start:footer]
    if not slot.startswith(_MARK) and data.find(_KEY, footer) < 0:
        return
    if slot != _MARK + _digest_of(view[:start], view[footer:]):
        raise DamagedError("is not what was written: its digest does not fit")


def checked_parquet(data: bytes) -> io.BytesIO:
    """A Parquet file's bytes to be given to a reader; raises as ``check_parquet``."""
    check_parquet(data)
    return io.BytesIO(data)


def open_parquet(path: Path) -> io.BytesIO:
    """The bytes of a Parquet file, checked, to be given to a reader.

    Raises:
        DamagedError: it is not what was written.
        OSError: it cannot be read.
    """
    return checked_parquet(path.read_bytes())


def load_parquet(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A table that ``write_parquet`` wrote, all of it or some columns; raises as ``open_parquet``, and as pandas."""
    return pd.read_parquet(open_parquet(path), columns=columns)


# Files beside a JSON product


def file_digest(path: Path) -> str:
    """Digest of a file's bytes, remembered by this process as long as the file's size, time and inode stay.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _file_digest(path, (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@functools.lru_cache(maxsize=4096)  # a stage's files are asked for four times in a run: 0.1 s each for 160 MB
def _file_digest(path: Path, _: tuple[int, int, int]) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_digests(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """The digests of those of these files that there are, by name."""
    return {name: file_digest(folder / name) for name in names if (folder / name).is_file()}


def missing_files(folder: Path, names: Iterable[str]) -> list[str]:
    """The names of these files that somebody deleted or emptied."""
    paths = {name: folder / name for name in names}
    return [name for name, path in paths.items() if not path.is_file() or not path.stat().st_size]


def damaged_files(folder: Path, names: Iterable[str], digests: object) -> list[str]:
    """The names of these files that are there, and are not what was written.

    Args:
        digests: by name, as from ``file_digests``. A file without one must be readable.
    """
    known = digests if isinstance(digests, dict) else {}
    there = [name for name in names if (folder / name).is_file()]
    return [name for name in there if not _is_as_written(folder / name, known.get(name))]


def _is_as_written(path: Path, expected: object) -> bool:
    try:
        return file_digest(path) == expected if expected is not None else is_readable(path)
    except OSError:
        return False


def is_readable(path: Path) -> bool:
    """Whether a file is whole as far as it can tell: by its own digest, or as its format can be read.

    Raises:
        OSError: it cannot be opened.
    """
    if path.suffix != ".safetensors":
        return is_whole(path.name, path.read_bytes())
    try:  # its header says how long it is: a file that is cut off is found
        with safe_open(path, framework="numpy") as file:
            return bool(file.keys())
    except SafetensorError:
        return False


def is_whole(name: str, data: bytes) -> bool:
    """Whether the content of a file, by its name's ending, is what was written, or can be read if it has no digest."""
    try:
        if name.endswith(".json"):
            return unseal(data) is not None
        if name.endswith(".parquet"):
            check_parquet(data)
            pq.read_table(pa.BufferReader(data))
        elif name.endswith(".csv"):
            return bool(data.decode("utf-8").replace("\0", ""))
    except (OSError, ValueError, pa.ArrowException):  # damaged pages are OSErrors of pyarrow's, all else is ValueErrors
        return False
    return bool(data)
