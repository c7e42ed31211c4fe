"""Rows as a table of which columns keep their order and type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from raylora.records import ResultRow
from raylora.storage.atomic import write_atomically
from raylora.storage.places import writing


def rows_to_table(rows: Iterable[ResultRow], columns: list[str]) -> pd.DataFrame:
    """Rows as a table: ``columns`` first, empty ones too, then any others by name."""
    values = [row.values for row in rows]
    extra = sorted({key for row in values for key in row} - set(columns))
    # As objects first, or else pandas makes floats of integers beside a null.
    table = pd.DataFrame(values, columns=[*columns, *extra], dtype=object)
    for name in table.columns:
        types = {type(v) for v in table[name] if v is not None and v == v}  # NaN is not equal to itself
        if types <= {int}:
            table[name] = table[name].astype("Int64") if types else table[name].astype("object")
        elif types <= {int, float}:
            table[name] = table[name].astype("float64")
    return table


@dataclass(frozen=True)
class CsvTable:
    """Some columns of rows in a CSV file of its own, which an option named."""

    option: str
    path: Path
    columns: list[str]

    def write(self, rows: Iterable[ResultRow]) -> None:
        """The file, whole and in place of the old one.

        Raises:
            UserError: it cannot be written.
        """
        table = rows_to_table(rows, self.columns)[self.columns]
        with writing(self.option, self.path):
            write_atomically(self.path, lambda partial: table.to_csv(partial, index=False))
