"""Experiments on all GPUs of a Ray cluster. The only module that imports ray.

A Ray Dataset maps each experiment through one supervisor, a light actor of many threads on the command's own node. It
holds the worker pool: each worker is an actor in its own process with one GPU and the base model. When a worker dies,
hangs or raises, the supervisor tries again with another one. If that fails too, it returns an error row, so that no
experiment makes the pipeline fail.

    experiments -> Ray Dataset -> supervisor (supervisor.py) -> sink -> tables
                                   |- worker on GPU 0  |         |
                                   '- worker on GPU 1  '-> status board: progress, notes, rows <- the command reads
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.util.metrics
from ray._private import ray_constants
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.data.block import Block, BlockAccessor
from ray.data.datasource import Datasink, WriteResult
from ray.exceptions import GetTimeoutError, NodeDiedError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from raylora.cluster.failures import store_failure
from raylora.cluster.metrics import WorkerMeter
from raylora.cluster.ray_folder import ray_folder
from raylora.cluster.ray_start import keep_token, on_loopback, start
from raylora.cluster.status import Status, StatusBoard
from raylora.cluster.supervisor import Supervisor
from raylora.cluster.worker import Worker, check_gpu
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPlace, workers_on
from raylora.config.run import Config
from raylora.errors import (
    CannotGoOnError,
    ClusterLostError,
    ErrorKind,
    MachineError,
    MachineFailedError,
    NodeLostError,
    SinkError,
    UserError,
    WorkerFailedError,
    first_line,
    kind_of,
    one_line,
)
from raylora.records import Experiment, ResultRow
from raylora.rows import load_results
from raylora.storage.run_tables import RunTables
from raylora.storage.store import Store

MAX_THREADS = 1024
"""Experiments in progress at once, at most. Each has a thread of the supervisor, which does nothing but wait."""
MAX_SINK_RETRIES = 10
"""How often the write task of a row is run again when its process died. By default Ray Data would do so forever."""


class RayWorker(Worker):
    """A worker as an actor of Ray."""

    def __init__(self, *args: Any, name: str, **kwargs: Any) -> None:
        super().__init__(*args, name=name, meter=WorkerMeter(name, ray.util.metrics), show=_set_title, **kwargs)

    def __repr__(self) -> str:
        """The worker's place, which Ray's dashboard shows beside its name."""
        return str(self._place())

    def where(self) -> WorkerPlace:
        """The worker's GPU and node.

        Raises:
            MachineError: torch cannot use the GPU.
        """
        place = self._place()
        if place.gpu:
            check_gpu()
        return place

    def _place(self) -> WorkerPlace:
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return WorkerPlace(socket.gethostname(), ",".join(map(str, gpus)), context.get_node_id())


def _set_title(text: str) -> None:
    """Set this process's title, which `ps` and the dashboard show. Ray sets its own when the actor's method returns.

    Ray's metrics of a process have its title as a label, so each new title adds series to Prometheus.
    """
    with contextlib.suppress(AttributeError):  # a private function, which another Ray may not have
        ray._raylet.setproctitle(f"ray::{text}")  # `ray stop` finds Ray's processes by this prefix


class RayCluster:
    """The running Ray as a ``WorkerCluster``. Made by the command, used in the supervisor's process.

    Args:
        make_runner: as for ``Worker``.
        board: a handle of the run's ``StatusBoard``.
        resources: Ray's options of a worker; with ``num_gpus`` where workers have GPUs.
        folder: the command's working folder.
    """

    def __init__(
        self,
        make_runner: Callable[..., Any] | None,
        config: Config,
        store: Store,
        board: Any,
        resources: dict[str, Any],
        folder: str,
    ) -> None:
        self._make_runner, self._config, self._store, self._board = make_runner, config, store, board
        self._resources, self._folder = resources, folder
        self._numbers = itertools.count()
        self._num_threads = config.threads or max(1, (os.cpu_count() or 1) // max(1, self.survey().num_workers))

    @functools.cached_property
    def _namespace(self) -> str:
        """Of the supervisor's process: one that takes a killed one's place must not meet its workers' names."""
        return _new_namespace()

    def survey(self) -> Capacity:
        nodes = frozenset(n["NodeID"] for n in ray.nodes() if n["Alive"])
        wanted, share = self._config.num_workers, self._config.gpus_per_worker
        if "num_gpus" not in self._resources:
            return Capacity(wanted or 1, nodes)
        room = sum(workers_on(num_gpus, share) for num_gpus in _gpus_of_nodes())
        return Capacity(min(wanted or room, room), nodes, max(1, workers_on(1, share)))

    def start(self) -> PoolWorker:
        number = next(self._numbers)
        name = f"raylora-{'gpu' if 'num_gpus' in self._resources else 'cpu'}-{number}"
        # max_restarts=1: when a node's memory runs out, Ray first kills the actors that it may restart. That must be
        # the worker, which uses the memory, and not the supervisor, whose death ends all workers. The pool never uses
        # a restarted worker: it discards each one that died.
        actor: Any = ray.remote(RayWorker).options(
            name=name, namespace=self._namespace, max_restarts=1, **self._resources
        )
        worker = actor.remote(
            self._make_runner,
            self._config,
            self._store,
            self._board,
            number,
            self._num_threads,
            folder=self._folder,
            name=name,
        )
        return PoolWorker(worker, ray.get(worker.where.remote()), number)

    def stop(self, worker: PoolWorker) -> None:
        with contextlib.suppress(RayError, ValueError):
            ray.kill(worker.handle, no_restart=True)
            self._board.clear.remote(worker.number)

    def call(self, worker: PoolWorker, method: str, *args: Any, timeout: float | None) -> Any:
        try:
            return ray.get(getattr(worker.handle, method).remote(*args), timeout=timeout)
        except GetTimeoutError as error:
            raise WorkerFailedError(f"gave up after --timeout {timeout:g} s", kind=ErrorKind.TIMEOUT) from error
        except RayTaskError as error:
            if failure := store_failure(error.cause, self._store):
                raise failure from error
            text, kind = one_line(error.cause), kind_of(error.cause)
            if isinstance(error.cause, MachineError):
                raise MachineFailedError(text, kind=kind, of_dataset=error.cause.of_dataset) from error
            raise WorkerFailedError(f"{type(error.cause).__name__}: {text}", kind=kind) from error
        except OutOfMemoryError as error:
            text = "its worker process was killed: the node ran out of memory"
            raise WorkerFailedError(text, kind=ErrorKind.NODE_OUT_OF_MEMORY) from error
        except RayActorError as error:
            if isinstance(error, NodeDiedError) or self._is_lost(worker):
                raise NodeLostError(f"the node {worker.place.host} is gone") from error
            text = "its worker process died: it crashed or was killed, perhaps for memory"
            raise WorkerFailedError(text, kind=ErrorKind.WORKER_DIED) from error
        except RayError as error:
            raise WorkerFailedError(f"{type(error).__name__}: {one_line(error)}") from error

    def _is_lost(self, worker: PoolWorker) -> bool:
        """Whether the worker's node is gone: Ray says so, or the node does not accept a connection.

        Ray marks a node as dead some seconds after it reports the death of the node's workers.
        """
        node: dict[str, Any] | None = next((n for n in ray.nodes() if n["NodeID"] == worker.place.node), None)
        if node is None or not node["Alive"]:
            return True
        try:
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=5).close()
        except OSError:
            return True
        return False

    def read_status(self) -> Status:
        status: Status = ray.get(self._board.read.remote(), timeout=60)
        return status

    def note(self, text: str) -> None:
        self._board.note.remote(text)


@contextlib.contextmanager
def cluster(config: Config) -> Iterator[str]:
    """A running Ray: the one this process is connected to, else that at ``config.address``, else a new one here.

    Yields:
        One line that says how to open its dashboard.

    Raises:
        UserError: there is no cluster at the address, or it does not accept our token; or none can start here.
    """
    # 0: Ray leaves CUDA_VISIBLE_DEVICES as it is in actors without a GPU. Unset, it hides the GPUs from them, and warns
    # that this will change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield "Ray was running already"
        return
    logging.getLogger("ray").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # Ray's core, in C++, writes to the terminal itself
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    token = "ray get-auth-token"
    with contextlib.ExitStack() as stack:
        if config.address:
            context = _join(config.address, quiet)
        else:
            token = keep_token(config.output)
            folder = stack.enter_context(ray_folder())
            # "local" starts a new Ray, even where another one runs on this machine.
            local = {"address": "local", "dashboard_host": "127.0.0.1", "include_dashboard": True}
            with on_loopback(ray_constants):
                init = functools.partial(ray.init, num_gpus=_visible_gpus(), **local, **quiet)
                context = start(init, ray.shutdown, folder)
        stack.callback(ray.shutdown)
        url = getattr(context, "dashboard_url", None)
        yield f"Ray dashboard: http://{url} (token: {token})" if url else "Ray dashboard: not running"


def _join(address: str, options: dict[str, Any]) -> Any:
    try:
        return ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        # By the message: Ray has an error type for a token that is not set here, but none for a wrong one, nor for a
        # cluster that wants one.
        if "token" in f"{error} {error.__cause__}".lower():
            raise UserError(
                f"--address {address}: the cluster wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to what "
                "`ray get-auth-token` prints on its head node"
            ) from None
        raise UserError(f"--address {address}: no Ray cluster there ({one_line(error)})") from None


def _visible_gpus() -> int:
    import torch

    return torch.cuda.device_count()


@dataclass
class RunHandle:
    """The command's handle of its run: reads the run's status, and tells it to begin nothing new."""

    board: Any
    num_rows_read: int = 0

    def read(self) -> Status:
        """The run's status, with the rows that came since the last call.

        Raises:
            RayError: the board is gone, or does not answer within 10 s.
        """
        status: Status = ray.get(self.board.read.remote(self.num_rows_read), timeout=10)
        self.num_rows_read += len(status.rows)
        return status

    def begin_no_more(self) -> None:
        self.board.begin_no_more.remote()


_rows_of_runs: dict[str, dict[str, ResultRow]] = {}
"""In the process of a sink: the rows so far by experiment id, of its run alone."""


class TableSink(Datasink[list[dict[str, Any]]]):
    """Where the Ray Dataset ends: a write task for each row, one after another, in a process on the command's node.

    Each task gets a new copy of this object, so the rows so far are in a global variable, ``_rows_of_runs``. When the
    process is killed, Ray starts another one with the same row, and that reads the rows so far from the board.

    Attributes:
        rows: the rows of this run; set in the command's process after the last one is written.
    """

    def __init__(self, run: str, board: Any, tables: RunTables | None) -> None:
        self._run, self._board, self._tables = run, board, tables
        self.rows: list[ResultRow] = []

    def write(self, blocks: Iterable[Block], ctx: Any) -> list[dict[str, Any]]:
        """Write the rows of a task's blocks to the tables, and return their values.

        Raises:
            SinkError: the supervisor says that the run cannot go on, or a table cannot be written.
        """
        items = [item for block in blocks for item in BlockAccessor.for_block(block).to_arrow().to_pylist()]
        new = [values for item in items if (values := json.loads(item["row"]))]
        try:
            if stop := next((item["stop"] for item in items if item["stop"]), ""):
                raise CannotGoOnError(stop)
            if new:
                self._add(new)
        except (CannotGoOnError, UserError, OSError) as error:
            raise SinkError(error) from error
        return new

    def _add(self, new: list[dict[str, Any]]) -> None:
        # If the board died, the live table and the tables miss rows until the end; no row is lost, as each is stored.
        with contextlib.suppress(RayError):
            if self._run not in _rows_of_runs:
                _rows_of_runs.clear()
                earlier = ray.get(self._board.read.remote(0), timeout=60).rows
                _rows_of_runs[self._run] = {values["experiment_id"]: ResultRow(values) for values in earlier}
            ray.get([self._board.add_row.remote(values) for values in new], timeout=60)
        if self._tables and (rows := _rows_of_runs.get(self._run)) is not None:
            for values in new:
                rows.setdefault(values["experiment_id"], ResultRow(values))
            self._tables.write_if_due(rows.values())

    def on_write_complete(self, write_result: WriteResult[list[dict[str, Any]]]) -> None:
        # Ray gives the experiments of a killed supervisor to a new one, so a row may come twice: the first one counts.
        values = [v for written in write_result.write_returns for v in written]
        self.rows = [*{v["experiment_id"]: ResultRow(v) for v in reversed(values)}.values()]


def run_experiments(
    config: Config,
    store: Store,
    experiments: Sequence[Experiment],
    on_start: Callable[[RunHandle], None] = lambda _: None,
    make_runner: Callable[..., Any] | None = None,
    tables: RunTables | None = None,
    former: Sequence[ResultRow] = (),
) -> list[ResultRow]:
    """Run the experiments on the running Ray, and wait for the last. Returns a row for each that was begun.

    Args:
        on_start: called with the run's handle before the first row; rows can be read from it as they come.
        make_runner: as for ``Worker``.
        tables: written as rows come, with the rows of ``former`` in them too.
        former: rows that were done before this run.

    Raises:
        CannotGoOnError: results cannot be kept.
        ClusterLostError: Ray broke down.
        OSError, UserError: a table cannot be written.
    """
    if not experiments:
        return []
    run = _new_namespace()
    on_this_node: dict[str, Any] = {"num_cpus": 0, "label_selector": _this_node()}
    board = (
        ray.remote(StatusBoard)
        .options(**on_this_node, name="raylora-board", namespace=run)
        .remote([row.values for row in former])
    )
    on_start(RunHandle(board, len(former)))
    sink = TableSink(run, board, tables)
    try:
        dataset = _map_experiments(config, store, experiments, board, make_runner)
        dataset.write_datasink(sink, ray_remote_args={**on_this_node, "max_retries": MAX_SINK_RETRIES}, concurrency=1)
    except RayTaskError as error:
        if isinstance(error.cause, SinkError):
            raise error.cause.args[0] from None
        raise ClusterLostError(first_line(error)) from error
    except RayError as error:
        raise ClusterLostError(first_line(error)) from error
    return sink.rows


def load_dataset(place: str | Path) -> Dataset:
    """The table of a run as a Ray Dataset, with the columns and types of ``load_results``. Starts Ray if need be.

    Raises:
        UserError: there is no table, or none that can be read.
    """
    return ray.data.from_pandas(load_results(place))


def _map_experiments(
    config: Config, store: Store, experiments: Sequence[Experiment], board: Any, make_runner: Callable[..., Any] | None
) -> Dataset:
    """The Ray Dataset of the rows: lazy, and streaming."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # the command prints what ended the run, in one line
    # The supervisor's threads start in any order. By its rank, the largest experiment gets a worker first.
    items = [{"experiment": json.dumps(asdict(e)), "rank": rank} for rank, e in enumerate(experiments)]
    num_threads = min(len(items), MAX_THREADS)
    resources = _resources_of_a_worker(config)
    workers = RayCluster(make_runner, config, store, board, resources, str(Path.cwd()))
    return ray.data.from_items(items, override_num_blocks=len(items)).map(
        Supervisor,
        fn_constructor_args=(workers, config, store, len(items), "num_gpus" in resources, ray.util.metrics),
        compute=ActorPoolStrategy(
            size=1,
            max_tasks_in_flight_per_actor=num_threads,
            max_concurrent_calls_per_actor=num_threads,
            enable_true_multi_threading=True,
        ),
        num_cpus=0,
        label_selector=_this_node(),
    )


def _new_namespace() -> str:
    """A namespace of this run's own: actors of other runs have the same names, and dead ones keep theirs a while."""
    return f"raylora-{uuid.uuid4().hex}"


def _this_node() -> dict[str, str]:
    """The label of the command's node. Supervisor, board and sink run there, so that no other node's loss ends them."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _resources_of_a_worker(config: Config) -> dict[str, Any]:
    """Ray's options of a worker: its GPUs if the cluster has any; else no resource, with workers spread over nodes.

    Raises:
        UserError: no node has as many GPUs.
    """
    if not (most := max(_gpus_of_nodes(), default=0)):
        return {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
    config.check_gpus(most, "the node with the most GPUs")
    return {"num_gpus": config.gpus_per_worker, "num_cpus": 0}


def _gpus_of_nodes() -> list[int]:
    """The number of GPUs of each node that is alive and has any."""
    return [n for node in ray.nodes() if node["Alive"] and (n := int(node["Resources"].get("GPU", 0)))]
