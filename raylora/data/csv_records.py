"""The records of CSV and TSV, line by line. Every value is text; an empty cell is a key that is not there."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.columns import ColumnNames
from raylora.data.json_window import Window
from raylora.data.record_stream import Record, RecordStream, shown_path, too_long
from raylora.data.table_records import check_names
from raylora.errors import ErrorKind, UserError

DELIMITERS = (",", ";", "\t")
LARGEST_CELL = 1 << 24
"""Characters. A quote that is never closed takes all that follows into one cell."""


class CsvRecords(RecordStream):
    """The rows of a table of text, whose first row names the columns; the separator is what that row has most of.

    Args:
        salvage: keep the rows before a quote that is never closed.
    """

    def __init__(self, path: Path, names: ColumnNames, salvage: bool, max_chars: int = MAX_RECORD_CHARS) -> None:
        super().__init__(path, max_chars)
        self._names, self._salvage = names, salvage
        self._line = 1
        self._is_long = self._in_quotes = False
        csv.field_size_limit(max(LARGEST_CELL, max_chars))  # of the process; Python's own limit is 131,072

    def __iter__(self) -> Iterator[Record]:
        with Window(self.path, self.max_chars) as window:
            try:
                yield from self._rows(window)
                window.drain()
                if window.damage:
                    self._lose(f"line {self._line}: {window.damage}; get the file again", ErrorKind.TRUNCATED_FILE)
            except UserError:
                window.drain()
                raise
            finally:
                self.hash = window.hash

    def _lose(self, text: str, kind: ErrorKind) -> None:
        if not self._salvage:
            text = f"{shown_path(self.path)}: {text}, or --salvage the rows before it"
            raise UserError(text, kind=kind)
        self.num_lost = -1

    def _rows(self, window: Window) -> Iterator[Record]:
        delimiter = self._delimiter(window)
        window.rewind()
        lines = self._whole_lines(window)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        columns: list[str] = []
        while True:
            self._line = rows.line_num + 1
            place = f"line {self._line}"
            try:
                row = next(rows, None)
            except csv.Error as error:
                if "field limit" in str(error) or "end of data" in str(error):
                    if window.damage:
                        return
                    return self._lose(f"{place}: a quote in it is never closed; close it", ErrorKind.DATA)
                if "new-line" in str(error):
                    text = "a carriage return alone ends a line, or stands in a cell without quotes; save it again"
                    raise UserError(f"{shown_path(self.path)}: {place}: {text}") from None
                if not columns:
                    raise UserError(f"{shown_path(self.path)}: {place}: no CSV: {error}") from None
                yield Record(place, None, f"not CSV: {error}; a quote within quotes is written twice")
                continue
            if row is None:
                break
            is_long, self._is_long, self._in_quotes = self._is_long, False, False
            if is_long and columns:
                yield Record(place, None, too_long(self.max_chars))
                continue
            if is_long:
                raise UserError(f"{shown_path(self.path)}: {place}: {too_long(self.max_chars)}")
            is_separator = self._line == 1 and len(row) == 2 and "".join(row).lower() == "sep="  # Excel's first line
            if not row or is_separator:
                continue
            if not columns:
                columns = [name.strip() or f"column {i}" for i, name in enumerate(row, 1)]
                check_names(self.path, columns, self._names, f"{place}: ")
            elif len(row) != len(columns):
                yield Record(place, None, f"has {len(row)} cells, the first line has {len(columns)}")
            else:
                yield Record(place, {name: cell for name, cell in zip(columns, row, strict=True) if cell})
        if not columns:
            raise UserError(f"{shown_path(self.path)}: line 1: empty; a table needs a line that names its columns")

    def _delimiter(self, window: Window) -> str:
        """What separates the cells of the first line: with it they are the keys of a record, or most cells."""
        line = next((line for line in window.lines() if line.strip()), "").removesuffix("\r")
        if line[:4].lower() == "sep=" and len(line) == 5:
            return line[4]
        found = []
        for delimiter in DELIMITERS:
            try:
                names = [name.strip() for name in next(csv.reader([line], delimiter=delimiter), [])]
            except csv.Error:
                continue
            found.append((self._names.find_form(names) is not None and len(names) > 1, len(names), delimiter))
        return max(found, key=lambda f: f[:2])[2] if found else DELIMITERS[0]

    def _whole_lines(self, window: Window) -> Iterator[str]:
        """The lines with their ends, without one in which compressed data breaks off.

        In place of a line that is longer than a record may be stands one that opens or closes a quote as it does.
        """
        for line in window.lines():
            is_last = window.at_end and window.pos == len(window.text) and not window.text.endswith("\n")
            if is_last and (window.damage or not line):
                continue
            is_odd = (line.count('"') + window.num_quotes_dropped) % 2 == 1
            if len(line) > self.max_chars:
                self._is_long = True
                line = "x" if not is_odd else 'x"' if self._in_quotes else '"x'
            self._in_quotes ^= is_odd
            yield f"{line}\n"
