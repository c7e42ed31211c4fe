"""CSV that a spreadsheet opens without running anything: cells that it would take for formulas are guarded.

A text that begins with ``=``, ``+``, ``-``, ``@``, a tab or a line break gets an apostrophe in front (OWASP, "CSV
Injection"); so does one that would otherwise lose one when it is read. Numbers stay numbers.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_GUARDED = re.compile(r"''*[=+\-@\t\r\n]")


def guarded(value: Any) -> Any:
    """A cell as it is written."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unguarded(value: Any) -> Any:
    """A cell as it was, from one that was read."""
    return value[1:] if isinstance(value, str) and _GUARDED.match(value) else value


def write_csv(table: pd.DataFrame, path: Path, index: bool = False) -> None:
    """Write a table as CSV, its texts and the names of its columns guarded.

    Args:
        index: write the index too, as the first columns.
    """
    if index:
        table = table.reset_index()
    table = _changed(table, guarded)
    # A carriage return alone is no reason for pandas to quote a cell, but a line's end when it is read.
    texts = itertools.chain(table.columns, *(table.iloc[:, i] for i in _texts_of(table)))
    has_return = any("\r" in text for text in texts if isinstance(text, str))
    table.to_csv(path, index=False, quoting=csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL)


def read_csv(source: IO[bytes] | IO[str] | Path, **options: Any) -> pd.DataFrame:
    """``pandas.read_csv``, with texts and names as they were before ``write_csv``."""
    return _changed(pd.read_csv(source, **options), unguarded)


def _changed(table: pd.DataFrame, change: Callable[[Any], Any]) -> pd.DataFrame:
    """The table with its texts and the names of its columns changed."""
    changed = table.copy(deep=False)
    for i in _texts_of(table):
        kind = table.dtypes.iloc[i]
        column = table.iloc[:, i].astype(object).map(change, na_action="ignore")
        changed.isetitem(i, column.astype(kind if isinstance(kind, pd.StringDtype) else object).array)
    return changed.rename(columns=change)


def _texts_of(table: pd.DataFrame) -> list[int]:
    """The columns that may hold texts: all but those of numbers and dates."""
    is_number, is_date = pd.api.types.is_numeric_dtype, pd.api.types.is_datetime64_any_dtype
    return [i for i, kind in enumerate(table.dtypes) if not is_number(kind) and not is_date(kind)]
