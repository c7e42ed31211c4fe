"""Two processes write a run's tables: never one over what the other one wrote later."""

from __future__ import annotations

import multiprocessing
import pickle
import time

import pandas as pd
import pytest

from raylora.errors import UserError
from raylora.records import ResultRow
from raylora.storage.run_tables import RunTables
from raylora.storage.store import Store
from raylora.storage.tables import CsvTable

COLUMNS = ["dataset", "experiment_id", "loss"]


def rows(*names: str) -> list[ResultRow]:
    return [ResultRow({"dataset": name, "experiment_id": f"{name}-1", "loss": 1.0}) for name in names]


def make_tables(folder, more: CsvTable | None = None) -> tuple[RunTables, RunTables]:
    """A run's tables, and what the sink's process gets of them."""
    folder.mkdir(exist_ok=True)
    tables = RunTables(Store(folder), COLUMNS, more)
    return tables, pickle.loads(pickle.dumps(tables))


def names_in(folder) -> list[str]:
    table = pd.read_parquet(folder / "results.parquet")
    pd.testing.assert_frame_equal(pd.read_csv(folder / "results.csv"), table, check_dtype=False)
    return list(table["dataset"])


def test_both_processes_write_rows_in_one_order_to_every_table(tmp_path):
    tables, of_sink = make_tables(tmp_path, CsvTable("--output-csv", tmp_path / "more.csv", ["loss", "dataset"]))
    with tables.permitted():
        of_sink.write_if_due(rows("b", "a"))
        assert names_in(tmp_path) == ["a", "b"]
    assert [row.values["dataset"] for row in tables.write(rows("c", "b", "a"))] == names_in(tmp_path)
    assert (tmp_path / "more.csv").read_text().splitlines() == ["loss,dataset", "1.0,a", "1.0,b", "1.0,c"]


def test_a_sink_that_lives_on_after_its_run_changes_nothing(tmp_path):
    tables, of_sink = make_tables(tmp_path)
    with tables.permitted():
        pass
    tables.write(rows("a", "b"))
    of_sink.write_if_due(rows("a"))
    assert names_in(tmp_path) == ["a", "b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["results.csv", "results.parquet"]


def test_the_sink_of_a_run_that_was_killed_changes_nothing_either(tmp_path):
    killed, of_its_sink = make_tables(tmp_path)
    killed.permitted().__enter__()
    tables, of_sink = make_tables(tmp_path)
    with tables.permitted():
        of_its_sink.write_if_due(rows("old"))
        assert not (tmp_path / "results.csv").exists()
        of_sink.write_if_due(rows("new"))
    assert names_in(tmp_path) == ["new"]


class SlowTable(CsvTable):
    def write(self, rows) -> None:
        self.path.touch()
        time.sleep(1.0)
        super().write(rows)


def test_the_command_waits_for_a_table_that_is_being_written(tmp_path):
    slow = SlowTable("--output-csv", tmp_path / "more.csv", ["dataset"])
    tables, of_sink = make_tables(tmp_path, slow)
    process = multiprocessing.get_context("spawn").Process(target=of_sink.write_if_due, args=(rows("a"),))
    with tables.permitted():
        process.start()
        while not slow.path.exists():
            time.sleep(0.01)
    assert slow.path.read_text() == "dataset\na\n"
    process.join()


def test_writing_takes_a_tenth_of_the_time(tmp_path):
    tables, of_sink = make_tables(tmp_path)
    with tables.permitted():
        of_sink.write_if_due(rows("a"))
        of_sink.write_if_due(rows("a", "b"))
        assert names_in(tmp_path) == ["a"], "the next one is due after ten times as long"
        deadline = time.monotonic() + 20
        while names_in(tmp_path) == ["a"]:
            assert time.monotonic() < deadline
            of_sink.write_if_due(rows("a", "b"))


def test_a_table_that_cannot_be_written_is_one_line_that_names_its_option(tmp_path):
    (tmp_path / "more.csv").mkdir()
    (tmp_path / "more.csv" / "file").touch()
    tables, _ = make_tables(tmp_path, CsvTable("--output-csv", tmp_path / "more.csv", ["dataset"]))
    with pytest.raises(UserError, match=r"--output-csv .*more\.csv: cannot be written to"):
        tables.write(rows("a"))
