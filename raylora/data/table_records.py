"""The records of tables: Parquet, Arrow IPC and Feather, CSV and TSV. A row is a record, its place ``row 7``.

They are read some rows at a time. What a small file could swell to is looked up before it is read: values that stand
once in it, and are repeated in each row, or pages of zeros.
"""

from __future__ import annotations

import datetime
import decimal
import errno
from abc import abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.byte_stream import PIECE, hash_of, unreadable
from raylora.data.columns import ColumnNames
from raylora.data.ipc_messages import scan_messages
from raylora.data.parquet_footer import RowGroup, read_footer
from raylora.data.record_forms import ACCEPTED
from raylora.data.record_stream import (
    LARGEST_PIECE,
    LARGEST_TOTAL,
    SWELLING,
    Record,
    RecordStream,
    in_bytes,
    short,
    shown_path,
    too_long,
)
from raylora.errors import ErrorKind, UserError, one_line

BATCH_ROWS, BATCH_BYTES = 256, 8 << 20
"""Rows that are read at a time, fewer where they are long."""
BATCH_VALUES = 1 << 20
"""Values of one column, with those of its lists, that are read at a time."""
KEPT_BATCH_ROWS = 4096
"""The same where dictionaries are kept: each batch brings its columns' whole dictionaries."""
MOST_VALUES = 16 << 20
"""Values in the lists of one row group, where the file has fewer bytes: nulls take no room in a file."""
_PLAIN_TYPES = (
    pa.types.is_null, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_string,
    pa.types.is_large_string, pa.types.is_string_view,
)  # fmt: skip
_UNREAD_TYPES = (pa.types.is_union, pa.types.is_run_end_encoded, pa.types.is_list_view, pa.types.is_large_list_view)
T = TypeVar("T")


def check_names(path: Path, columns: list[str], names: ColumnNames, place: str = "") -> None:
    """Check that a table has the columns of a record.

    Raises:
        UserError: it has not, or two have one name.
    """
    where = f"{shown_path(path)}: {place}"
    if twice := sorted({name for name in columns if columns.count(name) > 1}):
        raise UserError(f"{where}two columns are named {short(twice[0])}: give each its own name")
    if names.find_form(columns) is None:
        found = short(", ".join(columns)) or "none"
        fix = "--columns question=NAME,answer=NAME says which is which"
        text = f"{where}none of its records is valid: its columns are {found}; known are {ACCEPTED}; {fix}"
        raise UserError(text, kind=ErrorKind.BAD_RECORDS)


class ArrowRecords(RecordStream):
    """The rows of a file that pyarrow reads.

    Args:
        names: of the columns, which must be those of a record; None: any columns.
        salvage: keep the rows before the place where the file is damaged.
    """

    is_called: str
    """The kind of file, for messages."""

    def __init__(
        self,
        path: Path,
        names: ColumnNames | None = None,
        salvage: bool = False,
        max_chars: int = MAX_RECORD_CHARS,
    ) -> None:
        super().__init__(path, max_chars)
        self._names, self._salvage = names, salvage
        self._number = 0
        self._odd: list[str] = []

    def __iter__(self) -> Iterator[Record]:
        self.hash = hash_of(self.path)
        try:
            with self.path.open("rb") as file:
                yield from self._of_file(file)
        except OSError as error:
            raise unreadable(self.path, error) from None

    @abstractmethod
    def _of_file(self, file: Any) -> Iterator[Record]: ...

    def _of_batches(self, batches: Iterator[pa.RecordBatch]) -> Iterator[Record]:
        """The rows of the next batches; ends early where the file is damaged and the rest is to be lost."""
        while True:
            batch = self._guarded(lambda: next(batches, None))
            if batch is None:
                return
            for value, error in self._rows(batch):
                self._number += 1
                yield Record(f"row {self._number}", value, error)

    def _guarded(self, read: Callable[[], T]) -> T | None:
        """What ``read`` returns; None where the file is damaged, and rows before it are kept.

        Raises:
            UserError: it is damaged.
        """
        try:
            return read()
        except (pa.ArrowException, ValueError, OSError, NotImplementedError, OverflowError, MemoryError) as error:
            # The system's own errors have a number; that of an invalid argument is a place that the file does not have.
            if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}):
                raise
            if not (self._salvage and self._number):
                raise self._damaged(one_line(error), self._number) from None
            self.num_lost = -1
            return None

    def _damaged(self, why: str, num_rows: int) -> UserError:
        place = f"after row {num_rows:,}: " if num_rows else ""
        fix = f"get the file again{f', or --salvage the {num_rows:,} rows before it' if num_rows else ''}"
        text = f"{shown_path(self.path)}: {place}no {self.is_called}, or a damaged one: {why}; {fix}"
        return UserError(text, kind=ErrorKind.TRUNCATED_FILE if num_rows else ErrorKind.DATA)

    def _check_schema(self, schema: pa.Schema) -> list[str]:
        """The columns with values that JSON does not have."""
        for field in schema:
            if any(_has_type(field.type, is_type) for is_type in _UNREAD_TYPES):
                text = f"column {short(field.name)} has the type {short(field.type)}, which is not read"
                raise UserError(f"{shown_path(self.path)}: {text}: write it as lists, objects or text")
        if self._names is not None:
            check_names(self.path, list(schema.names), self._names)
        return [field.name for field in schema if not _is_plain(field.type)]

    def _check_swelling(self, stored: int, swollen: int, place: str) -> None:
        if swollen > max(LARGEST_PIECE, SWELLING * stored):
            raise self._swells(f"{place} takes {in_bytes(swollen)}, out of {in_bytes(stored)}")

    def _check_total(self, swollen: int) -> None:
        if swollen > max(LARGEST_TOTAL, SWELLING * self._size):
            raise self._swells(f"unpacked it takes {in_bytes(swollen)}, out of {in_bytes(self._size)}")

    def _swells(self, text: str) -> UserError:
        return UserError(f"{shown_path(self.path)}: {text}: no dataset, or write it again in smaller row groups")

    def _rows(self, batch: pa.RecordBatch) -> Iterator[tuple[Any, str]]:
        """Each row as an object, or why it is none."""
        if _size(batch) <= LARGEST_PIECE:
            try:
                for row in batch.to_pylist():
                    yield self._plain(row), ""
                return
            except (ValueError, OverflowError, pa.ArrowException):
                pass  # one of them cannot be read; nothing was yielded: to_pylist makes all of them
        for i in range(len(batch)):
            row = batch.slice(i, 1)
            if (size := _size(row)) > max(LARGEST_PIECE, self._size):
                yield None, f"takes {in_bytes(size)}, out of {in_bytes(self._size)}"
                continue
            if size > max(LARGEST_PIECE, 4 * self.max_chars):
                yield None, too_long(self.max_chars)
                continue
            try:
                yield self._plain(row.to_pylist()[0]), ""
            except UnicodeDecodeError:
                yield None, "not UTF-8"
            except (ValueError, OverflowError, pa.ArrowException) as error:
                yield None, f"a value that cannot be read: {short(one_line(error))}"

    def _plain(self, row: dict[str, Any]) -> dict[str, Any]:
        for name in self._odd:
            row[name] = _plain(row[name])
        return row

    @property
    def _size(self) -> int:
        return int(self.path.stat().st_size)


class ParquetRecords(ArrowRecords):
    """The rows of a Parquet file, a page of each column at a time."""

    is_called = "Parquet file"

    def _of_file(self, file: Any) -> Iterator[Record]:
        groups = self._guarded(lambda: read_footer(file, self._size)) or []
        table = self._guarded(lambda: self._open(file, []))
        if table is None:
            return
        self._odd = self._guarded(lambda: self._check_schema(table.schema_arrow)) or []
        self._check_total(sum(column.unpacked for group in groups for column in group.columns))
        for i, group in enumerate(groups):
            batches = self._guarded(lambda i=i, group=group: self._batches(file, table, i, group))  # type: ignore[misc]
            if batches is not None:
                yield from self._of_batches(batches)
            if self.num_lost:
                self.num_lost = max(sum(group.num_rows for group in groups) - self._number, 1)
                return

    def _open(self, file: Any, kept: list[str]) -> pq.ParquetFile:
        # Without pre_buffer and with a buffer, it reads a column's pages as they are needed, and not the row group.
        source = pa.PythonFile(file, mode="r")
        return pq.ParquetFile(source, read_dictionary=kept, pre_buffer=False, buffer_size=PIECE)

    def _batches(self, file: Any, table: pq.ParquetFile, i: int, group: RowGroup) -> Iterator[pa.RecordBatch]:
        """The rows of a row group, in batches that fit: fewer rows where a dictionary's values are long.

        Where a row's lists could repeat a long value too often, it stays a dictionary until the row is looked at.
        """
        num_rows = max(1, group.num_rows)
        for column in group.columns:
            place = f"column {short(column.path)} of row group {i + 1}"
            self._check_swelling(column.stored, column.unpacked, place)
            if column.num_values - num_rows > max(MOST_VALUES, self._size):
                raise self._swells(f"{place} has {column.num_values:,} values, out of {in_bytes(self._size)}")
        most_values = max((column.num_values for column in group.columns), default=1)
        size = min(BATCH_ROWS, BATCH_BYTES * num_rows // max(1, group.num_bytes))
        size = max(1, min(size, num_rows * BATCH_VALUES // max(1, most_values)))
        risky = [
            column
            for column in group.columns
            if column.is_text
            and column.has_dictionary
            and column.unpacked * size * column.num_values > LARGEST_PIECE * num_rows
        ]
        if not risky:
            return self._iterate(table, i, size)
        kept = self._open(file, [column.path for column in risky])
        longest = max(map(_longest_value, next(self._iterate(kept, i, 1)).columns))
        most_values = max(column.num_values for column in risky)
        if most_values > num_rows and longest * (most_values - num_rows) > LARGEST_PIECE:
            return self._iterate(kept, i, KEPT_BATCH_ROWS)
        return self._iterate(table, i, max(1, min(size, LARGEST_PIECE * num_rows // max(1, longest * most_values))))

    def _iterate(self, table: pq.ParquetFile, i: int, num_rows: int) -> Iterator[pa.RecordBatch]:
        return iter(table.iter_batches(num_rows, row_groups=[i], use_threads=False))


class IpcRecords(ArrowRecords):
    """The rows of an Arrow IPC file (Feather) or stream, a record batch at a time."""

    is_called = "Arrow IPC file"

    def _of_file(self, file: Any) -> Iterator[Record]:
        begin = file.read(6)
        if begin.startswith(b"FEA1"):
            raise UserError(f"{shown_path(self.path)}: Feather of version 1: write it again as version 2 or Parquet")
        start = 8 if begin == b"ARROW1" else 0
        size = self._size
        num_rows = 0
        torn, swollen = "", 0
        for found in scan_messages(file, start, size):
            if found.error:
                torn = found.error
                break
            self._check_swelling(size, found.swollen, f"the record batch behind row {num_rows:,}")
            num_rows += found.num_rows
            swollen += found.swollen
        if torn and not (self._salvage and num_rows):
            raise self._damaged(torn, num_rows)
        self._check_total(swollen)
        file.seek(start)
        reader = self._guarded(lambda: pa.ipc.open_stream(pa.PythonFile(file, mode="r")))
        if reader is None:
            return
        self._odd = self._guarded(lambda: self._check_schema(reader.schema)) or []
        yield from self._of_batches(_small_batches(reader))
        self.num_lost = -1 if torn else self.num_lost


def _small_batches(batches: Any) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        _validate(batch)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(batch) // max(1, batch.nbytes)))
        for start in range(0, len(batch), size):
            yield batch.slice(start, size)


def _validate(batch: pa.RecordBatch) -> None:
    """Check that no value lies outside of what was read: pyarrow takes a record batch as it is written.

    Raises:
        pa.ArrowInvalid: one does, or a text within a list or object is not UTF-8.
    """
    try:
        batch.validate(full=True)
    except pa.ArrowInvalid:
        as_bytes = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}  # a bad text costs its row alone
        for column in batch.columns:
            column.view(as_bytes.get(column.type, column.type)).validate(full=True)


def _is_plain(data_type: Any) -> bool:
    """Whether values of a type are JSON values in Python, at any depth."""
    if pa.types.is_dictionary(data_type):
        return _is_plain(data_type.value_type)
    if pa.types.is_struct(data_type):
        return all(_is_plain(field.type) for field in data_type)
    if pa.types.is_list(data_type) or pa.types.is_large_list(data_type) or pa.types.is_fixed_size_list(data_type):
        return _is_plain(data_type.value_type)
    return any(is_type(data_type) for is_type in _PLAIN_TYPES)


def _has_type(data_type: Any, is_type: Callable[[Any], bool]) -> bool:
    if is_type(data_type):
        return True
    return any(_has_type(data_type.field(i).type, is_type) for i in range(data_type.num_fields))


def _plain(value: Any) -> Any:
    """A value of any type as JSON has it: dates and decimals as text, bytes as they are."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal) or not isinstance(value, str | bytes | bool | int | float | None):
        return str(value)
    return value


def _size(values: Any) -> int:
    """Bytes that a batch or an array has as Python values, at most: a dictionary's values count wherever they stand."""
    if isinstance(values, pa.RecordBatch):
        return sum(_size(column) for column in values.columns)
    if isinstance(values, pa.DictionaryArray):
        return len(values) * _longest_value(values)
    if pa.types.is_struct(values.type):
        return sum(_size(column) for column in values.flatten())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return len(values) * 8 + _size(values.flatten())
    if pa.types.is_string_view(values.type) or pa.types.is_binary_view(values.type):
        return int(pc.sum(pc.binary_length(values)).as_py() or 0) + 8 * len(values)
    return int(values.nbytes)


def _longest_value(values: Any) -> int:
    """Bytes of the longest value in the dictionaries of an array, at any depth; 8 where there is none."""
    if isinstance(values, pa.DictionaryArray):
        if len(values.dictionary) == 0:
            return 8
        try:
            return max(8, int(pc.max(pc.binary_length(values.dictionary)).as_py() or 0))
        except (pa.ArrowNotImplementedError, TypeError):
            return max(8, int(values.dictionary.nbytes))  # no texts
    if pa.types.is_struct(values.type):
        return max([8, *map(_longest_value, values.flatten())])
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        return _longest_value(values.flatten())
    return 8
