"""The bytes of a file, decompressed piece by piece, and the SHA-256 of what lies on the disk."""

from __future__ import annotations

import hashlib
import io
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from raylora.data.record_stream import LARGEST_PIECE, LARGEST_TOTAL, SWELLING, in_bytes, shown_path
from raylora.errors import UserError, one_line, reason
from raylora.storage.places import is_remote, open_regular

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
"""pyarrow's names by the suffix that stands behind a file's own."""
PIECE = 1 << 20
"""Bytes read at a time."""
SMALL_PIECE = 64
"""The same of damaged data."""


def compression_of(path: Path) -> str:
    """By the file's name, in any case; empty where it is not compressed."""
    return COMPRESSIONS.get(path.suffix.lower(), "")


class _Hashed(io.RawIOBase):
    """A file that is read from its beginning to the end that it had when it was opened, and hashed on the way."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open_regular(path)
            self._left = sys.maxsize if is_remote(path) else os.fstat(self._file.fileno()).st_size
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a null character in its name
            raise unreadable(path, error) from None
        self.sha256 = hashlib.sha256()
        self.size, self.at_end = 0, False

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        try:
            data = self._file.read(self._left if size < 0 else min(size, self._left))
        except OSError as error:
            raise unreadable(self.path, error) from None
        self.sha256.update(data)
        self._left -= len(data)
        self.size += len(data)
        self.at_end = not data
        return data

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class ByteStream:
    """What a file holds, decompressed by its suffix.

    Reading raises:
        UserError: the file cannot be read. Compressed data that is torn or damaged raises nothing: it ends there, and
            ``damage`` says why.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.compression = path, compression_of(path)
        self.open()

    def open(self) -> None:
        """Begin (again) at the first byte."""
        self._raw = _Hashed(self.path)
        self._stream: Any = self._unpacked(self._raw) if self.compression else self._raw
        self.at_end, self.damage = False, ""
        self._num_read = 0

    def _unpacked(self, raw: _Hashed) -> Any:
        return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), self.compression)

    def __enter__(self) -> ByteStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._raw.close()

    @property
    def hash(self) -> str:
        """SHA-256 of the file's bytes in hex; empty before its end is read."""
        return self._raw.sha256.hexdigest() if self.at_end else ""

    @property
    def size(self) -> int:
        """Bytes on the disk that were read so far."""
        return self._raw.size

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size``; none at the end."""
        if self.at_end:
            return b""
        data = b""
        if not self.damage:
            try:
                data = self._stream.read(size)
            except OSError as error:  # of pyarrow: _Hashed raises others
                text = one_line(error)
                what = "breaks off" if "Truncated" in text else f"is damaged: {text}"
                self.damage = f"its {self.compression} data {what}"
                data = self._before_damage(size)
        self._num_read += len(data)
        if self.compression and self._num_read > max(LARGEST_TOTAL, SWELLING * self._raw.size):
            self.skip_rest()
            text = f"more than {in_bytes(self._num_read)}, out of {in_bytes(self.size)}"
            raise UserError(f"{shown_path(self.path)}: {text}: unpack it first, if it is what you expect")
        if not data:
            if self.compression and not self._raw.size and not self._raw.read(1):
                self.damage = "empty"
            self.skip_rest()
        return data

    def skip_rest(self) -> None:
        """Read the file to its end, for the hash, without unpacking what is left of it."""
        while not self._raw.at_end:
            self._raw.read(PIECE)
        self.at_end = True

    def _before_damage(self, size: int) -> bytes:
        """What stands between the last bytes that were read and the damage: pyarrow gives no part of a piece."""
        raw, found = _Hashed(self.path), bytearray()
        stream = self._unpacked(raw)
        try:
            left = self._num_read
            while left:
                left -= len(stream.read(min(left, PIECE)))
            while len(found) < size:
                found += stream.read(SMALL_PIECE)
        except OSError:
            pass
        finally:
            raw.close()
        return bytes(found)


def unpacked(path: Path, most: int) -> bytes:
    """All that a file holds, decompressed by its suffix.

    Args:
        most: bytes that it may hold.

    Raises:
        UserError: it cannot be read, is torn, holds more, or is far larger than its file.
    """
    found = bytearray()
    with ByteStream(path) as stream:
        while piece := stream.read(PIECE):
            found += piece
            if len(found) > most:
                raise UserError(f"{shown_path(path)}: more than {in_bytes(most)}: too large to be read at once")
            if stream.compression and len(found) > max(LARGEST_PIECE, SWELLING * stream.size):
                text = f"more than {in_bytes(len(found))}, out of {in_bytes(stream.size)}"
                raise UserError(f"{shown_path(path)}: {text}: unpack it first, if it is what you expect")
        if stream.damage:
            raise UserError(f"{shown_path(path)}: {stream.damage}; get the file again")
    return bytes(found)


def hash_of(path: Path) -> str:
    """SHA-256 of a file's bytes in hex.

    Raises:
        UserError: it cannot be read.
    """
    raw = _Hashed(path)
    try:
        while raw.read(PIECE):
            pass
    finally:
        raw.close()
    return raw.sha256.hexdigest()


def unreadable(path: Path, error: OSError | ValueError) -> UserError:
    """The error of a file that the system does not read."""
    why = reason(error) if isinstance(error, OSError) else one_line(error)
    return UserError(f"{shown_path(path)}: cannot be read: {why}")
