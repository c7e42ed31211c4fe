"""Who is tried again, where, and when nothing can be done for anyone."""

from __future__ import annotations

import threading
import time

import pytest

from raylora.cluster.worker_pool import WorkerPlace
from raylora.errors import CannotGoOnError, ErrorKind, MachineFailedError, WorkerFailedError
from raylora.records import ResultRow
from raylora.storage.store import Store
from tests.helpers.pool import PLACES, executor_of, failing, make_experiment, make_pool


def test_what_machines_are_to_blame_for_is_tried_elsewhere_and_again_by_the_next_run(tmp_path):
    told: list[str] = []
    seen: list[WorkerPlace] = []
    error = MachineFailedError("--model /models/llama: no such folder", kind=ErrorKind.MODEL)
    one = make_experiment("one")
    with executor_of(tmp_path, failing(error, seen), make_pool(told), told) as executor:
        values = executor.run(one, 0)
    assert values["status"] == "error"
    assert "no such folder; tried 2 times" in values["error"]
    assert values["error_kind"] == "model"
    assert set(seen) == set(PLACES), "it was not tried on the other GPU"
    assert Store(tmp_path).read_row(one) is None


def test_what_no_machine_can_do_for_anyone_ends_the_run(tmp_path):
    told: list[str] = []
    error = MachineFailedError("--model x: cannot be loaded: damaged")
    with executor_of(tmp_path, failing(error), make_pool(told), told) as executor:
        for name in ("one", "two"):
            assert executor.run(make_experiment(name), 0)["status"] == "error"
        with pytest.raises(CannotGoOnError, match="cannot be loaded: damaged"):
            executor.run(make_experiment("three"), 0)


def test_what_is_gone_for_single_datasets_ends_no_run(tmp_path):
    told: list[str] = []
    error = MachineFailedError("a.json: gone", kind=ErrorKind.DATASET_GONE, of_dataset=True)
    with executor_of(tmp_path, failing(error), make_pool(told), told) as executor:
        for name in ("one", "two", "three", "four"):
            values = executor.run(make_experiment(name), 0)
            assert (values["status"], values["error_kind"]) == ("error", "dataset_gone")
            assert Store(tmp_path).read_row(make_experiment(name)) is None, "it may come back"


def test_what_the_experiment_is_to_blame_for_is_done_with(tmp_path):
    told: list[str] = []
    one, error = make_experiment("one"), WorkerFailedError("its worker process died", kind=ErrorKind.WORKER_DIED)
    with executor_of(tmp_path, failing(error), make_pool(told), told) as executor:
        assert executor.run(one, 0)["status"] == "error"
    values = Store(tmp_path).read_row(one).values
    assert (values["num_attempts"], values["error_kind"]) == (2, "worker_died")


def test_a_finished_row_is_the_run_s_unless_something_beside_it_is_damaged(tmp_path):
    told: list[str] = []
    store, one = Store(tmp_path), make_experiment("one")
    store.folder(one).mkdir(parents=True)
    store.scores_path(one).write_bytes(b"scores")
    store.write_stage(one, "mmlu", {})
    store.write_row(one, ResultRow({"dataset": "one", "experiment_id": "one", "status": "ok", "by": "before"}))

    def run(_, experiment):
        return {"status": "ok", "dataset": experiment.dataset, "by": "now"}

    with executor_of(tmp_path, run, make_pool(told), told) as executor:
        assert executor.run(one, 0)["by"] == "before"
        store.scores_path(one).write_bytes(b"scares")
        assert executor.run(one, 0)["by"] == "now"


@pytest.mark.parametrize("error", [None, WorkerFailedError("its worker process died", kind=ErrorKind.WORKER_DIED)])
def test_a_worker_is_given_three_times_what_shares_a_pass_and_nobody_is_drawn_twice(tmp_path, error):
    """Ten experiments, one worker, two adapters a pass. What a worker left untrained is trained in its own run."""
    names, told, given, rows = [f"data_{i}" for i in range(10)], [], [], {}
    pool = make_pool(told, num_workers=1)
    worker = pool.take()

    def train(_, experiments):
        given.append([e.dataset for e in experiments])
        if error:
            raise error
        return len(experiments)

    def run(_, experiment):
        return {"status": "ok", "dataset": experiment.dataset}

    with executor_of(tmp_path, run, pool, told, train, adapters_a_pass=2) as executor:

        def fill(rank: int, name: str) -> None:
            rows[name] = executor.run(make_experiment(name), rank)

        threads = [threading.Thread(target=fill, args=(rank, name), daemon=True) for rank, name in enumerate(names)]
        for thread in threads:
            thread.start()
        while pool.num_waiting < len(names):
            time.sleep(0.01)
        pool.give_back(worker)
        for thread in threads:
            thread.join(timeout=30)
    assert given == [names[:6], names[6:]]
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(names, "ok")
    assert len(told) == (2 if error else 0)
    assert not any("num_attempts" in row for row in rows.values()), "a shared training is nobody's failed try"
