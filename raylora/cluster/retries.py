"""Sees to it that every experiment gets a row, whatever becomes of its worker. Knows nothing of Ray.

An experiment whose worker dies, hangs or raises is tried once more, elsewhere where there is an elsewhere, and then
gets an error row with the cause. A node that went away is nobody's fault and costs no try. While fewer experiments are
left than there are workers, the idle ones help with the questions of those that are being evaluated.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from raylora.cluster.failures import store_failure
from raylora.cluster.worker_pool import PoolWorker, WorkerPlace, WorkerPool
from raylora.config import GPU_TOKEN_BUDGET, Config
from raylora.errors import (
    CannotGoOnError,
    ErrorKind,
    MachineFailedError,
    NodeLostError,
    WorkerFailedError,
)
from raylora.records import Experiment, ResultRow
from raylora.storage.store import Store

log = logging.getLogger("raylora.foreman")

MAX_ATTEMPTS = 2
MAX_GIVEN_UP = 3
"""So many experiments that no machine could do, before any was done, end the run: the next would fare no better."""
MAX_MOVES = 10
"""Nodes that an experiment may lose before it counts as its own fault."""
MOST_TOGETHER = 16
"""Adapters that are trained together at most, unless more are asked for."""
LOOK_SECONDS = 0.3
"""How often it is looked whether somebody can be helped, or nothing new is to be begun."""


@dataclass(frozen=True)
class WorkerCalls:
    """How a worker is told to do something. Each raises ``WorkerFailedError`` or ``CannotGoOnError``.

    ``run(member, experiment)`` returns the values of its row. ``train(member, experiments)`` trains adapters together
    and returns how many. ``help(member, experiment)`` returns the number of questions that were asked.
    ``being_evaluated()`` returns the ids of the experiments whose questions are being asked.
    """

    run: Callable[[PoolWorker, Experiment], dict[str, Any]]
    train: Callable[[PoolWorker, Sequence[Experiment]], int]
    help: Callable[[PoolWorker, Experiment], int]
    being_evaluated: Callable[[], set[str]]


@dataclass(frozen=True)
class Failure:
    """A try that failed: where, why, and what kind of cause that is."""

    place: WorkerPlace
    cause: str
    kind: ErrorKind


class RetryingExecutor:
    """Runs experiments with the workers of a crew, each in the thread that calls ``run``.

    Args:
        on_gpus: workers have GPUs. One that nobody uses gets a worker only to help, and adapters share passes.
        on_retry: told what went wrong and is tried again, in one line.
    """

    def __init__(
        self,
        config: Config,
        store: Store,
        crew: WorkerPool,
        calls: WorkerCalls,
        on_gpus: bool,
        on_retry: Callable[[str], None] = log.warning,
    ) -> None:
        self._on_retry = on_retry
        self._config, self._store, self._crew, self._calls = config, store, crew, calls
        self._on_gpus = on_gpus
        self._num_given_up, self._some_are_done = 0, False
        self._alone: set[str] = set()  # experiments whose adapters share no pass: something went wrong, or cannot
        self._at_work: dict[str, Experiment] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._send_helpers, daemon=True).start()

    @property
    def num_at_work(self) -> int:
        """Experiments that a worker runs now."""
        return len(self._at_work)

    def run(self, experiment: Experiment, rank: float) -> dict[str, Any] | None:
        """The values of the experiment's row; None where nothing new is begun any more.

        Args:
            rank: its place among those that wait for a worker; the lowest comes first.

        Raises:
            CannotGoOnError: results cannot be kept, or no worker starts.
        """
        row = self._store.read_row(experiment)
        if row and (row.ok or not self._config.retry_failed):
            # Made by this foreman's predecessor, which was killed before it said so.
            return row.values
        try:
            return self._try(experiment, rank)
        except OSError as error:
            raise store_failure(error, self._store) or error from error

    def _try(self, experiment: Experiment, rank: float) -> dict[str, Any] | None:
        failures: list[Failure] = []
        num_moves, only_machines = 0, True
        while len(failures) < MAX_ATTEMPTS:
            member = self._crew.take(rank, avoid=_elsewhere(failures), work=experiment)
            if member is None:
                if self._crew.broken:
                    raise CannotGoOnError(self._crew.broken, kind=ErrorKind.CLUSTER)
                return None
            if not self._train_together(member, experiment):
                continue
            self._at_work[experiment.experiment_id] = experiment
            try:
                values = self._calls.run(member, experiment)
            except WorkerFailedError as error:
                if isinstance(error, MachineFailedError):
                    self._crew.give_back(member, well=False)
                else:
                    # Whatever happened, the process may be harmed: a leak, a half-attached adapter, a lost GPU context.
                    self._crew.lost(member)
                self._alone.add(experiment.experiment_id)
                num_moves += isinstance(error, NodeLostError)
                only_machines &= isinstance(error, MachineFailedError)
                if not isinstance(error, NodeLostError) or num_moves > MAX_MOVES:
                    failures.append(Failure(member.place, str(error), error.kind))
                if len(failures) < MAX_ATTEMPTS:
                    self._on_retry(f"{experiment.dataset} is tried again: on {member.place}, {error}")
                continue
            finally:
                self._at_work.pop(experiment.experiment_id, None)
            self._crew.give_back(member)
            self._some_are_done = True
            return self._finish(experiment, values, failures)
        self._crew.acquit([failure.place for failure in failures], experiment.experiment_id)
        return self._give_up(experiment, failures[-1], for_now=only_machines)

    def _train_together(self, member: PoolWorker, experiment: Experiment) -> bool:
        """Train an adapter beside those of others that wait, where that pays; each finds its own done when it runs.

        Returns:
            False where the worker was lost. Nobody is to blame: each is tried again, and alone from now on.
        """
        most = self._how_many_pay(experiment)
        if most < 2 or not self._may_share(experiment) or not self._wants_adapter(experiment):
            return True
        drawn = self._crew.draw_in(most - 1, self._may_share)
        together = [experiment, *(w.work for w in drawn if self._wants_adapter(w.work))]
        num_trained = 0
        try:
            if len(together) > 1:
                num_trained = self._calls.train(member, together)
        except WorkerFailedError as error:
            self._crew.lost(member)
            self._on_retry(f"{experiment.dataset} and {len(together) - 1} more are trained one by one: {error}")
            return False
        finally:
            if num_trained == 0:
                self._alone.update(e.experiment_id for e in together)
            self._crew.let_go(drawn)
        return True

    def _how_many_pay(self, experiment: Experiment) -> int:
        """Adapters that fill a minibatch with the tokens of their steps; the worker knows whether memory holds them."""
        if self._config.adapters_a_pass or not self._on_gpus:
            return self._config.adapters_a_pass or 1
        per_step = int(experiment.settings["batch_size"]) * int(experiment.settings["gradient_accumulation"])
        a_step = min(per_step / max(1, experiment.num_examples), 1.0) * experiment.num_tokens
        return min(MOST_TOGETHER, int(GPU_TOKEN_BUDGET / max(1.0, a_step)))

    def _may_share(self, experiment: Experiment) -> bool:
        return not experiment.error and experiment.experiment_id not in self._alone

    def _wants_adapter(self, experiment: Experiment) -> bool:
        return "train" in self._config.stages and self._store.read_stage(experiment, "train") is None

    def _finish(self, experiment: Experiment, values: dict[str, Any], failures: list[Failure]) -> dict[str, Any]:
        for failure in failures:
            if failure.place.gpu:
                self._crew.blame(failure.place, experiment.experiment_id, failure.cause)
        if failures:
            values["num_attempts"] = len(failures) + 1
            self._store.write_row(experiment, ResultRow(values))
        return values

    def _give_up(self, experiment: Experiment, failure: Failure, for_now: bool) -> dict[str, Any]:
        """An error row. ``for_now``: the next run tries again, as the machines may be fixed by then.

        Raises:
            CannotGoOnError: nothing has gone well so far, and machines were to blame each time.
        """
        self._num_given_up += for_now
        if for_now and self._num_given_up >= MAX_GIVEN_UP and not self._some_are_done:
            raise CannotGoOnError(failure.cause, kind=failure.kind)
        from raylora.rows import error_row  # seconds and half a GB, which a supervisor seldom needs

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
            # Those that began last have most left to ask.
            for experiment in [e for key, e in reversed([*self._at_work.items()]) if key in evaluated]:
                if member := self._crew.take_spare(self._on_gpus):
                    threading.Thread(target=self._help, args=(member, experiment), daemon=True).start()

    def _help(self, member: PoolWorker, experiment: Experiment) -> None:
        try:
            num_asked = self._calls.help(member, experiment)
        except (WorkerFailedError, CannotGoOnError) as error:
            log.warning("%s could not help with %s: %s", member.place, experiment.dataset, error)
            self._crew.lost(member)
            return
        log.info("%s asked %d questions of %s", member.place, num_asked, experiment.dataset)
        self._crew.give_back(member, well=False)

    def close(self) -> None:
        self._stopped.set()
        self._crew.close()


def _elsewhere(failures: list[Failure]) -> WorkerPlace | None:
    """Where not to try again: on the GPU that may be at fault. A machine without GPUs is not doubted."""
    return failures[-1].place if failures and failures[-1].place.gpu else None
