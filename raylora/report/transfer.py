"""What the page and the terminal say of ``--transfer``: which adapter helps with which dataset, what is forgotten."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from raylora.mmlu.paired import ALPHA
from raylora.report.read_run import UNREADABLE, FinishedRun
from raylora.report.transfer_tables import COLUMNS, TABLE
from raylora.storage.digests import load_parquet

MOST_SHOWN = 40
"""Rows and columns of the page's heat map, at most: those with the greatest changes. ``transfer.csv`` has all."""


def transfer(run: FinishedRun) -> dict[str, Any] | None:
    """The table of changes of held-out losses, in the order of the ranking.

    A change is significant where its p-value, adjusted by Benjamini and Hochberg over all cells, is below ``alpha``.

    Returns:
        ``rows``: numbers of rows of the run's table, R of them; ``columns``: datasets, C; ``base``: their losses under
        the base, (C,); ``change``, ``low``, ``high``, ``fdr``: (R, C), None where nothing was measured; ``own``: each
        row's own column, None where it is not shown; ``num_examples``, (C,); ``num_rows``, ``num_columns``: before
        those with the smallest changes were left out; ``num_cells``, ``num_helped``, ``num_forgotten``: of all that are
        not an adapter's own, how many there are, and how many significantly lower, higher; ``sentence``. None where the
        run has no such table.
    """
    cells = _read_cells(run)
    if cells is None:
        return None
    shown = _largest(cells)
    change = numbers_of(run, "accuracy_change")
    order = sorted(set(shown["row"]), key=lambda row: (-change[row], row))
    own = shown[shown["is_own"]].set_index("row")["on_dataset"].to_dict()
    names = list(dict.fromkeys([*(own[row] for row in order if row in own), *sorted(set(shown["on_dataset"]))]))
    of_column = shown.groupby("on_dataset")[["base_loss", "num_examples"]].first().reindex(names)

    def matrix(name: str) -> list[list[float]]:
        table = shown.pivot(index="row", columns="on_dataset", values=name).reindex(index=order, columns=names)
        return [[float(f"{value:.4g}") for value in line] for line in table.to_numpy(dtype=float)]

    others = cells[~cells["is_own"]]
    is_real = others["fdr_p_value"] < ALPHA
    return {
        "rows": order,
        "columns": names,
        "base": of_column["base_loss"].tolist(),
        "num_examples": of_column["num_examples"].tolist(),
        "change": matrix("loss_change"),
        "low": matrix("low"),
        "high": matrix("high"),
        "fdr": matrix("fdr_p_value"),
        "own": [names.index(own[row]) if row in own else None for row in order],
        "num_rows": cells["row"].nunique(),
        "num_columns": cells["on_dataset"].nunique(),
        "num_cells": len(others),
        "num_helped": int((is_real & (others["loss_change"] < 0)).sum()),
        "num_forgotten": int((is_real & (others["loss_change"] > 0)).sum()),
        "alpha": ALPHA,
        "sentence": _sentence(run, others[is_real]),
    }


def numbers_of(run: FinishedRun, name: str) -> list[float]:
    """A column of the run's table by row, the least of all numbers where a value is missing: it comes last."""
    return run.numbers(name).fillna(-np.inf).tolist()


def _read_cells(run: FinishedRun) -> pd.DataFrame | None:
    """The measured cells of experiments that are in the run's table, with their ``row``."""
    try:
        cells = load_parquet(run.root / f"{TABLE}.parquet", COLUMNS)
        numbers = [name for name in COLUMNS[4:] if name in cells]
        cells = cells.astype(dict.fromkeys(numbers, "float64")).astype({"is_own": bool, "on_dataset": str})
    except UNREADABLE:
        return None
    rows = {experiment_id: row for row, experiment_id in enumerate(run.texts("experiment_id")) if run.ok[row]}
    cells = cells.assign(row=cells["experiment_id"].map(rows))
    cells = cells[cells["row"].notna() & cells["loss_change"].notna()].astype({"row": int})
    return None if cells.empty else cells.drop_duplicates(["row", "on_dataset"])


def _largest(cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of the datasets with the greatest changes, of their adapters and by those of others."""
    sizes = cells.assign(size=cells["loss_change"].abs())
    by_row, by_column = (sizes.groupby(name)["size"].sum() for name in ("row", "on_dataset"))
    own = cells[cells["is_own"]].set_index("row")["on_dataset"]
    by_dataset = by_column.add(by_row.groupby(own.reindex(by_row.index)).max(), fill_value=0)
    columns = by_dataset.nlargest(MOST_SHOWN).index
    first = by_row.loc[own.reindex(by_row.index).isin(columns)].nlargest(MOST_SHOWN).index
    rows = [*first, *by_row.drop(first).nlargest(MOST_SHOWN - len(first)).index]
    return cells[cells["row"].isin(rows) & cells["on_dataset"].isin(columns)]


def _sentence(run: FinishedRun, significant: pd.DataFrame) -> str:
    """What helps what most, and what is forgotten most, of the cells that are significant and no adapter's own."""
    if significant.empty:
        return "No adapter significantly helps with another dataset, and none is significantly forgotten."
    ordered = significant.sort_values("loss_change")
    best, worst = ordered.iloc[0], ordered.iloc[-1]
    helped = (
        f"Helped most: {_told(run, best)}" if best["loss_change"] < 0 else "No other dataset is significantly helped"
    )
    forgotten = (
        f"forgotten most: {_told(run, worst)}" if worst["loss_change"] > 0 else "none is significantly forgotten"
    )
    return f"{helped}; {forgotten}."


def _told(run: FinishedRun, cell: pd.Series[Any]) -> str:
    about = f"{cell['base_loss']:.2f} to {cell['loss']:.2f} nats per token"
    return f"{cell['on_dataset']} by the adapter of {run.labels[int(cell['row'])]} ({about})"
