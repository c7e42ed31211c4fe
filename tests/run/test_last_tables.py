"""The tables that are written in the place of a run whose process was ended."""

from __future__ import annotations

import pickle

import pandas as pd

from raylora.errors import ErrorKind
from raylora.records import ResultRow
from raylora.rows import ROW_COLUMNS, error_row
from raylora.run.last_tables import LastTables
from raylora.storage.run_tables import RunTables
from tests.helpers.chunks import planned, write_dataset


def test_what_is_stored_is_in_the_tables_and_nothing_of_the_run_is_left(options, tmp_path):
    for name in ("a", "b", "c"):
        write_dataset(tmp_path / "data" / "chunk_1", name)
    plan = planned(options)
    store, (first, second, _) = plan.store, plan.experiments
    store.open(fresh=False)
    good = error_row(plan.config, first, "", ErrorKind.DATA).values | {"status": "ok", "error": None}
    store.write_row(first, ResultRow(good))
    store.write_row(second, error_row(plan.config, second, "it failed", ErrorKind.DATA))
    tables = RunTables(store, ROW_COLUMNS)
    (store.root / "tables-0.permit").touch()
    (store.root / "run.owner").write_text("a process that was killed")
    for retry_failed, num_rows in ((False, 2), (True, 1)):
        left = LastTables(store, plan.experiments, tables, retry_failed)
        pickle.loads(pickle.dumps(left)).write()
        assert len(pd.read_csv(store.root / "results.csv")) == num_rows
        assert len(pd.read_parquet(store.root / "results.parquet")) == num_rows
    assert (store.root / "report.html").is_file()
    assert not [*store.root.glob("*.permit"), *store.root.glob("run.owner")]
