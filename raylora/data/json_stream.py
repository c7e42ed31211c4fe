"""The records of a JSON or JSONL file, one after another: memory does not grow with the file.

Python's own decoder reads each value out of a window of text that slides over the file. So errors are those of
``json.loads``, with line and column in the whole file, which ijson cannot give (benchmarks/NOTES.md).
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from raylora.errors import ErrorKind, NotJsonError, UserError, reason
from raylora.storage.places import check_regular

PIECE = 1 << 20
"""Bytes read at a time; more where a single value is longer."""
CUT_MARGIN = 16
"""An error in the last so many characters of the window may only say that the window cuts a value in two. The longest
such values are ``-Infinity`` (9 characters) and the two escapes of one character beyond U+FFFF (12)."""
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_AND_COMMAS = re.compile(r"[ \t\n\r,]*")
_decode_utf8 = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Record:
    """A parsed record, or in ``error`` why it could not be parsed. ``place`` is ``record 7`` or ``line 7``."""

    place: str
    value: Any
    error: str = ""


class RecordStream:
    """Yields the records of a file, once.

    Args:
        is_record: whether an object with these keys is itself a record; any other may wrap a list of records.
        salvage: keep the complete records at the beginning of a file that breaks off.

    Iteration raises:
        UserError: the file cannot be read, is not JSON, or breaks off. Records yielded before must not be used then:
            ``salvage`` is for that.
    """

    def __init__(self, path: Path, is_record: Callable[[Any], bool], salvage: bool = False) -> None:
        self.path, self._is_record, self._salvage = path, is_record, salvage
        self.hash = ""
        """SHA-256 of the file's bytes in hex, once iteration has ended, be it by an error: also of what is not JSON."""
        self.num_lost = 0
        """Records lost by salvage; -1 where nobody can know how many."""

    def __iter__(self) -> Iterator[Record]:
        with _Window(self.path) as window:
            try:
                yield from self._records(window)
                window.drain()
            except UserError:
                window.drain()  # if the rest of the file is not UTF-8, that error is raised in place of this one
                raise
            except RecursionError:
                window.drain()
                raise UserError(f"{shown_path(self.path)}: nested too deeply to be a dataset") from None
            except ValueError as error:  # an integer of more digits than Python reads, 4300
                window.drain()
                raise UserError(f"{shown_path(self.path)}: {short(error)}") from None
            finally:
                self.hash = window.hash

    def _records(self, window: _Window) -> Iterator[Record]:
        first = window.skip()
        if window.is_blank_from(window.pos):
            raise UserError(f"{shown_path(self.path)}: line 1: empty; delete the file or write it again")
        if first == "[":
            yield from self._list(window)
            return
        form = self._form(window)
        window.rewind()
        if isinstance(form, int):
            yield from self._wrapped_list(window, form)
        elif form == "lines":
            yield from self._lines(window)
        else:
            window.skip()
            value = window.value()
            if not isinstance(value, dict):
                raise UserError(f"{shown_path(self.path)}: line 1: expected a list of records, found {kind(value)}")
            yield Record("record 1", value)

    def _list(self, window: _Window) -> Iterator[Record]:
        number, end = 0, None
        try:
            for number, value in enumerate(window.array(), 1):
                yield Record(f"record {number}", value)
            end = window.place()
            window.expect_end()
        except NotJsonError as error:
            breaks_off = self._breaks_off(window, error)
            for value in () if end else window.leading():
                number += 1
                yield Record(f"record {number}", value)
            if not self._salvage or not number:
                raise self._broken(error, breaks_off, number) from None
            # A file that breaks off loses the record that it breaks off in; after other damage the number is unknown.
            self.num_lost = int(window.skip() != "") if breaks_off else -1
        if not number:
            raise self._empty_list()

    def _wrapped_list(self, window: _Window, list_index: int) -> Iterator[Record]:
        """The records of the list under the key at ``list_index`` of the file's object."""
        window.skip()
        number = 0
        for key_index, _ in enumerate(window.keys()):
            if key_index != list_index:
                window.skip_value()
                continue
            for number, value in enumerate(window.array(), 1):
                yield Record(f"record {number}", value)
        if not number:
            raise self._empty_list()

    def _form(self, window: _Window) -> Literal["lines", "value"] | int:
        """How to read a file that is not a list: ``lines``, ``value``, or the index of the key that holds the list.

        It reads the whole file before any record is read, as only an object's last key may decide.
        """
        is_object, begin, end = window.skip() == "{", window.place(), (0, 0)
        list_indices: dict[str, int] = {}
        keys: dict[str, None] = {}
        try:
            for index, key in enumerate(window.keys() if is_object else [""]):
                keys[key] = None
                list_indices.pop(key, None)  # of a repeated key the last value counts, as in json.loads
                if window.skip() == "[" and is_object:
                    list_indices[key] = index
                window.skip_value()
            end = window.place()
            window.expect_end()
        except NotJsonError as error:
            # JSON lines: the first line is a whole object and the error stands on a later one. If the first value is no
            # whole line, the file's name decides.
            is_whole_line = begin[0] == end[0] < error.line
            if is_object if is_whole_line else self.path.suffix.lower() == ".jsonl":
                return "lines"
            raise self._broken(error, self._breaks_off(window, error), 0) from None
        if len(list_indices) != 1 or self._is_record(keys):
            return "value"
        (list_index,) = list_indices.values()
        return list_index

    def _lines(self, window: _Window) -> Iterator[Record]:
        for number, line in enumerate(window.lines(), 1):
            if not line.strip():
                continue
            try:
                yield Record(f"line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                yield Record(f"line {number}", None, f"column {error.colno}: not JSON: {error.msg}")
            except ValueError as error:  # an integer of more than 4300 digits
                yield Record(f"line {number}", None, short(error))

    def _empty_list(self) -> UserError:
        return UserError(f"{shown_path(self.path)}: line 1: an empty list; a dataset needs at least one record")

    def _breaks_off(self, window: _Window, error: NotJsonError) -> bool:
        """Whether the error is that the file ends too soon."""
        return error.message.startswith("Unterminated string") or window.is_blank_from(error.pos)

    def _broken(self, error: NotJsonError, breaks_off: bool, num_records: int) -> UserError:
        what = "the file breaks off here" if breaks_off else f"not JSON: {error.message}"
        fix = f"; --salvage keeps the {num_records} complete records before it" if num_records else ""
        text = f"{shown_path(self.path)}: line {error.line}, column {error.column}: {what}{fix}"
        return UserError(text, kind=ErrorKind.TRUNCATED_FILE if breaks_off else ErrorKind.DATA)


class _Window:
    """A window of text that slides over a file: read a piece at a time, dropped once it lies before ``pos``.

    Reading raises:
        UserError: the file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        check_regular(path)
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise _unreadable(path, error) from None
        self.rewind()

    def __enter__(self) -> _Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()

    def rewind(self) -> None:
        """Begin again at the file's first byte."""
        self._file.seek(0)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._hash = hashlib.sha256()
        self.text, self.pos, self.at_end = "", 0, False
        self._line, self._column = 1, 1  # of text[0], in the file

    @property
    def hash(self) -> str:
        """SHA-256 of the file's bytes in hex; empty before its end is read."""
        return self._hash.hexdigest() if self.at_end else ""

    def more(self) -> bool:
        """Read as much again as is left in the window, so that a long value is tried few times. False at the end."""
        self._drop_passed()
        data = self._read(max(PIECE, len(self.text)))
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            while self._read(PIECE):
                pass
            raise _not_utf8(self.path) from None
        return not self.at_end

    def drain(self) -> None:
        """Read to the file's end, for the hash and to see whether all of it is UTF-8."""
        while not self.at_end:
            self.pos = len(self.text)
            self.more()

    def _read(self, size: int) -> bytes:
        try:
            data = self._file.read(size)
        except OSError as error:
            raise _unreadable(self.path, error) from None
        self._hash.update(data)
        self.at_end = not data
        return data

    def _drop_passed(self) -> None:
        self._line, self._column = self.place(self.pos)
        self.text, self.pos = self.text[self.pos :], 0

    def place(self, pos: int | None = None) -> tuple[int, int]:
        """Line and column in the file, from 1, of a position in ``text``, by default ``pos``."""
        pos = self.pos if pos is None else pos
        lines = self.text.count("\n", 0, pos)
        column = pos - self.text.rfind("\n", 0, pos) if lines else self._column + pos
        return self._line + lines, column

    def skip(self, skipped: re.Pattern[str] = _SPACE) -> str:
        """Move past white space, and return the character that follows; an empty string at the file's end."""
        while True:
            self.pos = skipped.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self.more():
                return ""

    def is_blank_from(self, pos: int) -> bool:
        """Whether nothing but white space, of any script, follows the position ``pos``."""
        offset = pos - self.pos  # reading on drops what lies before self.pos
        while not self.text[self.pos + offset :].strip():
            if not self.more():
                return True
        return False

    def error(self, message: str, pos: int | None = None) -> NotJsonError:
        pos = self.pos if pos is None else pos
        return NotJsonError(message, pos, *self.place(pos))

    def expect_end(self) -> None:
        """Raises NotJsonError if anything but white space follows."""
        if self.skip():
            raise self.error("Extra data")

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            NotJsonError: there is none.
            ValueError: an integer in it has more digits than Python reads.
        """
        while True:
            try:
                value, end = _decode_utf8(self.text, self.pos)
                if end < len(self.text) - 2 or self.at_end:  # 1.5 near the window's end may be the start of 1.5e-3
                    self.pos = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - CUT_MARGIN
                if self.at_end or not cut:
                    raise self.error(error.msg, error.pos) from None
            except ValueError:  # too many digits; read on, they may be those of a float, which has no limit
                if self.at_end or not self.text[-1:].isdecimal():
                    raise
            self.more()

    def array(self) -> Iterator[Any]:
        """The values of the list that begins here."""
        self.pos += 1
        if self.skip() == "]":
            self.pos += 1
            return
        while True:
            yield self.value()
            delimiter = self.skip()
            if delimiter not in {",", "]"}:
                raise self.error("Expecting ',' delimiter")
            self.pos += 1
            if delimiter == "]":
                return
            self.skip()

    def keys(self) -> Iterator[str]:
        """The keys of the object that begins here. The caller reads or skips a key's value before it takes the next."""
        self.pos += 1
        if self.skip() == "}":
            self.pos += 1
            return
        while True:
            if self.skip() != '"':
                raise self.error("Expecting property name enclosed in double quotes")
            key = self.value()
            if self.skip() != ":":
                raise self.error("Expecting ':' delimiter")
            self.pos += 1
            self.skip()
            yield key
            delimiter = self.skip()
            if delimiter not in {",", "}"}:
                raise self.error("Expecting ',' delimiter")
            self.pos += 1
            if delimiter == "}":
                return

    def skip_value(self) -> None:
        """Move past a value, one item at a time if it is a list, as the list of records may be as long as the file."""
        if self.skip() != "[":
            self.value()
            return
        for _ in self.array():
            pass

    def leading(self) -> Iterator[Any]:
        """Values from here on, with commas between them or not, up to what is not a value."""
        while True:
            self.skip(_SPACE_AND_COMMAS)
            try:
                value = self.value()
            except UserError:
                raise
            except ValueError:
                return
            yield value

    def lines(self) -> Iterator[str]:
        """The rest of the file, line by line."""
        while True:
            end = self.text.find("\n", self.pos)
            if end >= 0:
                line, self.pos = self.text[self.pos : end], end + 1
                yield line
            elif not self.more():
                yield self.text[self.pos :]
                return


def shown_path(path: Path) -> str:
    """A path as printable text on one line, whatever characters its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def kind(value: Any) -> str:
    """The JSON type of a value, for error messages."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    """A value as printable text of at most 80 characters, for error messages."""
    text = ascii(str(value))[1:-1] if not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{shown_path(path)}: cannot be read: {reason(error)}")


def _not_utf8(path: Path) -> UserError:
    """The error that names the first byte which is not UTF-8."""
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                line.decode()
            except UnicodeDecodeError as error:
                where = f"line {number}, column {error.start + 1}: not UTF-8 (byte {begin + error.start})"
                return UserError(f"{shown_path(path)}: {where}; save the file as UTF-8", kind=ErrorKind.NOT_UTF8)
            begin += len(line)
    return UserError(f"{shown_path(path)}: line 1: not UTF-8; save the file as UTF-8", kind=ErrorKind.NOT_UTF8)
