"""Runs on real Ray whose workers make rows without a model: who writes the tables, when, and what if it dies."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import psutil
import pytest
import ray

from raylora import load_dataset, load_results
from raylora.cluster.ray_run import RunHandle, run_experiments
from raylora.config.run import load_config
from raylora.errors import CannotGoOnError, UserError
from raylora.records import Experiment, ProgressStage, ResultRow
from raylora.rows import ROW_COLUMNS, make_row
from raylora.storage.run_tables import RunTables
from raylora.storage.store import Store
from raylora.storage.tables import CsvTable

NUM_ROWS = 6


class Sleeper:
    """Makes a row in a while, in place of training; notes when."""

    def __init__(self, config, store) -> None:
        self._config, self._store = config, store

    def run(self, experiment: Experiment, progress) -> ResultRow:
        progress(ProgressStage.TRAIN, 0, 1)
        time.sleep(experiment.settings["seconds"])
        row = make_row(self._config, experiment, "ok", train_loss=float(experiment.dataset[-1]))
        self._store.write_row(experiment, row)
        return row

    def help(self, experiment: Experiment, name: str, progress) -> int:
        return 0


@dataclass(frozen=True)
class Diary(CsvTable):
    """Notes who writes which rows, and when."""

    def write(self, rows) -> None:
        with self.path.open("a") as file:
            names = [row.values["dataset"] for row in rows]
            file.write(json.dumps({"process": os.getpid(), "time": time.time(), "rows": names}) + "\n")

    def entries(self) -> list[dict]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


class EagerTables(RunTables):
    """Each row as it comes, on a machine however slow."""

    pause = 0.0


def experiments(seconds: float) -> list[Experiment]:
    """Those that a ``Sleeper`` sleeps so long for, each."""
    return [
        Experiment(f"data_{i}-1", f"data_{i}", "", {"seconds": seconds}, str(i), {"train": {}}, "")
        for i in range(NUM_ROWS)
    ]


@dataclass
class Run:
    """A run in a thread, as the command's main thread waits for nothing else."""

    folder: Path
    seconds: float = 1.0
    former: tuple[ResultRow, ...] = ()
    tables: RunTables | None = None

    def __post_init__(self) -> None:
        self.config, self.store = load_config(model="demo", num_workers=1, adapters_a_pass=1), Store(self.folder)
        self.store.open(fresh=False)
        self.diary = Diary("", self.folder / "diary", [])
        self.tables = self.tables or EagerTables(self.store, ROW_COLUMNS, self.diary)
        self.experiments = experiments(self.seconds)
        self.handles: list[RunHandle] = []
        self.rows: list[ResultRow] = []
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            with self.tables.permitted():
                self.rows = run_experiments(
                    self.config, self.store, self.experiments, self.handles.append, Sleeper, self.tables, self.former
                )
        except Exception as error:  # noqa: BLE001 - for the test's thread
            self.error = error

    def start(self, num_rows: int = 0) -> Run:
        """Goes on when so many rows are in the tables."""
        self.thread.start()
        deadline = time.monotonic() + 120
        while not self.handles or len(self.diary.entries()) < num_rows:
            assert time.monotonic() < deadline, self.error
            time.sleep(0.02)
        return self

    def finish(self) -> list[str]:
        """The datasets of the rows, all good and at the first try."""
        self.thread.join(120)
        assert not self.thread.is_alive()
        if self.error:
            raise self.error
        assert {(row.values["error"], row.values["num_attempts"]) for row in self.rows} == {("", 1)}
        return sorted(row.values["dataset"] for row in self.rows)

    @property
    def names(self) -> list[str]:
        return [e.dataset for e in self.experiments]


@pytest.mark.slow
@pytest.mark.ci
def test_rows_reach_the_tables_one_by_one_from_one_process_beside_the_command(ray_with_gpus, tmp_path):
    former = ResultRow(dict.fromkeys(ROW_COLUMNS) | {"dataset": "before", "experiment_id": "before-1"})
    run = Run(tmp_path, former=(former,))
    assert run.start().finish() == run.names
    entries = run.diary.entries()
    assert [len(e["rows"]) for e in entries] == [*range(2, NUM_ROWS + 2)], "each row as soon as it was made"
    assert {e["rows"][0] for e in entries} == {"before"}
    assert len({e["process"] for e in entries} - {os.getpid()}) == 1
    made = sorted((run.store.folder(e) / "result.json").stat().st_mtime for e in run.experiments)
    late = [e["time"] - m for e, m in zip(entries, made, strict=True)]
    print(f"rows in the tables {', '.join(f'{seconds:.2f}' for seconds in late)} s after they were made")
    assert entries[2]["time"] < made[-1], "the tables had to wait for the end"
    in_time = [e["time"] < m for e, m in zip(entries[:-1], made[1:], strict=True)]
    assert any(in_time), "no row was in the tables before the next one was made"
    shown = ray.get(run.handles[0].board.read.remote(1)).rows
    assert sorted(values["dataset"] for values in shown) == run.names


@pytest.mark.slow
def test_a_sink_that_is_killed_costs_no_row(ray_with_gpus, tmp_path):
    run = Run(tmp_path).start(num_rows=2)
    first = run.diary.entries()[0]["process"]
    psutil.Process(first).kill()
    assert run.finish() == run.names
    entries = run.diary.entries()
    assert len({e["process"] for e in entries}) == 2
    # A process that is killed between its table and the end of its task is followed by one that writes the same again.
    sizes = [len(e["rows"]) for e in entries]
    assert sizes == sorted(sizes)
    assert set(sizes) == {*range(1, NUM_ROWS + 1)}, "the new process does not know what the old one knew"


@pytest.mark.slow
def test_a_board_that_dies_costs_no_row_either(ray_with_gpus, tmp_path):
    run = Run(tmp_path).start(num_rows=2)
    ray.kill(run.handles[0].board)
    assert run.finish() == run.names
    assert [len(e["rows"]) for e in run.diary.entries()] == [*range(1, NUM_ROWS + 1)]


class BrokenTable(CsvTable):
    def write(self, rows) -> None:
        raise CannotGoOnError("no room")


@pytest.mark.slow
@pytest.mark.ci
def test_a_table_that_cannot_be_written_ends_the_run_with_its_own_error(ray_with_gpus, tmp_path, capfd):
    store = Store(tmp_path)
    tables = RunTables(store, ROW_COLUMNS, BrokenTable("", tmp_path / "t", []))
    with pytest.raises(CannotGoOnError, match=r"^no room$"):
        Run(tmp_path, tables=tables).start().finish()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_rows_of_a_run_are_a_ray_dataset_again(ray_with_gpus, tmp_path):
    run = Run(tmp_path, seconds=0.0)
    with run.tables.permitted():
        pass
    rows = [make_row(run.config, e, "ok", train_loss=0.5) for e in run.experiments]
    run.store.write_tables(rows, ROW_COLUMNS)
    dataset = load_dataset(tmp_path)
    assert isinstance(dataset, ray.data.Dataset)
    assert dataset.count() == NUM_ROWS
    table = load_results(tmp_path)
    assert dataset.columns() == list(table.columns)
    pd.testing.assert_frame_equal(dataset.to_pandas(), table)
    assert dataset.filter(lambda row: row["dataset"] == "data_3").take_all()[0]["train_loss"] == 0.5
    with pytest.raises(UserError, match="no such table"):
        load_dataset(tmp_path / "nothing")


class Lodger:
    """Notes which GPUs it has while it makes a row, and how long."""

    def __init__(self, config, store) -> None:
        self._config, self._store = config, store

    def run(self, experiment: Experiment, progress) -> ResultRow:
        progress(ProgressStage.TRAIN, 0, 1)
        began = time.time()
        time.sleep(1.5)
        gpus = ray.get_runtime_context().get_accelerator_ids()["GPU"]
        note = {"gpus": sorted(gpus), "process": os.getpid(), "began": began, "ended": time.time()}
        (self._store.root / f"{experiment.dataset}.note").write_text(json.dumps(note))
        row = make_row(self._config, experiment, "ok")
        self._store.write_row(experiment, row)
        return row

    def help(self, experiment: Experiment, name: str, progress) -> int:
        return 0


def lodgings(tmp_path, gpus_per_worker: float, **options) -> list[dict]:
    config = load_config(model="demo", adapters_a_pass=1, gpus_per_worker=gpus_per_worker, **options)
    store = Store(tmp_path)
    store.open(fresh=False)
    rows = run_experiments(config, store, experiments(0.0), make_runner=Lodger)
    assert [row.values["error"] for row in rows] == [""] * NUM_ROWS
    return [json.loads(path.read_text()) for path in tmp_path.glob("*.note")]


def most_at_once(notes: list[dict]) -> int:
    return max(sum(n["began"] <= note["began"] < n["ended"] for n in notes) for note in notes)


@pytest.mark.slow
def test_a_worker_has_two_gpus_of_its_own(ray_with_gpus, tmp_path):
    notes = lodgings(tmp_path, 2)
    of_processes = {note["process"]: note["gpus"] for note in notes}
    assert sorted(of_processes.values()) == [["0", "1"], ["2", "3"]]
    assert most_at_once(notes) == 2


@pytest.mark.slow
def test_two_workers_share_a_gpu(ray_with_gpus, tmp_path):
    notes = lodgings(tmp_path, 0.5, num_workers=4)
    assert {len(note["gpus"]) for note in notes} == {1}
    of_processes = {note["process"]: note["gpus"][0] for note in notes}
    assert max(Counter(of_processes.values()).values()) == 2
    assert most_at_once(notes) == 4


def test_a_worker_cannot_have_more_gpus_than_any_node_has(ray_with_gpus, tmp_path):
    with pytest.raises(UserError, match="--gpus-per-worker 5: the node with the most GPUs has 4; give no more"):
        lodgings(tmp_path, 5)
