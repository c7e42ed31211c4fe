"""The process that writes the tables is killed: they are whole at every moment, and have every row at the end."""

from __future__ import annotations

import threading
import time

import pandas as pd
import pytest

from tests.helpers.fault_runs import DATASETS, assert_equal_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
KILLS = (
    {"stage": "sink", "what": "kill", "times": 2},
    {"stage": "results.csv half written", "what": "kill"},
    {"stage": "results.parquet half written", "what": "kill"},
)


class Reader:
    """Opens both tables again and again while a run goes on, as somebody does who cannot wait."""

    def __init__(self, folder) -> None:
        self._tables = {folder / "results.csv": pd.read_csv, folder / "results.parquet": pd.read_parquet}
        self.num_rows: dict[str, list[int]] = {path.name: [] for path in self._tables}
        self.errors: list[Exception] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def _read(self) -> None:
        while not self._over.wait(0.02):
            for path, read in self._tables.items():
                try:
                    self.num_rows[path.name].append(len(read(path)) if path.exists() else 0)
                except Exception as error:  # noqa: BLE001 - for the test's thread
                    self.errors.append(error)

    def __enter__(self) -> Reader:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def test_a_sink_killed_at_every_point_changes_no_row_and_tears_no_table(shared_site, undisturbed):
    shared_site.strike(*KILLS)
    with Reader(shared_site.output) as reader:
        shown = shared_site.run()
    assert shared_site.num_fired() == 4
    assert not reader.errors
    for name, num_rows in reader.num_rows.items():
        assert num_rows == sorted(num_rows), f"a row was taken out of {name}"
        # No more than that: a new process takes seconds, in which the rows of such small experiments queue up.
        assert len(set(num_rows)) > 2, f"{name} had no row before the end"
    rows = shared_site.rows()
    assert_equal_rows(rows, undisturbed)
    assert {row["num_attempts"] for row in rows.values()} == {1}
    assert all(shown.count(f"] {name}: ") == 1 for name in DATASETS), "a line a row"


def test_a_sink_that_cannot_live_ends_the_run_in_a_line_and_the_next_one_goes_on(shared_site, undisturbed):
    shared_site.strike({"stage": "sink", "what": "kill", "times": 99})
    started = time.monotonic()
    shown = shared_site.run(expect=1)
    print(f"ended after {time.monotonic() - started:.0f} s, {shared_site.num_fired()} processes")
    assert "Ray broke down: " in shown.splitlines()[-1]
    assert "the same command resumes from here" in shown.splitlines()[-1]
    num_done = shared_site.num_done()
    assert num_done > 0
    assert len(pd.read_parquet(shared_site.output / "results.parquet")) == num_done
    shared_site.strike()
    shared_site.run()
    assert_equal_rows(shared_site.rows(), undisturbed)
