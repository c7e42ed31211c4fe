"""A window of text that slides over a file, and the JSON values in it, with Python's own decoder.

So errors are those of ``json.loads``, with line and column in the whole file, which ijson cannot give
(benchmarks/NOTES.md).
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from raylora.config.options import MAX_RECORD_CHARS
from raylora.data.byte_stream import ByteStream
from raylora.data.record_stream import LARGEST_PIECE, in_bytes, short, shown_path, too_long
from raylora.errors import ErrorKind, NotJsonError, UserError

PIECE = 1 << 20
"""Bytes read at a time; more where a single value is longer."""
CUT_MARGIN = 16
"""An error in the last so many characters of the window may only say that the window cuts a value in two. The longest
such values are ``-Infinity`` (9 characters) and the two escapes of one character beyond U+FFFF (12)."""
SPACE = re.compile(r"[ \t\n\r]*")
IN_STRING = re.compile(r'(?s)(?:[^"\\]++|\\.)*+')
NUMBER = re.compile(r"[^,\]}\s]*+")
OUTSIDE = re.compile(r'[^"\[\]{}]*+')
SPACE_AND_COMMAS = re.compile(r"[ \t\n\r,]*")
_decode_utf8 = json.JSONDecoder().raw_decode
_decode_any_digits = json.JSONDecoder(parse_int=str).raw_decode
"""Goes past an integer of more digits than Python reads (4300), which is a string here."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value that is JSON, but cannot be a Python value, and says why."""

    error: str


@dataclass(frozen=True)
class Items:
    """What a list or an object holds: how many items, and the character that the first begins with."""

    opener: str = ""
    """``[`` or ``{``; empty where it is neither."""
    number: int = 0
    first: str = ""


class Window:
    """A window of text that slides over a file: read a piece at a time, dropped once it lies before ``pos``.

    Reading raises:
        UserError: the file cannot be read, or is not UTF-8.
    """

    def __init__(self, path: Path, max_chars: int = MAX_RECORD_CHARS) -> None:
        self.path, self.max_chars = path, max_chars
        self.num_quotes_dropped = 0
        self._bytes = ByteStream(path)
        self._begin()

    def __enter__(self) -> Window:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._bytes.close()

    def rewind(self) -> None:
        """Begin again at the file's first byte."""
        self._bytes.close()
        self._bytes.open()
        self._begin()

    def _begin(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._num_decoded = 0  # bytes, of the decompressed file
        self.text, self.pos, self.at_end = "", 0, False
        self._line, self._column = 1, 1  # of text[0], in the file

    @property
    def hash(self) -> str:
        """SHA-256 of the file's bytes in hex; empty before its end is read."""
        return self._bytes.hash

    @property
    def damage(self) -> str:
        """What is wrong with the compressed data, which ends the text; empty where nothing is."""
        return self._bytes.damage

    def more(self) -> bool:
        """Read as much again as is left in the window, so that a long value is tried few times. False at the end."""
        self._drop_passed()
        self._check_size()
        data = self._bytes.read(max(PIECE, len(self.text)))
        self.at_end = not data
        pending, _ = self._decoder.getstate()
        try:
            text = self._decoder.decode(data, final=not data and not self.damage)
        except UnicodeDecodeError as error:
            raise self._not_utf8(error, self._num_decoded - len(pending)) from None
        if len(pending) == self._num_decoded:  # nothing was decoded before: the file's first character may be its mark
            text = text.removeprefix("\ufeff")
        self.text += text
        self._num_decoded += len(data)
        return not self.at_end

    def _check_size(self) -> None:
        self._check_swelling(len(self.text))

    def _check_swelling(self, num_chars: int) -> None:
        """Raise UserError where one value of a compressed file has so many characters."""
        if self._bytes.compression and num_chars > max(LARGEST_PIECE, self._bytes.size):
            self._bytes.skip_rest()
            text = f"one value of more than {in_bytes(num_chars)}, out of {in_bytes(self._bytes.size)}"
            raise UserError(f"{shown_path(self.path)}: line {self._line}: {text}: no dataset, or unpack it first")

    def _not_utf8(self, error: UnicodeDecodeError, begin: int) -> UserError:
        """The error that names the first byte which is not UTF-8.

        Args:
            begin: bytes of the file before those that the decoder was given.
        """
        self.text += error.object[: error.start].decode()
        line, column = self.place(len(self.text))
        while self._bytes.read(PIECE):
            pass
        where = f"line {line}, column {column}: not UTF-8 (byte {begin + error.start})"
        return UserError(f"{shown_path(self.path)}: {where}; save the file as UTF-8", kind=ErrorKind.NOT_UTF8)

    def drain(self) -> None:
        """Read to the file's end, for the hash and to see whether all of it is UTF-8."""
        while not self.at_end:
            self.pos = len(self.text)
            self.more()

    def _drop_passed(self) -> None:
        self._line, self._column = self.place(self.pos)
        self.text, self.pos = self.text[self.pos :], 0

    def place(self, pos: int | None = None) -> tuple[int, int]:
        """Line and column in the file, from 1, of a position in ``text``, by default ``pos``."""
        pos = self.pos if pos is None else pos
        lines = self.text.count("\n", 0, pos)
        column = pos - self.text.rfind("\n", 0, pos) if lines else self._column + pos
        return self._line + lines, column

    def skip(self, skipped: re.Pattern[str] = SPACE) -> str:
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

        Where it is longer than a record may be, or an integer in it has more digits than Python reads, ``Unreadable``
        stands for all of it.

        Raises:
            NotJsonError: there is none.
        """
        decode, too_long = _decode_utf8, ""
        while True:
            try:
                value, end = decode(self.text, self.pos)
                if end < len(self.text) - 2 or self.at_end:  # 1.5 near the window's end may be the start of 1.5e-3
                    is_long, self.pos = end - self.pos > self.max_chars, end
                    return Unreadable(self._too_long if is_long else too_long) if is_long or too_long else value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - CUT_MARGIN
                if self.at_end or not cut:
                    raise self.error(error.msg, error.pos) from None
            except ValueError as error:  # too many digits; where the window ends in them they may be those of a float
                if self.at_end or not self.text[-1:].isdecimal():
                    decode, too_long = _decode_any_digits, short(error)
                    continue
            if len(self.text) - self.pos > self.max_chars + CUT_MARGIN:
                return self._skip_long()
            self.more()

    @property
    def _too_long(self) -> str:
        return too_long(self.max_chars)

    def _skip_long(self) -> Unreadable:
        """Move past a value without keeping it: to the quote or bracket that ends it, whatever lies between.

        Raises:
            NotJsonError: nothing ends it.
        """
        depth, in_string, num_skipped = 0, False, 0
        if self.text[self.pos] not in '"[{':
            self.skip(NUMBER)
            return Unreadable(self._too_long)
        while True:
            begin = self.pos
            while self.pos < len(self.text):
                pattern = IN_STRING if in_string else OUTSIDE
                self.pos = pattern.match(self.text, self.pos).end()  # type: ignore[union-attr]
                character = self.text[self.pos : self.pos + 1]
                if not character or character == "\\":
                    break  # an escape that the window cuts in two
                self.pos += 1
                if character == '"':
                    in_string = not in_string
                else:
                    depth += 1 if character in "[{" else -1
                if depth <= 0 and not in_string:
                    return Unreadable(self._too_long)
            num_skipped += self.pos - begin
            self._check_swelling(num_skipped)
            if not self.more():
                raise self.error("Unterminated string starting at" if in_string else "Expecting ',' delimiter")

    def array(self) -> Iterator[Any]:
        """The values of the list, or of the object, that begins here."""
        for _ in self.items():
            yield self.value()

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
            if isinstance(key, Unreadable):
                raise self.error(f"a key is {key.error}")
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

    def items(self) -> Iterator[None]:
        """Stands before each item of the list, or of the object, that begins here; the caller reads it or skips it."""
        if self.skip() == "{":
            for _ in self.keys():
                yield
            return
        self.pos += 1
        if self.skip() == "]":
            self.pos += 1
            return
        while True:
            yield
            delimiter = self.skip()
            if delimiter not in {",", "]"}:
                raise self.error("Expecting ',' delimiter")
            self.pos += 1
            if delimiter == "]":
                return
            self.skip()

    def skip_value(self) -> Items:
        """Move past a value, one item at a time, as the list of records may be as long as the file."""
        opener = self.skip()
        if opener not in {"[", "{"}:
            self.value()
            return Items()
        number, first = 0, ""
        for _ in self.items():
            number += 1
            first = first or self.skip()
            self.value()
        return Items(opener, number, first)

    def leading(self) -> Iterator[Any]:
        """Values from here on, with commas between them or not, up to what is not a value."""
        while True:
            self.skip(SPACE_AND_COMMAS)
            try:
                value = self.value()
            except UserError:
                raise
            except ValueError:
                return
            yield value

    def skip_to_object(self) -> None:
        """Move to the next line that begins with an object, or to the end."""
        for _ in self.lines():
            if not self.text[self.pos :] and not self.more():
                return
            if self.text[self.pos] == "{":
                return

    def lines(self) -> Iterator[str]:
        """The rest of the file, line by line. Of one that is longer than a record may be the end is dropped."""
        while True:
            end = self.text.find("\n", self.pos)
            self.num_quotes_dropped = 0
            if end < 0 and len(self.text) - self.pos > self.max_chars:
                yield self._begin_of_long_line()
            elif end >= 0:
                line, self.pos = self.text[self.pos : end], end + 1
                yield line
            elif not self.more():
                line, self.pos = self.text[self.pos :], len(self.text)
                yield line
                return

    def _begin_of_long_line(self) -> str:
        kept, end = self.text[self.pos : self.pos + self.max_chars + 1], -1
        self.pos += len(kept)
        num_skipped = 0
        while end < 0:
            end = self.text.find("\n", self.pos)
            passed = end if end >= 0 else len(self.text)
            self.num_quotes_dropped += self.text.count('"', self.pos, passed)
            num_skipped += passed - self.pos
            self.pos = passed + (end >= 0)
            if end < 0:
                self._check_swelling(num_skipped)
                if not self.more():
                    break
        return kept

    def line_before_another(self) -> str:
        """The line from here; empty where none but blank ones follow it, or where it is longer than a piece."""
        while "\n" not in self.text and len(self.text) < PIECE and self.more():
            pass
        line, end, _ = self.text[self.pos :].partition("\n")
        return line if end and not self.is_blank_from(self.pos + len(line)) else ""
