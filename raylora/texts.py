"""What may be shown: texts without secrets, on one line, without characters that a terminal obeys.

Every line on a terminal or in a log, every row, ``run.json`` and what trackers and the hub are told goes through here.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any

_USER_OF_URI = re.compile(r"(?<=\w)(:/+)(?:[^\s/?#@:]*:\S*|[^\s/?#]*)@")
"""``user:password@`` up to the word's last ``@``, as a password may hold one; ``token@`` before the first slash.
A path has made one slash of two."""
_QUERY_OF_URI = re.compile(r"(?<=\w)(:/+[^?\s]*)\?\S*")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
"""Of the Hugging Face hub; they have 34 characters behind ``hf_``."""
_NAMED = re.compile(
    r"(?i)\b((?:aws_?)?(?:secret_?)?access_?key(?:_?id)?|password|passwd|secret|api_?key|(?:x-amz-)?signature|"
    r"x-amz-credential|x-amz-security-token|(?:proxy-)?authorization(?=:))"
    r"(=|: ?(?:(?:bearer|basic) )?+)(?!\.\.\.)[^\s&,;]+"
)
"""``password=...``, ``X-Amz-Signature=...``, ``Authorization: Bearer ...``."""
_SECRET_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY)$")
_PASSWORD_IN_URI = re.compile(r"://[^\s/?#@:]*:(\S+)@")
MIN_SECRET = 8
"""Characters of a variable's value that is looked for in texts: shorter ones, such as ``none``, are words as well."""
MIN_KEY = 16
"""The same of a variable whose name ends with KEY, as that of a column to sort by does: keys of services are longer."""
MIN_PASSWORD = 6
"""The same of a password within a variable's URI."""
_OBEYED = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories that are escaped: control characters, line breaks, bidirectional marks, zero-width characters."""


def without_secrets(text: str) -> str:
    """Text that may be shown: without the users, passwords and queries of its URIs, tokens of the Hugging Face hub, and
    what variables such as ``WANDB_API_KEY`` hold."""
    for secret in _secrets(tuple(os.environ.items())):
        text = text.replace(secret, "...")
    if ":/" in text:
        text = _USER_OF_URI.sub(r"\1...@", _QUERY_OF_URI.sub(r"\1?...", text))
    return _TOKEN.sub("hf_...", _NAMED.sub(r"\1\2...", text))


@lru_cache(maxsize=8)
def _secrets(variables: tuple[tuple[str, str], ...]) -> list[str]:
    """The values of variables that are secrets, and passwords in their URIs, the longest first."""
    named = [(name.upper(), value) for name, value in variables if _SECRET_VARIABLE.search(name.upper())]
    found = {v for name, v in named if len(v) >= (MIN_KEY if name.endswith("KEY") else MIN_SECRET)}
    for _, value in variables:
        found.update(p for p in _PASSWORD_IN_URI.findall(value) if len(p) >= MIN_PASSWORD)
    return sorted(found, key=len, reverse=True)


def printable(text: str) -> str:
    """Text with an escape, such as ``\\n`` or ``\\x1b``, for each character that a terminal obeys or does not show."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) if unicodedata.category(c) in _OBEYED else c for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def shown_line(text: object) -> str:
    """A text as one line that may be shown: ``without_secrets``, and ``printable``."""
    return printable(without_secrets(str(text)))


def shown_values(value: Any) -> Any:
    """A JSON value with ``without_secrets`` of every text in it, keys left as they are."""
    if isinstance(value, str):
        return without_secrets(value)
    if isinstance(value, Mapping):
        return {key: shown_values(item) for key, item in value.items()}
    return [shown_values(item) for item in value] if isinstance(value, list | tuple) else value


def shown_traceback(error: BaseException) -> str:
    """A traceback without secrets, each line of it indented, so that none can pass for a line of the log."""
    text = "".join(traceback.format_exception(error)).rstrip()
    return "\n".join(f"  {shown_line(line)}" for line in text.split("\n"))


class LineFormatter(logging.Formatter):
    """Log lines that may be shown: one a message, and the lines of a traceback indented below it."""

    def format(self, record: logging.LogRecord) -> str:
        message = shown_line(record.getMessage())
        plain = {**record.__dict__, "msg": message, "args": (), "exc_info": None, "exc_text": None}
        line = super().format(logging.makeLogRecord(plain))
        error = record.exc_info[1] if record.exc_info else None
        return f"{line}\n{shown_traceback(error)}" if error else line


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """A ``sys.excepthook``: of what no command catches the traceback is shown, without secrets."""
    print(without_secrets("".join(traceback.format_exception(kind, error, trace))).rstrip(), file=sys.stderr)
