"""Rows as a table, whose columns keep their order and types whatever the rows hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pandas as pd

from raylora.records import ResultRow
from raylora.storage.atomic import write_atomically
from raylora.storage.csv_files import write_csv
from raylora.storage.places import writing


def rows_to_table(rows: Iterable[ResultRow], columns: list[str]) -> pd.DataFrame:
    """Rows as a table: ``columns`` first, also those without a value, then any others by name.

    Columns of integers become ``Int64``, of other numbers ``float64``; all others stay objects.
    """
    values = [row.values for row in rows]
    extra = sorted({key for row in values for key in row} - set(columns))
    # As objects first, as pandas would turn integers beside a null into floats.
    table = pd.DataFrame(values, columns=[*columns, *extra], dtype=object)
    for name in table.columns:
        types = {type(v) for v in table[name] if v is not None and v == v}  # NaN is not equal to itself
        if types <= {int}:
            table[name] = table[name].astype("Int64") if types else table[name].astype("object")
        elif types <= {int, float}:
            table[name] = table[name].astype("float64")
    return table


class RowsTable(Protocol):
    """A table that is made from all rows, anew each time."""

    def write(self, rows: Sequence[ResultRow]) -> None: ...


@dataclass(frozen=True)
class CsvTable:
    """Some columns of the rows, in a CSV file of its own that the user named."""

    option: str
    """The option that named it, for error messages."""
    path: Path
    columns: list[str]

    def write(self, rows: Sequence[ResultRow]) -> None:
        """Write the file, atomically, in place of the old one.

        Raises:
            UserError: it cannot be written.
        """
        table = rows_to_table(rows, self.columns)[self.columns]
        with writing(self.option, self.path):
            write_atomically(self.path, lambda partial: write_csv(table, partial))
