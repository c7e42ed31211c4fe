"""What hands a run's experiments to workers and makes a row of each. Knows nothing of Ray.

How workers are started and called, and how many there may be, is a ``WorkerCluster``'s: on Ray that of ``ray_run.py``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from raylora.cluster.metrics import RunMeter
from raylora.cluster.retries import RetryingExecutor, WorkerCalls
from raylora.cluster.status import Status
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPool
from raylora.config.run import Config
from raylora.errors import CannotGoOnError
from raylora.records import Experiment
from raylora.storage.store import Store


class WorkerCluster(Protocol):
    """Where workers run."""

    def survey(self) -> Capacity:
        """How many workers there may be now, and the nodes that are alive."""

    def start(self) -> PoolWorker:
        """Start a worker; may take minutes, and may raise."""

    def stop(self, worker: PoolWorker) -> None:
        """Kill a worker, whatever it is doing."""

    def call(self, worker: PoolWorker, method: str, *args: Any, timeout: float | None) -> Any:
        """What a method of ``Worker`` returns. ``timeout`` in seconds; None: wait for as long as it takes.

        Raises:
            CannotGoOnError: the store cannot be written.
            WorkerFailedError: any other failure; its class and ``kind`` say which.
        """

    def read_status(self) -> Status:
        """What the run's status board shows."""

    def note(self, text: str) -> None:
        """Show a line to whoever watches the run."""


class Supervisor:
    """Holds the worker pool of a run. Called by many threads at once, each with an experiment.

    Args:
        on_gpus: whether each worker has a GPU.
        instruments: ``ray.util.metrics``.
    """

    def __init__(
        self,
        cluster: WorkerCluster,
        config: Config,
        store: Store,
        num_experiments: int,
        on_gpus: bool,
        instruments: Any,
    ) -> None:
        self._cluster, self._timeout = cluster, config.timeout
        self._pool = WorkerPool(cluster.start, cluster.stop, cluster.survey, cluster.note)
        calls = WorkerCalls(self._run, self._train, self._help, self._being_evaluated)
        self._executor = RetryingExecutor(config, store, self._pool, calls, on_gpus, self._note_retry)
        self._meter = RunMeter(instruments, num_experiments, lambda: self._executor.num_at_work)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """``row``: the values of the experiment's row as JSON, ``null`` without one; ``stop``: why the run must end."""
        try:
            values = self._executor.run(Experiment(**json.loads(item["experiment"])), item["rank"])
        except CannotGoOnError as error:
            self._pool.begin_no_more()
            return {"row": "null", "stop": str(error)}
        if values:
            self._meter.finished(values["status"])
        return {"row": json.dumps(values), "stop": ""}

    def _note_retry(self, text: str) -> None:
        self._cluster.note(text)
        self._meter.retried()

    # What the executor of retries calls

    def _run(self, worker: PoolWorker, experiment: Experiment) -> dict[str, Any]:
        values: dict[str, Any] = self._cluster.call(worker, "run", experiment, timeout=self._timeout)
        return values

    def _train(self, worker: PoolWorker, experiments: Sequence[Experiment]) -> int:
        timeout = self._timeout and self._timeout * len(experiments)
        return int(self._cluster.call(worker, "train", list(experiments), timeout=timeout))

    def _help(self, worker: PoolWorker, experiment: Experiment) -> int:
        return int(self._cluster.call(worker, "help", experiment, timeout=self._timeout))

    def _being_evaluated(self) -> set[str]:
        """Ids of the experiments whose MMLU questions can be shared. Stops the pool if the command wants it stopped."""
        status = self._cluster.read_status()
        if status.stopping:
            self._pool.begin_no_more()
        return {p.experiment_id for p in status.progress if p.can_share}
