"""The records of a JSON or JSONL file, one after another: memory does not grow with the file.

Python's own decoder reads each value out of a window of text that slides over the file. What is wrong with a file is
thus said in the words of ``json.loads``, with the line and column of the whole file.
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

PIECE = 1 << 20
"""Bytes read at a time."""
CUT_MARGIN = 16
"""Characters before the window's end where what looks wrong may only be cut: a literal, or two escapes, and no more."""
_SPACE = re.compile(r"[ \t\n\r]*")
_SPACE_AND_COMMAS = re.compile(r"[ \t\n\r,]*")
_decode_utf8 = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Record:
    """One record as JSON has it, or why it could not be read. ``place``: ``record 7``, or ``line 7``."""

    place: str
    value: Any
    error: str = ""


class RecordStream:
    """The records of a file, good for one pass.

    Args:
        is_record: whether an object is itself a record, by its keys; another one may wrap a list of records.
        salvage: keep the complete leading records of a file that breaks off.

    Iteration raises:
        UserError: the file cannot be read, is no JSON, or breaks off. Records that came before it are no salvage.
    """

    def __init__(self, path: Path, is_record: Callable[[Any], bool], salvage: bool = False) -> None:
        self.path, self._is_record, self._salvage = path, is_record, salvage
        self.hash = ""
        """SHA-256 of the file's bytes, once all records were asked for, also where the file is no JSON."""
        self.num_lost = 0
        """Records lost by salvage; -1 where that can't be known."""

    def __iter__(self) -> Iterator[Record]:
        with _Window(self.path) as window:
            try:
                yield from self._records(window)
                window.drain()
            except UserError:
                window.drain()  # where the rest is not UTF-8, that is said first
                raise
            except RecursionError:
                window.drain()
                raise UserError(f"{shown_path(self.path)}: nested too deeply to be a dataset") from None
            except ValueError as error:  # an integer of more digits than Python reads
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
            # The record in which the file breaks off is lost; how many more lay behind other damage, no one can know.
            self.num_lost = int(window.skip() != "") if breaks_off else -1
        if not number:
            raise self._empty_list()

    def _wrapped_list(self, window: _Window, number: int) -> Iterator[Record]:
        window.skip()
        n = 0
        for i, _ in enumerate(window.keys()):
            if i != number:
                window.pass_value()
                continue
            for n, value in enumerate(window.array(), 1):
                yield Record(f"record {n}", value)
        if not n:
            raise self._empty_list()

    def _form(self, window: _Window) -> Literal["lines", "value"] | int:
        """How a file that is no list is to be read: ``lines``, ``value``, or which of an object's values is the list.

        A pass of its own: an object may show only at its end what it is.
        """
        is_object, begin, end = window.skip() == "{", window.place(), (0, 0)
        lists: dict[str, int] = {}
        keys: dict[str, None] = {}
        try:
            for number, key in enumerate(window.keys() if is_object else [""]):
                keys[key] = None
                lists.pop(key, None)  # of a key that comes twice, the last one counts
                if window.skip() == "[" and is_object:
                    lists[key] = number
                window.pass_value()
            end = window.place()
            window.expect_end()
        except NotJsonError as error:
            # The first line is a whole object, and there are more behind it; or the name says that lines are meant.
            is_whole_line = begin[0] == end[0] < error.line
            if is_object if is_whole_line else self.path.suffix.lower() == ".jsonl":
                return "lines"
            raise self._broken(error, self._breaks_off(window, error), 0) from None
        if len(lists) != 1 or self._is_record(keys):
            return "value"
        (only,) = lists.values()
        return only

    def _lines(self, window: _Window) -> Iterator[Record]:
        for number, line in enumerate(window.lines(), 1):
            if not line.strip():
                continue
            try:
                yield Record(f"line {number}", json.loads(line))
            except json.JSONDecodeError as error:
                yield Record(f"line {number}", None, f"column {error.colno}: not JSON: {error.msg}")
            except ValueError as error:  # an integer of more digits than Python reads
                yield Record(f"line {number}", None, short(error))

    def _empty_list(self) -> UserError:
        return UserError(f"{shown_path(self.path)}: line 1: an empty list; a dataset needs at least one record")

    def _breaks_off(self, window: _Window, error: NotJsonError) -> bool:
        return error.message.startswith("Unterminated string") or window.is_blank_from(error.pos)

    def _broken(self, error: NotJsonError, breaks_off: bool, num_records: int) -> UserError:
        what = "the file breaks off here" if breaks_off else f"not JSON: {error.message}"
        fix = f"; --salvage keeps the {num_records} complete records before it" if num_records else ""
        text = f"{shown_path(self.path)}: line {error.line}, column {error.column}: {what}{fix}"
        return UserError(text, kind=ErrorKind.TRUNCATED_FILE if breaks_off else ErrorKind.DATA)


class _Window:
    """A file's text, read a piece at a time and forgotten once it is behind ``pos``.

    Reading raises:
        UserError: the file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
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
        self._file.seek(0)
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._hash = hashlib.sha256()
        self.text, self.pos, self.at_end = "", 0, False
        self._line, self._column = 1, 1  # of the text's first character

    @property
    def hash(self) -> str:
        """Of what was read; empty before the end."""
        return self._hash.hexdigest() if self.at_end else ""

    def more(self) -> bool:
        """Read on, twice as much as is not done with; False at the end."""
        self._forget()
        data = self._read(max(PIECE, len(self.text)))
        try:
            self.text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            while self._read(PIECE):
                pass
            raise _not_utf8(self.path) from None
        return not self.at_end

    def drain(self) -> None:
        """Read to the end, and see that it is UTF-8."""
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

    def _forget(self) -> None:
        self._line, self._column = self.place(self.pos)
        self.text, self.pos = self.text[self.pos :], 0

    def place(self, pos: int | None = None) -> tuple[int, int]:
        """Line and column, from 1, of a position in the window (by default where it stands)."""
        pos = self.pos if pos is None else pos
        lines = self.text.count("\n", 0, pos)
        column = pos - self.text.rfind("\n", 0, pos) if lines else self._column + pos
        return self._line + lines, column

    def skip(self, what: re.Pattern[str] = _SPACE) -> str:
        """Go past white space; the character that comes then, empty at the end."""
        while True:
            self.pos = what.match(self.text, self.pos).end()  # type: ignore[union-attr]
            if self.pos < len(self.text):
                return self.text[self.pos]
            if not self.more():
                return ""

    def is_blank_from(self, pos: int) -> bool:
        """Whether nothing but white space, of any script, stands behind a position."""
        pos -= self.pos
        while not self.text[self.pos + pos :].strip():
            if not self.more():
                return True
        return False

    def error(self, message: str, pos: int | None = None) -> NotJsonError:
        pos = self.pos if pos is None else pos
        return NotJsonError(message, pos, *self.place(pos))

    def expect_end(self) -> None:
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
            except ValueError:
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
            mark = self.skip()
            if mark not in {",", "]"}:
                raise self.error("Expecting ',' delimiter")
            self.pos += 1
            if mark == "]":
                return
            self.skip()

    def keys(self) -> Iterator[str]:
        """The keys of the object that begins here. Who asks reads each one's value before asking for the next."""
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
            mark = self.skip()
            if mark not in {",", "}"}:
                raise self.error("Expecting ',' delimiter")
            self.pos += 1
            if mark == "}":
                return

    def pass_value(self) -> None:
        """Go past a value, a list item by item."""
        if self.skip() != "[":
            self.value()
            return
        for _ in self.array():
            pass

    def leading(self) -> Iterator[Any]:
        """Values from here on, up to the first that is none."""
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
        while True:
            end = self.text.find("\n", self.pos)
            if end >= 0:
                line, self.pos = self.text[self.pos : end], end + 1
                yield line
            elif not self.more():
                yield self.text[self.pos :]
                return


def shown_path(path: Path) -> str:
    """A path on one line, whatever its name holds."""
    text = str(path)
    return text if text.isprintable() else ascii(text)


def kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def short(value: Any) -> str:
    text = ascii(str(value))[1:-1] if not str(value).isprintable() else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{shown_path(path)}: cannot be read: {reason(error)}")


def _not_utf8(path: Path) -> UserError:
    """Where the first byte stands that is no UTF-8."""
    begin = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            try:
                line.decode()
            except UnicodeDecodeError as error:
                at = f"line {number}, column {error.start + 1}: not UTF-8 (byte {begin + error.start})"
                return UserError(f"{shown_path(path)}: {at}; save the file as UTF-8", kind=ErrorKind.NOT_UTF8)
            begin += len(line)
    return UserError(f"{shown_path(path)}: line 1: not UTF-8; save the file as UTF-8", kind=ErrorKind.NOT_UTF8)
