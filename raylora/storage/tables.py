"""Rows as a table with fixed columns and types."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from raylora.records import ResultRow


def rows_to_table(rows: Iterable[ResultRow], columns: list[str]) -> pd.DataFrame:
    """Rows as a table with a fixed order and type of columns, so that an empty column stays what it is."""
    values = [row.values for row in rows]
    extra = sorted({key for row in values for key in row} - set(columns))
    table = pd.DataFrame(values, columns=[*columns, *extra], dtype=object)  # else counts beside a null are no counts
    for name in table.columns:
        kinds = {type(v) for v in table[name] if v is not None and v == v}
        if kinds <= {int}:
            table[name] = table[name].astype("Int64") if kinds else table[name].astype("object")
        elif kinds <= {int, float}:
            table[name] = table[name].astype("float64")
    return table
