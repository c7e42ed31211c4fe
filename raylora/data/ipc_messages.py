"""The messages of an Arrow IPC file, looked at without reading what they hold: do they end, and how large are they?

pyarrow unpacks a compressed record batch as a whole. How much memory that takes stands before each of its buffers
(https://arrow.apache.org/docs/format/Columnar.html#serialization-and-interprocess-communication-ipc).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DICTIONARY, RECORDS = 2, 3
"""Of the union ``MessageHeader``."""
MAX_METADATA = 64 << 20


@dataclass(frozen=True)
class Message:
    """A message. ``error`` says why there is none, and none follows."""

    num_rows: int = 0
    swollen: int = 0
    """Bytes of its buffers once they are unpacked; 0 where they are not compressed."""
    error: str = ""


class _Table:
    """A table of FlatBuffers: values found by their number in the schema."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self._fields = position - self._read("<i", position)
        self._num_bytes = self._read("<H", self._fields)

    def _read(self, form: str, position: int) -> int:
        if position < 0:
            raise struct.error("before the beginning")
        return int(struct.unpack_from(form, self.data, position)[0])

    def _place(self, number: int) -> int:
        at = 4 + 2 * number
        offset = self._read("<H", self._fields + at) if at < self._num_bytes else 0
        return self.position + offset if offset else 0

    def value(self, number: int, form: str) -> int:
        place = self._place(number)
        return self._read(form, place) if place else 0

    def table(self, number: int) -> _Table | None:
        place = self._place(number)
        return _Table(self.data, place + self._read("<I", place)) if place else None

    def pairs(self, number: int) -> list[tuple[int, int]]:
        """A vector of two int64 each: offset and length of buffers."""
        place = self._place(number)
        if not place:
            return []
        start = place + self._read("<I", place)
        count = self._read("<I", start)
        numbers = struct.unpack_from(f"<{2 * count}q", self.data, start + 4) if count < len(self.data) else ()
        return list(zip(numbers[::2], numbers[1::2], strict=True))


def scan_messages(file: Any, start: int, size: int) -> Iterator[Message]:
    """The messages from ``start`` on, of a file of ``size`` bytes."""
    position = start
    while True:
        file.seek(position)
        head = file.read(8)
        if not head and start == 0 and position:
            return  # a stream may end without a mark
        if len(head) < 8:
            if head == b"\xff\xff\xff\xff" or head == b"\0\0\0\0":
                return
            yield Message(error="it breaks off")
            return
        marker, length = struct.unpack("<Ii", head)
        begin = position + 8
        if marker != 0xFFFFFFFF:  # of versions before 0.15
            length, begin = struct.unpack("<i", head[:4])[0], position + 4
        if length == 0:
            return
        if not 0 < length <= min(size, MAX_METADATA):
            yield Message(error="not what an Arrow writer writes")
            return
        file.seek(begin)
        try:
            message = _Table(data := file.read(length), struct.unpack_from("<I", data)[0])
            position = begin + length + message.value(3, "<q")
            if position > size or position < begin:
                yield Message(error="it breaks off")
                return
            yield _look_at(file, message, begin + length, size)
        except struct.error:
            yield Message(error="not what an Arrow writer writes")
            return


def _look_at(file: Any, message: _Table, body: int, size: int) -> Message:
    kind, header = message.value(1, "<B"), message.table(2)
    records = header.table(1) if header and kind == DICTIONARY else header
    if kind not in {DICTIONARY, RECORDS} or records is None:
        return Message()
    swollen = 0
    if records.table(3) is not None:
        for offset, length in records.pairs(2):
            if length >= 8:
                if not 0 <= body + offset < size:
                    raise struct.error("beyond the end")
                file.seek(body + offset)
                swollen += max(length - 8, *struct.unpack("<q", file.read(8)))
    return Message(records.value(0, "<q") if kind == RECORDS else 0, swollen)
