"""Rows as a table of which columns keep their order and type."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from raylora.records import ResultRow


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
