"""Every experiment gets a row, whatever happens to its worker. Knows nothing of Ray.

An experiment whose worker dies, hangs or raises is tried once more, on another GPU if there is one; then it gets an
error row with the cause. A lost node does not count as a try. When there are fewer experiments than workers, idle
workers ask some of the MMLU questions of the experiments that are still being evaluated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.cluster.failures import store_failure
from raylora.cluster.worker_pool import PoolWorker, WorkerPlace, WorkerPool
from raylora.config.run import Config
from raylora.errors import (
    CannotGoOnError,
    ErrorKind,
    MachineFailedError,
    NodeLostError,
    WorkerFailedError,
)
from raylora.model.memory import GPU_TOKEN_BUDGET
from raylora.records import Experiment, ResultRow
from raylora.rows import error_row
from raylora.storage.store import Store

log = logging.getLogger("raylora.retries")

MAX_ATTEMPTS = 2
MAX_GIVEN_UP = 3
"""The run ends when machines failed so many experiments before the first was done: the next would fail as well."""
MAX_MOVES = 10
"""After so many lost nodes, one more counts as a failed try of the experiment itself."""
MOST_A_PASS = 16
"""Adapters that share a pass, at most, unless ``--adapters-a-pass`` says more."""
TURNS = 3
"""A worker is given so many times as many adapters as share a pass, so that each that is done makes room for another.
The more, the smaller the share of the time when the last ones have places beside them empty, about 1 in 2 * TURNS. But
those that are done wait for their MMLU meanwhile, and an experiment that a worker was given no other one takes."""
LOOK_SECONDS = 0.3
"""Between two looks at whether an evaluation can be helped, or the run is to stop."""


@dataclass(frozen=True)
class WorkerCalls:
    """Calls to a worker. Each raises ``WorkerFailedError`` or ``CannotGoOnError``.

    ``run(worker, experiment)`` returns the values of its row. ``train(worker, experiments)`` trains adapters together
    and returns how many. ``help(worker, experiment)`` returns the number of questions that were asked.
    ``being_evaluated()`` returns the ids of the experiments whose questions are being asked.
    """

    run: Callable[[PoolWorker, Experiment], dict[str, Any]]
    train: Callable[[PoolWorker, Sequence[Experiment]], int]
    help: Callable[[PoolWorker, Experiment], int]
    being_evaluated: Callable[[], set[str]]


@dataclass(frozen=True)
class Failure:
    """A try that failed: where, why, what kind of cause that is, and whether it is one dataset's."""

    place: WorkerPlace
    cause: str
    kind: ErrorKind
    of_dataset: bool = False


class RetryingExecutor:
    """Runs experiments on the workers of a pool, each in the thread that calls ``run``.

    Args:
        on_gpus: workers have GPUs. Then unused GPUs get workers for helping, and several adapters train together.
        on_retry: called with one line that says what failed and is tried again.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        pool: WorkerPool,
        calls: WorkerCalls,
        on_gpus: bool,
        on_retry: Callable[[str], None] = log.warning,
    ) -> None:
        self._on_retry = on_retry
        self._config, self._store, self._pool, self._calls = config, store, pool, calls
        self._on_gpus = on_gpus
        self._num_given_up, self._some_are_done = 0, False
        self._alone: set[str] = set()  # experiments whose adapters share no pass, or have done so
        self._at_work: dict[str, Experiment] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._send_helpers, daemon=True).start()

    @property
    def num_at_work(self) -> int:
        """Experiments that a worker runs now."""
        return len(self._at_work)

    def run(self, experiment: Experiment, rank: float) -> dict[str, Any] | None:
        """The values of the experiment's row; None when nothing new is begun any more.

        Args:
            rank: the lowest of those that wait gets a worker first.

        Raises:
            CannotGoOnError: results cannot be kept, or no worker starts.
        """
        row = self._store.read_row(experiment)
        if row and self._is_finished(experiment, row):
            # Under a supervisor that was killed before it could return the row.
            return row.values
        try:
            return self._try(experiment, rank)
        except OSError as error:
            raise store_failure(error, self._store) or error from error

    def _is_finished(self, experiment: Experiment, row: ResultRow) -> bool:
        """Whether a stored row is the run's: else the command has planned the experiment anew."""
        if not row.ok:
            return not self._config.retry_failed
        return not any(self._store.is_damaged(experiment, stage) for stage in experiment.origins)

    def _try(self, experiment: Experiment, rank: float) -> dict[str, Any] | None:
        failures: list[Failure] = []
        num_moves, only_machines = 0, True
        while len(failures) < MAX_ATTEMPTS:
            worker = self._pool.take(rank, avoid=_elsewhere(failures), work=experiment)
            if worker is None:
                if self._pool.broken:
                    raise CannotGoOnError(self._pool.broken, kind=ErrorKind.CLUSTER)
                return None
            if not self._train_together(worker, experiment):
                continue
            self._at_work[experiment.experiment_id] = experiment
            try:
                values = self._calls.run(worker, experiment)
            except WorkerFailedError as error:
                if isinstance(error, MachineFailedError):
                    self._pool.give_back(worker, well=False)
                else:
                    # Whatever happened, the process may be harmed: a leak, a half-attached adapter, a lost GPU context.
                    self._pool.discard(worker)
                self._alone.add(experiment.experiment_id)
                num_moves += isinstance(error, NodeLostError)
                only_machines &= isinstance(error, MachineFailedError)
                if not isinstance(error, NodeLostError) or num_moves > MAX_MOVES:
                    of_dataset = isinstance(error, MachineFailedError) and error.of_dataset
                    failures.append(Failure(worker.place, str(error), error.kind, of_dataset))
                if len(failures) < MAX_ATTEMPTS:
                    self._on_retry(f"{experiment.dataset} is tried again: on {worker.place}, {error}")
                continue
            finally:
                self._at_work.pop(experiment.experiment_id, None)
            self._pool.give_back(worker)
            self._some_are_done = True
            return self._finish(experiment, values, failures)
        self._pool.clear_failures([failure.place for failure in failures], experiment.experiment_id)
        return self._give_up(experiment, failures[-1], for_now=only_machines)

    def _train_together(self, worker: PoolWorker, experiment: Experiment) -> bool:
        """Train the adapter together with those of waiting experiments where that is faster; their runs find it done.

        Returns:
            False if the worker died. That counts as nobody's failed try: those without an adapter are trained alone.
        """
        a_pass = self._how_many_pay(experiment)
        if a_pass < 2 or not self._may_share(experiment) or not self._wants_adapter(experiment):
            return True
        drawn = self._pool.claim_waiting(TURNS * a_pass - 1, self._may_share)
        # Trained or not, none is drawn again: it would wait for others' trainings.
        self._alone.update(e.experiment_id for e in (experiment, *(w.work for w in drawn)))
        try:
            together = [experiment, *(w.work for w in drawn if self._wants_adapter(w.work))]
            if len(together) > 1:
                self._calls.train(worker, together)
        except WorkerFailedError as error:
            self._pool.discard(worker)
            self._on_retry(f"{experiment.dataset} and {len(together) - 1} more, if not trained yet, go alone: {error}")
            return False
        finally:
            self._pool.requeue(drawn)
        return True

    def _how_many_pay(self, experiment: Experiment) -> int:
        """How many adapters' steps fill one minibatch; the worker reduces the number if memory does not hold them."""
        if self._config.adapters_a_pass or not self._on_gpus:
            return self._config.adapters_a_pass or 1
        per_step = int(experiment.settings["batch_size"]) * int(experiment.settings["gradient_accumulation"])
        a_step = min(per_step / max(1, experiment.num_examples), 1.0) * experiment.num_tokens
        return min(MOST_A_PASS, int(GPU_TOKEN_BUDGET / max(1.0, a_step)))

    def _may_share(self, experiment: Experiment) -> bool:
        return not experiment.error and experiment.experiment_id not in self._alone

    def _wants_adapter(self, experiment: Experiment) -> bool:
        return "train" in self._config.stages and self._store.read_stage(experiment, "train") is None

    def _finish(self, experiment: Experiment, values: dict[str, Any], failures: list[Failure]) -> dict[str, Any]:
        for failure in failures:
            if failure.place.gpu:
                self._pool.record_failure(failure.place, experiment.experiment_id, failure.cause)
        if failures:
            values["num_attempts"] = len(failures) + 1
            self._store.write_row(experiment, ResultRow(values))
        return values

    def _give_up(self, experiment: Experiment, failure: Failure, for_now: bool) -> dict[str, Any]:
        """An error row. ``for_now``: it is not stored, so the next run tries again; its machines may be fixed.

        Raises:
            CannotGoOnError: nothing has gone well so far, and machines were to blame each time.
        """
        is_of_all = for_now and not failure.of_dataset
        self._num_given_up += is_of_all
        if is_of_all and self._num_given_up >= MAX_GIVEN_UP and not self._some_are_done:
            raise CannotGoOnError(failure.cause, kind=failure.kind)
        text = (
            f"{experiment.dataset}: {failure.cause}; tried {MAX_ATTEMPTS} times, see {self._store.log_path(experiment)}"
        )
        row = error_row(self._config, experiment, text, failure.kind, num_attempts=MAX_ATTEMPTS)
        if not for_now:
            self._store.write_row(experiment, row)
        return row.values

    def _send_helpers(self) -> None:
        while not self._stopped.wait(LOOK_SECONDS):
            try:
                evaluated = self._calls.being_evaluated()
            except Exception:  # whoever runs something will know what is wrong with the cluster
                log.exception("nobody says who is being evaluated")
                continue
            # Those that began last have the most questions left.
            for experiment in [e for key, e in reversed([*self._at_work.items()]) if key in evaluated]:
                if worker := self._pool.take_spare(self._on_gpus):
                    threading.Thread(target=self._help, args=(worker, experiment), daemon=True).start()

    def _help(self, worker: PoolWorker, experiment: Experiment) -> None:
        try:
            num_asked = self._calls.help(worker, experiment)
        except (WorkerFailedError, CannotGoOnError) as error:
            log.warning("%s could not help with %s: %s", worker.place, experiment.dataset, error)
            self._pool.discard(worker)
            return
        log.info("%s asked %d questions of %s", worker.place, num_asked, experiment.dataset)
        self._pool.give_back(worker, well=False)

    def close(self) -> None:
        self._stopped.set()
        self._pool.close()


def _elsewhere(failures: list[Failure]) -> WorkerPlace | None:
    """The GPU of the last failure, to avoid. A machine without GPUs is never avoided."""
    return failures[-1].place if failures and failures[-1].place.gpu else None
