"""What the end of a Parquet file says of its row groups.

pyarrow says it too, but ends the process on damaged statistics: its ``RowGroupMetaData.column`` lets a C++ exception
out (26.0.1). The format is Thrift's compact protocol (https://github.com/apache/parquet-format,
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BYTE_ARRAY = 6
"""Of the enumeration ``Type``."""
MAX_FOOTER = 256 << 20
_MAX_DEPTH = 32


@dataclass(frozen=True)
class Column:
    """The values of one column in one row group."""

    path: str
    """``messages.list.element.content``."""
    is_text: bool
    num_values: int
    """With those of lists, and nulls."""
    stored: int
    """Bytes in the file."""
    unpacked: int
    """Bytes once decompressed; values of its dictionary count once."""
    has_dictionary: bool


@dataclass(frozen=True)
class RowGroup:
    """``num_bytes`` are of all columns, decompressed."""

    num_rows: int
    num_bytes: int
    columns: tuple[Column, ...]


def read_footer(file: Any, size: int) -> list[RowGroup]:
    """The row groups of a Parquet file of ``size`` bytes.

    Raises:
        ValueError: it has no footer that can be read.
    """
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little")
    if len(tail) < 8 or tail[4:] != b"PAR1" or length > min(size - 8, MAX_FOOTER):
        raise ValueError("it has no footer: it breaks off, or is no Parquet file")
    file.seek(size - 8 - length)
    try:
        footer = _Reader(file.read(length)).struct()
        return [_row_group(values) for values in footer.get(4, [])]
    except (IndexError, KeyError, TypeError, ValueError, AttributeError):
        raise ValueError("its footer is damaged") from None


def _row_group(values: dict[int, Any]) -> RowGroup:
    columns = [values[3] for values in values[1]]
    return RowGroup(int(values[3]), int(values[2]), tuple(map(_column, columns)))


def _column(values: dict[int, Any]) -> Column:
    path = ".".join(part.decode("utf-8", "replace") for part in values[3])
    num_values, stored, unpacked = (int(values[number]) for number in (5, 7, 6))
    if min(num_values, stored, unpacked) < 0:
        raise ValueError("its footer is damaged")
    return Column(path, values[1] == BYTE_ARRAY, num_values, stored, unpacked, has_dictionary=11 in values)


class _Reader:
    """Structs as dictionaries by field number; texts as bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._pos = data, 0

    def _byte(self) -> int:
        self._pos += 1
        return self._data[self._pos - 1]

    def _number(self) -> int:
        result = shift = 0
        while shift < 70:
            byte = self._byte()
            result |= (byte & 0x7F) << shift
            if byte < 0x80:
                return result
            shift += 7
        raise ValueError("a number without an end")

    def _signed(self) -> int:
        number = self._number()
        return (number >> 1) ^ -(number & 1)

    def struct(self, depth: int = 0) -> dict[int, Any]:
        values: dict[int, Any] = {}
        field = 0
        while kind := (head := self._byte()) & 0x0F:
            field = field + (head >> 4) if head >> 4 else self._signed()
            values[field] = kind == 1 if kind in {1, 2} else self._value(kind, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise ValueError("nested too deeply")
        if kind in {1, 2, 3}:  # in lists true and false take a byte
            return self._byte()
        if kind in {4, 5, 6}:
            return self._signed()
        if kind in {7, 8}:
            length = 8 if kind == 7 else self._number()
            self._pos += length
            if self._pos > len(self._data):
                raise ValueError("it breaks off")
            return self._data[self._pos - length : self._pos]
        if kind in {9, 10}:
            head = self._byte()
            number = self._number() if head >> 4 == 15 else head >> 4
            return [self._item(head & 0x0F, depth) for _ in range(number)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a value of no known type")

    def _item(self, kind: int, depth: int) -> Any:
        return self._value(kind, depth + 1)
