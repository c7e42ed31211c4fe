"""The records of JSON and JSON lines, one after another: memory does not grow with the file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.columns import ColumnNames
from raylora.data.json_window import SPACE_AND_COMMAS, Items, Unreadable, Window
from raylora.data.record_forms import Shape
from raylora.data.record_stream import Record, RecordStream, kind, short, shown_path, too_long
from raylora.errors import ErrorKind, NotJsonError, UserError

LINE_SUFFIXES = (".jsonl", ".ndjson")


def _record(place: str, value: Any) -> Record:
    return Record(place, None, value.error) if isinstance(value, Unreadable) else Record(place, value)


@dataclass(frozen=True)
class _Layout:
    """Where an object's records are: in it itself, under one key, or over the keys of a table of columns."""

    is_record: bool = True
    list_index: int = -1
    columns: tuple[str, ...] = ()


class JsonRecords(RecordStream):
    """The records of a list, of an object that wraps a list, of an object of columns, of lines, of objects in a row.

    Args:
        is_lines: whether the file is named so that each line is a record, where its content does not say.
        names: of the records' keys; they say which object is a record and which wraps records.
        salvage: keep the complete records at the beginning of a file that breaks off.
    """

    def __init__(
        self, path: Path, names: ColumnNames, salvage: bool, is_lines: bool, max_chars: int = MAX_RECORD_CHARS
    ) -> None:
        super().__init__(path, max_chars)
        self._names, self._salvage, self._is_lines = names, salvage, is_lines

    def __iter__(self) -> Iterator[Record]:
        with Window(self.path, self.max_chars) as window:
            try:
                yield from self._records(window)
                window.drain()
                self._check_whole(window)
            except UserError:
                window.drain()  # if the rest of the file is not UTF-8, that error is raised in place of this one
                raise
            except RecursionError:
                window.drain()
                raise UserError(f"{shown_path(self.path)}: nested too deeply to be a dataset") from None
            finally:
                self.hash = window.hash

    def _check_whole(self, window: Window) -> None:
        """Raises UserError where compressed data ended before it was complete: nobody knows what is missing."""
        if not window.damage:
            return
        if not self._salvage:
            line, _ = window.place(len(window.text))
            fix = "get the file again, or --salvage the records before it"
            text = f"{shown_path(self.path)}: line {line}: {window.damage}; {fix}"
            raise UserError(text, kind=ErrorKind.TRUNCATED_FILE)
        self.num_lost = -1

    def _records(self, window: Window) -> Iterator[Record]:
        first = window.skip()
        if window.is_blank_from(window.pos):
            if window.damage and window.damage != "empty":
                raise UserError(f"{shown_path(self.path)}: line 1: {window.damage}; get the file again")
            raise UserError(f"{shown_path(self.path)}: line 1: empty; delete the file or write it again")
        if first == "[":
            yield from self._lines(window) if self._is_list_a_line(window) else self._list(window)
            return
        form = self._form(window)
        window.rewind()
        if isinstance(form, _Layout) and form.columns:
            yield from self._columns(form.columns)
        elif isinstance(form, _Layout) and not form.is_record:
            yield from self._wrapped_list(window, form.list_index)
        elif form == "lines":
            yield from self._lines(window)
        elif form == "objects":
            yield from self._objects(window)
        else:
            window.skip()
            value = window.value()
            if not isinstance(value, dict | Unreadable):
                raise UserError(f"{shown_path(self.path)}: line 1: expected a list of records, found {kind(value)}")
            yield _record("record 1", value)

    def _is_list_a_line(self, window: Window) -> bool:
        """Whether the list that begins the file is a record, a line as those behind it, and not a list of records."""
        try:
            value = json.loads(window.line_before_another())
        except json.JSONDecodeError:
            return False
        except (ValueError, RecursionError):  # a line that only Python cannot read
            return self._is_lines
        return not (isinstance(value, list) and value and isinstance(value[0], dict) and self._is_record(value[0]))

    def _is_record(self, keys: Any) -> bool:
        return self._names.is_record(keys)

    def _list(self, window: Window) -> Iterator[Record]:
        number, end = 0, None
        try:
            for number, value in enumerate(window.array(), 1):
                yield _record(f"record {number}", value)
            end = window.place()
            window.expect_end()
        except NotJsonError as error:
            breaks_off = self._breaks_off(window, error)
            for value in () if end else window.leading():
                number += 1
                yield _record(f"record {number}", value)
            if not self._salvage or not number:
                raise self._broken(error, breaks_off, number) from None
            # A file that breaks off loses the record that it breaks off in; after other damage the number is unknown.
            self.num_lost = int(window.skip() != "") if breaks_off else -1
        if not number:
            raise self._empty_list()

    def _wrapped_list(self, window: Window, list_index: int) -> Iterator[Record]:
        """The records of the list under the key at ``list_index`` of the file's object."""
        window.skip()
        number = 0
        for key_index, _ in enumerate(window.keys()):
            if key_index != list_index:
                window.skip_value()
                continue
            for number, value in enumerate(window.array(), 1):
                yield _record(f"record {number}", value)
        if not number:
            raise self._empty_list()

    def _columns(self, columns: tuple[str, ...]) -> Iterator[Record]:
        """The rows of an object of columns, which lie one behind the other in the file: each has a window of its own.

        Args:
            columns: the object's keys, all of them, in the file's order.
        """
        with contextlib.ExitStack() as stack:
            windows = [stack.enter_context(Window(self.path, self.max_chars)) for _ in columns]
            cells = [self._cells(window, i) for i, window in enumerate(windows)]
            for number, values in enumerate(zip(*cells, strict=True), 1):
                error = next((value.error for value in values if isinstance(value, Unreadable)), "")
                row = None if error else dict(zip(columns, values, strict=True))
                yield Record(f"record {number}", row, error)

    def _cells(self, window: Window, column: int) -> Iterator[Any]:
        window.skip()
        for index, _ in enumerate(window.keys()):
            if index == column:
                window.skip()
                yield from window.array()
                return
            window.skip_value()

    def _form(self, window: Window) -> Literal["lines", "objects"] | _Layout:
        """How to read a file that is not a list.

        It reads the whole file before any record is read, as only an object's last key may decide.
        """
        is_object, begin, end = window.skip() == "{", window.place(), (0, 0)
        keys: dict[str, tuple[int, Items]] = {}
        num_keys = 0
        try:
            for num_keys, key in enumerate(window.keys() if is_object else [""], 1):
                window.skip()
                keys[key] = num_keys - 1, window.skip_value()  # of a repeated key the last value counts
            end = window.place()
            window.expect_end()
        except NotJsonError as error:
            # JSON lines: the first line is a whole object and the error stands on a later one. If the first value is no
            # whole line, another object behind it decides, and then the file's name.
            is_whole_line = begin[0] == end[0] < error.line
            if is_object and is_whole_line:
                return "lines"
            if is_object and end != (0, 0) and window.skip(SPACE_AND_COMMAS) == "{":
                return "objects"
            if self._is_lines and not is_whole_line:
                return "lines"
            raise self._broken(error, self._breaks_off(window, error), 0) from None
        except RecursionError:
            if self._is_lines:
                return "lines"  # only that line is bad
            raise
        return self._layout(keys, num_keys)

    def _layout(self, keys: dict[str, tuple[int, Items]], num_keys: int) -> _Layout:
        lists = {key: index for key, (index, items) in keys.items() if items.opener == "["}
        if columns := self._find_columns({key: items for key, (_, items) in keys.items()}):
            if len(keys) < num_keys:
                raise UserError(f"{shown_path(self.path)}: line 1: two columns of one name; give each its own")
            return _Layout(columns=columns)
        if len(lists) != 1 or self._is_record(keys):
            return _Layout()
        return _Layout(is_record=False, list_index=next(iter(lists.values())))

    def _find_columns(self, keys: dict[str, Items]) -> tuple[str, ...]:
        """The columns of an object whose keys hold a list each, or an object each: one item a record, and no turns.

        Raises:
            UserError: they are not equally long.
        """
        form = self._names.find_form(keys)
        openers = {items.opener for items in keys.values()}
        if form is None or openers not in ({"["}, {"{"}):
            return ()
        of_form = [items for key, items in keys.items() if self._names.known(key) in form.keys]
        if any(items.first == "{" or (form.shape == Shape.TURNS and items.first != "[") for items in of_form):
            return ()
        lengths = {key: items.number for key, items in keys.items()}
        if len(set(lengths.values())) > 1:
            found = short(", ".join(f"{key} {number:,}" for key, number in lengths.items()))
            text = f"columns of different lengths ({found}); each record needs a value in each, be it null"
            raise UserError(f"{shown_path(self.path)}: line 1: {text}")
        if not all(lengths.values()):
            raise self._empty_list()
        return tuple(keys)

    def _lines(self, window: Window) -> Iterator[Record]:
        for number, line in enumerate(window.lines(), 1):
            is_last = window.at_end and window.pos == len(window.text) and not window.text.endswith("\n")
            if not line.strip() or (window.damage and is_last):
                continue
            if len(line) > self.max_chars:
                yield Record(f"line {number}", None, too_long(self.max_chars))
                continue
            try:
                yield Record(f"line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                yield Record(f"line {number}", None, f"column {error.colno}: not JSON: {error.msg}")
            except ValueError as error:  # an integer of more than 4300 digits
                yield Record(f"line {number}", None, short(error))
            except RecursionError:
                yield Record(f"line {number}", None, "nested too deeply")

    def _objects(self, window: Window) -> Iterator[Record]:
        """Objects one after another, with nothing, white space or commas between them.

        After one that is not JSON the next line that begins with an object goes on.
        """
        number = 0
        while window.skip(SPACE_AND_COMMAS):
            number += 1
            try:
                yield _record(f"record {number}", window.value())
            except NotJsonError as error:
                if self._breaks_off(window, error):
                    if not self._salvage:
                        raise self._broken(error, True, number - 1) from None
                    self.num_lost = 1
                    return
                place = f"line {error.line}, column {error.column}"
                yield Record(f"record {number}", None, f"{place}: not JSON: {error.message}")
                window.skip_to_object()

    def _empty_list(self) -> UserError:
        return UserError(f"{shown_path(self.path)}: line 1: an empty list; a dataset needs at least one record")

    def _breaks_off(self, window: Window, error: NotJsonError) -> bool:
        """Whether the error is that the file ends too soon."""
        return error.message.startswith("Unterminated string") or window.is_blank_from(error.pos)

    def _broken(self, error: NotJsonError, breaks_off: bool, num_records: int) -> UserError:
        what = "the file breaks off here" if breaks_off else f"not JSON: {error.message}"
        fix = f"; --salvage keeps the {num_records} complete records before it" if num_records else ""
        text = f"{shown_path(self.path)}: line {error.line}, column {error.column}: {what}{fix}"
        return UserError(text, kind=ErrorKind.TRUNCATED_FILE if breaks_off else ErrorKind.DATA)
