"""Experiments on all GPUs of a Ray cluster. The only module that imports ray.

A Ray Dataset maps each experiment through a supervisor, a light actor without a GPU. Each supervisor owns one worker,
an actor in its own process that holds one GPU and the base model. The supervisor sees its worker die, hang or raise,
starts a new one, tries once more, and then returns an error row with the cause: the pipeline itself never fails.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import ray
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raylora.config import Config
from raylora.experiment import Workbench, error_row, run_experiment
from raylora.records import Experiment, ResultRow
from raylora.sources import quiet_libraries
from raylora.store import Store

MAX_ATTEMPTS = 2
PROGRESS_SECONDS = 0.5
"""At most one progress message a worker in this time."""


@dataclass(frozen=True)
class Progress:
    """What a worker is doing: ``done`` of ``total`` in ``stage`` of ``dataset``, since ``started`` (Unix seconds)."""

    worker: int
    dataset: str
    stage: str
    done: int
    total: int
    started: float


class ClusterLostError(RuntimeError):
    """Ray itself went away, or parts of it that no retry brings back. What is stored is not lost."""


class Board:
    """Where workers write what they are doing, and the command reads it."""

    def __init__(self) -> None:
        self._progress: dict[int, Progress] = {}
        self._num_workers = 0

    def next_worker(self) -> int:
        self._num_workers += 1
        return self._num_workers - 1

    def write(self, progress: Progress) -> None:
        self._progress[progress.worker] = progress

    def clear(self, worker: int) -> None:
        self._progress.pop(worker, None)

    def read(self) -> list[Progress]:
        return [self._progress[key] for key in sorted(self._progress)]


class Worker:
    """One GPU and one base model, in a process of its own. Runs one experiment after another."""

    def __init__(self, config: Config, store: Store, board: Any, number: int, num_threads: int) -> None:
        quiet_libraries()
        import torch

        torch.set_num_threads(num_threads)
        self._bench = Workbench(config, store)
        self._board, self._number = board, number

    def run(self, experiment: Experiment) -> dict[str, Any]:
        """The values of the experiment's row."""
        stage_now, started, written = "", 0.0, 0.0

        def progress(stage: str, done: int, total: int) -> None:
            nonlocal stage_now, started, written
            now = time.time()
            if stage != stage_now:
                stage_now, started, written = stage, now, 0.0
            if now - written >= PROGRESS_SECONDS:
                written = now
                self._board.write.remote(Progress(self._number, experiment.dataset, stage, done, total, started))

        return run_experiment(self._bench, experiment, progress).values


class Supervisor:
    """Sees to it that every experiment gets a row, whatever becomes of the worker."""

    def __init__(self, config: Config, store: Store, board: Any, resources: dict[str, float], num_threads: int) -> None:
        self._config, self._store, self._board = config, store, board
        self._resources, self._num_threads = resources, num_threads
        self._number = ray.get(board.next_worker.remote())
        self._worker: Any = None

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        experiment = Experiment(**json.loads(item["experiment"]))
        # A row that is there already was made by this supervisor's predecessor, which was killed before it said so.
        row = self._store.read_row(experiment) if item["resume"] else None
        values = row.values if row else self._run(experiment)
        self._board.clear.remote(self._number)
        return {"row": json.dumps(values)}

    def _run(self, experiment: Experiment) -> dict[str, Any]:
        cause = ""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                values = ray.get(self._started_worker().run.remote(experiment), timeout=self._config.timeout)
                if attempt > 1:
                    values["num_attempts"] = attempt
                    self._store.write_row(experiment, ResultRow(values))
                return values
            except GetTimeoutError:
                cause = f"gave up after --timeout {self._config.timeout:g} s"
            except RayTaskError as error:
                cause = f"{type(error.cause).__name__}: {error.cause}"
            except RayActorError as error:
                cause = f"its worker process died ({_death_cause(error)})"
            except RayError as error:
                cause = f"{type(error).__name__}: {error}"
            # Whatever happened, the process may be harmed: a memory leak, a half-attached adapter, a lost GPU context.
            self._stop_worker()
        text = f"{experiment.dataset}: {cause}; tried {MAX_ATTEMPTS} times, see {self._store.log_path(experiment)}"
        row = error_row(self._config, experiment, text, num_attempts=MAX_ATTEMPTS)
        self._store.write_row(experiment, row)
        return row.values

    def _started_worker(self) -> Any:
        if self._worker is None:
            options = {**self._resources, "max_restarts": 0}
            actor = ray.remote(Worker).options(**options)
            self._worker = actor.remote(self._config, self._store, self._board, self._number, self._num_threads)
        return self._worker

    def _stop_worker(self) -> None:
        if self._worker is not None:
            with contextlib.suppress(RayError, ValueError):
                ray.kill(self._worker, no_restart=True)
            self._worker = None


def _death_cause(error: RayActorError) -> str:
    """The one line of Ray's long message that says why."""
    text = str(error)
    for mark, meaning in {
        "SIGKILL": "killed, or out of memory",
        "memory": "out of memory",
        "SYSTEM_ERROR": "killed or crashed",
        "node": "its node is gone",
    }.items():
        if mark in text:
            return meaning
    return "killed or crashed"


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[str]:
    """A running Ray: the one at ``config.address``, the one this process is in already, or a new one on this machine.

    Yields:
        One line that says how to open its dashboard.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield "Ray was running already"
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its core writes warnings of its own to the terminal
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    if config.address:
        context = ray.init(address=config.address, **quiet)
    else:
        context = ray.init(dashboard_host="127.0.0.1", include_dashboard=True, num_gpus=_visible_gpus(), **quiet)
    try:
        url = getattr(context, "dashboard_url", None)
        yield f"Ray dashboard: http://{url} (token: ray get-auth-token)" if url else "Ray dashboard: not running"
    finally:
        ray.shutdown()


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def run_experiments(
    config: Config, store: Store, experiments: Sequence[Experiment], on_board: Any = None
) -> Iterator[ResultRow]:
    """Rows as they finish, one for each experiment, in the running Ray.

    Args:
        on_board: called with a function that reads every worker's ``Progress``.
    """
    if not experiments:
        return
    num_workers, resources = _workers_and_resources(config, len(experiments))
    num_threads = config.threads or max(1, (os.cpu_count() or 1) // num_workers)
    board = ray.remote(Board).options(num_cpus=0).remote()
    if on_board:
        on_board(lambda: ray.get(board.read.remote(), timeout=10))
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    resume = not (config.fresh or config.retry_failed)
    items = [{"experiment": json.dumps(asdict(e)), "resume": resume} for e in experiments]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map(
        Supervisor,
        fn_constructor_args=(config, store, board, resources, num_threads),
        # One experiment in hand and none in line behind it, so that the last ones go to whoever is free.
        compute=ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=1),
        num_cpus=0,
    )
    seen: set[str] = set()
    try:
        for item in rows.iter_rows():
            row = ResultRow(json.loads(item["row"]))
            # A supervisor that was killed is run again by Ray; its row may come twice.
            if row.values["experiment_id"] not in seen:
                seen.add(row.values["experiment_id"])
                yield row
    except RayError as error:
        raise ClusterLostError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _workers_and_resources(config: Config, num_experiments: int) -> tuple[int, dict[str, float]]:
    """How many workers, and what each one asks of Ray: a GPU where the cluster has any."""
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    wanted = config.num_workers or num_gpus or 1
    if num_gpus:
        return min(wanted, num_gpus, num_experiments), {"num_gpus": 1, "num_cpus": 0}
    return min(wanted, num_experiments), {"num_cpus": 0}
