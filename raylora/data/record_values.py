"""Values of a record: what counts as text, and what as not there."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from raylora.data.record_stream import kind
from raylora.errors import BadRecordError

FIRST_WITHOUT_SPACES = "\u2e80"
"""Chinese and Japanese characters begin here: their words have no spaces between them."""
MAX_PLACES = 100
"""Places of a text that ``stands_in`` looks at: of a part such as "aaaa" there may be as many as characters."""


def without_nulls(record: Mapping[Any, Any]) -> dict[Any, Any]:
    """A record, a turn or a part without the keys whose value is null or NaN: tables write every column."""
    return {key: value for key, value in record.items() if not _is_null(value)}


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, a blank text, an empty list or object."""
    if isinstance(value, str):
        return not value.strip()
    return _is_null(value) or (isinstance(value, list | dict) and not value)


def text_of(value: Any, name: str) -> str:
    """A text, or a number, true or false as its JSON text. It may be empty.

    Raises:
        BadRecordError: it is neither, or cannot be written as UTF-8.
    """
    if isinstance(value, bool | int | float):
        return json_text(value, name)
    if not isinstance(value, str):
        raise BadRecordError(f"{name}: expected text, found {kind(value)}")
    _check_utf8(value, name)
    return value


def require_text(value: Any, name: str) -> str:
    """``text_of``, if it is not blank.

    Raises:
        BadRecordError: it is blank, or no text.
    """
    text = text_of(value, name)
    if not text.strip():
        raise BadRecordError(f"{name} is empty")
    return text


def optional_text(record: Mapping[str, Any], keys: Iterable[str]) -> str:
    """The text under the first of ``keys`` that holds something; empty where none does, or where it is blank.

    Raises:
        BadRecordError: it is no text.
    """
    for key in keys:
        value = record.get(key)
        if value is not None and value != "":
            return text if (text := text_of(value, key)).strip() else ""
    return ""


def json_text(value: Any, name: str) -> str:
    """A JSON value as text, its keys in their order.

    Raises:
        BadRecordError: it cannot be written as JSON, or not as UTF-8.
    """
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        raise BadRecordError(f"{name}: cannot be written as JSON: nested too deeply, or too long a number") from None
    _check_utf8(text, name)
    return text


def parsed(value: Any) -> Any:
    """The JSON value that a text holds, as tables write lists and objects; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def leaves_of(value: Any) -> Iterator[Any]:
    """All texts and numbers within a JSON value, at any depth, but for the keys of objects."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif item is not None:
            yield item


def stands_in(part: str, text: str) -> bool:
    """Whether a part is one of the words, or some of the words, of a text: "cat" is not in "category"."""
    if not part:
        return True
    start = -1
    for _ in range(MAX_PLACES):
        start = text.find(part, start + 1)
        if start < 0:
            return False
        around = text[max(start - 1, 0) : start] + text[start + len(part) : start + len(part) + 1]
        if not any(character.isalnum() and character < FIRST_WITHOUT_SPACES for character in around):
            return True
    return False


def _check_utf8(text: str, name: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRecordError(f"{name}: holds half a character (a lone surrogate)") from None
