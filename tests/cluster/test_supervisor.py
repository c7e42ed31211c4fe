"""A supervisor without Ray: every experiment comes back as a row, and what ends a run is said to the pipeline."""

from __future__ import annotations

import itertools
import json
import threading
from dataclasses import asdict
from typing import Any

import ray.util.metrics

from raylora.cluster.status import Status, WorkerProgress
from raylora.cluster.supervisor import Supervisor
from raylora.cluster.worker_pool import Capacity, PoolWorker
from raylora.config.run import load_config
from raylora.errors import ErrorKind, MachineFailedError, WorkerFailedError
from raylora.storage.store import Store
from tests.helpers.pool import PLACES, make_experiment


class ThreadCluster:
    """Workers that are no processes: ``answer`` says what a worker's method returns."""

    def __init__(self, answer: Any) -> None:
        self.answer, self.notes, self.calls = answer, [], []
        self.status = Status()
        self._places = itertools.cycle(PLACES)

    def survey(self) -> Capacity:
        return Capacity(2, frozenset({"node"}))

    def start(self) -> PoolWorker:
        return PoolWorker(object(), next(self._places))

    def stop(self, worker: PoolWorker) -> None:
        pass

    def call(self, worker: PoolWorker, method: str, *args: Any, timeout: float | None) -> Any:
        self.calls.append((method, timeout))
        return self.answer(method, *args)

    def read_status(self) -> Status:
        return self.status

    def note(self, text: str) -> None:
        self.notes.append(text)


def supervise(tmp_path, cluster, *names: str) -> list[dict[str, Any]]:
    config = load_config(model="demo", mmlu="demo", timeout=7.0)
    supervisor = Supervisor(cluster, config, Store(tmp_path), len(names), True, ray.util.metrics)
    return [
        supervisor({"experiment": json.dumps(asdict(make_experiment(name))), "rank": rank})
        for rank, name in enumerate(names)
    ]


def test_a_worker_that_fails_once_costs_no_row(tmp_path):
    failures = [WorkerFailedError("its worker process died", kind=ErrorKind.WORKER_DIED)]

    def answer(method, experiment):
        if failures:
            raise failures.pop()
        return {"experiment_id": experiment.experiment_id, "status": "ok"}

    cluster = ThreadCluster(answer)
    (item,) = supervise(tmp_path, cluster, "one")
    assert json.loads(item["row"])["status"] == "ok"
    assert json.loads(item["row"])["num_attempts"] == 2
    assert item["stop"] == ""
    assert len(cluster.notes) == 1
    assert {timeout for method, timeout in cluster.calls if method == "run"} == {7.0}


def test_what_no_machine_can_do_ends_the_run_and_the_rest_gets_no_row(tmp_path):
    def answer(method, *_):
        raise MachineFailedError("--model x: cannot be loaded")

    *first, third, fourth = supervise(tmp_path, ThreadCluster(answer), "one", "two", "three", "four")
    assert [json.loads(item["row"])["status"] for item in first] == ["error", "error"]
    assert (third["row"], "cannot be loaded" in third["stop"]) == ("null", True)
    assert fourth == {"row": "null", "stop": ""}


def test_an_idle_worker_is_sent_to_those_whose_status_says_that_questions_can_be_shared(tmp_path):
    helped = threading.Event()

    def answer(method, experiment):
        if method == "help":
            helped.set()
            return 3
        assert helped.wait(30), "nobody came to help"
        return {"experiment_id": experiment.experiment_id, "status": "ok"}

    cluster = ThreadCluster(answer)
    progress = WorkerProgress(0, "one", "one", "any words", 1, 9, 0.0, can_share=True)
    cluster.status = Status([progress])
    (item,) = supervise(tmp_path, cluster, "one")
    assert json.loads(item["row"])["status"] == "ok"
