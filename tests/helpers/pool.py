"""Pools of workers that are no processes, and what runs experiments on them."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

from raylora.cluster.retries import RetryingExecutor, WorkerCalls
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPlace, WorkerPool
from raylora.config.run import load_config
from raylora.records import Experiment
from raylora.storage.store import Store

PLACES = [WorkerPlace("host", "0", "node"), WorkerPlace("host", "1", "node")]


def make_experiment(name: str) -> Experiment:
    origins = {stage: {"data": name} for stage in ("features", "train", "mmlu")}
    settings = {"batch_size": 1, "gradient_accumulation": 1, "num_epochs": 1}
    return Experiment(name, name, f"/{name}.json", settings, name, origins, "base", name, 4, 100)


def make_pool(told: list[str], start=None, num_workers: int = 2) -> WorkerPool:
    places = itertools.cycle(PLACES)
    start = start or (lambda: PoolWorker(object(), next(places)))
    return WorkerPool(start, lambda _: None, lambda: Capacity(num_workers, frozenset({"node"})), told.append)


@contextlib.contextmanager
def executor_of(tmp_path, run, pool, told, train=lambda *_: 0, adapters_a_pass=1) -> Iterator[RetryingExecutor]:
    calls = WorkerCalls(run, train, lambda *_: 0, set)
    config = load_config(model="demo", mmlu="demo", adapters_a_pass=adapters_a_pass)
    executor = RetryingExecutor(config, Store(tmp_path), pool, calls, on_gpus=True, on_retry=told.append)
    try:
        yield executor
    finally:
        executor.close()


def failing(error: Exception, seen: list[WorkerPlace] | None = None):
    """A worker's way of running experiments: it fails, wherever it is."""

    def run(worker, experiment):
        if seen is not None:
            seen.append(worker.place)
        raise error

    return run
