"""The tables of ``--transfer``: every adapter on the held-out examples of every dataset of the run."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import csv

from raylora.errors import UserError
from raylora.mmlu.paired import false_discovery, holm
from raylora.records import ResultRow
from raylora.report.read_run import UNREADABLE
from raylora.rows import CELL_VALUES
from raylora.storage.csv_files import guarded, write_csv
from raylora.storage.digests import load_parquet, write_parquet
from raylora.storage.places import location
from raylora.storage.store import Store

TABLE = "transfer"
"""``transfer.csv`` and ``.parquet`` have a line for each cell; ``transfer_table.csv`` is the table itself."""
NAMES = ["experiment_id", "dataset", "on_dataset"]
COLUMNS = [*NAMES, *CELL_VALUES, "holm_p_value", "fdr_p_value"]


class TransferTables:
    """Writes them from what the experiments of the rows have stored; pickled for the sink's process."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def write(self, rows: Sequence[ResultRow]) -> None:
        """Write ``transfer.csv``, ``transfer.parquet`` and ``transfer_table.csv``, each atomically.

        The p-values of all cells are adjusted together. An experiment whose file cannot be read has no cells.

        Raises:
            OSError: they cannot be written.
        """
        by_id = {str(row.values["experiment_id"]): str(row.values["dataset"]) for row in rows if row.ok}
        self._store.fetch_cells(by_id)
        found = {name: read_cells(self._store.cells_path(name)) for name in by_id}
        parts = [t.assign(experiment_id=name, dataset=by_id[name]) for name, t in found.items() if t is not None]
        cells = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COLUMNS)
        raw = cells["p_value"].astype("float64")
        cells = cells.assign(holm_p_value=holm(raw), fdr_p_value=false_discovery(raw))[COLUMNS]
        table = cells.set_index(["dataset", "experiment_id", "on_dataset"])["loss_change"].unstack("on_dataset")
        # Of 500 datasets there are 250,000 cells: pandas takes seconds to write them as text.
        names = {column: cells[column].map(guarded, na_action="ignore") for column in NAMES}
        arrow = pa.Table.from_pandas(cells.assign(**names), preserve_index=False)
        self._store.write_file(f"{TABLE}.csv", lambda p: csv.write_csv(arrow, p))
        self._store.write_file(f"{TABLE}.parquet", lambda p: write_parquet(cells, p))
        self._store.write_file(f"{TABLE}_table.csv", lambda p: write_csv(table, p, index=True))


def read_cells(path: Path) -> pd.DataFrame | None:
    """An experiment's cells; None where there is no file, or none that can be read."""
    try:
        return _read(path, path.stat().st_mtime_ns)
    except UNREADABLE:
        return None


@functools.lru_cache(maxsize=2048)  # the sink writes the tables again and again, from the same files and a few new ones
def _read(path: Path, _: int) -> pd.DataFrame:
    cells = load_parquet(path, ["on_dataset", *CELL_VALUES])
    return cells.astype(dict.fromkeys(CELL_VALUES[3:], "float64"))


def load_transfer(place: str | Path) -> pd.DataFrame:
    """The table of ``--transfer`` of a run: a line for each adapter and dataset (docs/transfer.md).

    Args:
        place: the run's folder, such as ``results/chunk_001``.

    Raises:
        UserError: there is no such table, or none that can be read.
    """
    path = location(place) / f"{TABLE}.parquet"
    try:
        return load_parquet(path)
    except UNREADABLE as error:
        cause = " ".join(str(error).split())[:200]
        text = f"{path}: cannot be read; give the folder of a run with --transfer ({cause})"
        raise UserError(text) from None
