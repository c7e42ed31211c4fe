"""A run of a plan: what is left of it, its tables as rows come in, Ctrl-C, and what is said while it goes on."""

from __future__ import annotations

import contextlib
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from raylora import __version__
from raylora.config import Config
from raylora.estimate import gigabytes
from raylora.experiment import ROW_COLUMNS, error_row
from raylora.plan import Plan
from raylora.records import Experiment, ResultRow
from raylora.report import try_write_report
from raylora.store import write_legacy_results
from raylora.trackers import tracking
from raylora.watch import Watch

GRACE_SECONDS = 20
"""After Ctrl-C, the time in which experiments that are nearly done may finish."""
PACKAGES = ("raylora", "ray", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "scikit-learn")


class StoppedError(RuntimeError):
    """The run ended before all rows were there; what is finished is kept."""


def run_plan(
    plan: Plan, console: Console, on_rows: Callable[[Sequence[ResultRow]], None] = lambda _: None
) -> list[ResultRow]:
    """Run what is not done yet; the rows of all experiments, in the plan's order.

    The tables are written as rows come in, and once more at the end, however it comes; ``on_rows`` is called with the
    rows they hold.

    Raises:
        StoppedError: the run ended early; one line says why.
        KeyboardInterrupt: Ctrl-C, with experiments left.
    """
    store, config = plan.store, plan.config
    with store.held(config.fresh), _one_line_where_no_room(plan):
        rows = plan.done()
        tables = _Tables(plan, rows, on_rows)
        for experiment in plan.experiments:
            if experiment.error:
                rows[experiment.experiment_id] = error_row(config, experiment, experiment.error)
                store.write_row(experiment, rows[experiment.experiment_id])
        pending = [e for e in plan.experiments if e.experiment_id not in rows]
        store.write_manifest(_manifest(plan))
        try:
            if pending:
                run_pending(plan, pending, rows, console, tables.row_came)
        finally:
            ordered = tables.write()
            try_write_report(store, console)
        write_legacy_results(store, plan.chunk, config.max_samples, ordered)
    return ordered


def how_to_go_on(config: Config) -> str:
    """After a run that ended early."""
    if config.fresh:
        return "What is finished is kept: the same command without --fresh goes on from here."
    return "What is finished is kept: the same command goes on from here."


class _Tables:
    """The tables of a run, in place from the first row on. Writing them takes a tenth of the time at most."""

    def __init__(self, plan: Plan, rows: dict[str, ResultRow], on_rows: Callable[[Sequence[ResultRow]], None]) -> None:
        self._plan, self._rows, self._on_rows = plan, rows, on_rows
        self._not_before = 0.0

    def write(self) -> list[ResultRow]:
        started = time.monotonic()
        ordered = _in_order(self._plan, self._rows)
        self._plan.store.write_tables(ordered, ROW_COLUMNS)
        self._on_rows(ordered)
        now = time.monotonic()
        self._not_before = now + 10 * (now - started)
        return ordered

    def row_came(self) -> None:
        if time.monotonic() >= self._not_before:
            self.write()


@contextlib.contextmanager
def _one_line_where_no_room(plan: Plan) -> Iterator[None]:
    from raylora.foreman import CannotGoOnError, store_failure

    try:
        yield
    except CannotGoOnError as error:
        raise StoppedError(f"{error}.") from error
    except OSError as error:
        if failure := store_failure(error, plan.store):
            raise StoppedError(f"{failure}.") from error
        raise


def run_pending(
    plan: Plan,
    pending: Sequence[Experiment],
    rows: dict[str, ResultRow],
    console: Console,
    row_came: Callable[[], None],
) -> None:
    from raylora import scheduler  # starting Ray's client takes seconds, which a mistake need not wait for

    plan.check_fit()

    with (
        scheduler.cluster(plan.config) as dashboard,
        Watch(len(plan.experiments), len(rows), console) as watch,
        _Interrupts(console) as interrupts,
        tracking(plan, console) as trackers,
    ):
        console.print(dashboard, soft_wrap=True)

        def on_start(run: scheduler.Run) -> None:
            watch.connect(run.read)
            interrupts.begin_no_more = run.begin_no_more

        try:
            for row in scheduler.run_experiments(plan.config, plan.store, pending, on_start):
                rows[row.values["experiment_id"]] = row
                row_came()
                watch.finished(row)
                trackers.log_row(row)
        except scheduler.ClusterLostError as error:
            raise StoppedError(f"Ray broke down: {error}") from error
        if interrupts.came and any(e.experiment_id not in rows for e in pending):
            raise KeyboardInterrupt


def exit_on_sigterm() -> None:
    """So that what is running is stopped in order. For the main thread: no other may handle signals."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class _Interrupts:
    """Ctrl-C, once: nothing new is begun, and what is nearly done may finish. Twice, or some time later: stop now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.begin_no_more: Callable[[], None] = lambda: None
        self.came = False
        self._over = threading.Event()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._former: Any = None

    def __enter__(self) -> _Interrupts:
        if self._in_main_thread:  # no other may handle signals
            self._former = signal.signal(signal.SIGINT, self._handle)
            exit_on_sigterm()  # again: as it starts Ray puts a handler of its own in its place, which aborts
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        # Not from in here: the signal may have come in the middle of a call to Ray.
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self._console.print(f"Stopping: what is done within {GRACE_SECONDS} s is kept; Ctrl-C again stops now.")
        self.begin_no_more()
        if not self._over.wait(GRACE_SECONDS):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _in_order(plan: Plan, rows: dict[str, ResultRow]) -> list[ResultRow]:
    names = sorted(plan.experiments, key=lambda e: (e.dataset, e.experiment_id))
    return [rows[e.experiment_id] for e in names if e.experiment_id in rows]


def _manifest(plan: Plan) -> dict[str, Any]:
    """``run.json``: enough to know what was run, on what. No secret is in the configuration, and none is added."""
    return {
        "chunk": plan.chunk,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "configuration": plan.config.model_dump(mode="json"),
        "hashes": plan.hashes,
        "base_key": plan.experiments[0].base_key if plan.experiments else "",
        "data_hashes": {e.dataset: e.data_hash for e in plan.experiments},
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "machine": _machine(),
    }


def _version(package: str) -> str | None:
    if package == "raylora":  # what is imported, which need not be what is installed
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _machine() -> dict[str, Any]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }


def print_plan(plan: Plan, console: Console) -> None:
    """``--dry-run``: what would run, how large it is, what it takes, and what is done already."""
    done = plan.done()
    table = Table(title=f"{plan.chunk}: {len(plan.experiments)} experiments, {len(done)} done")
    for name in ("dataset", "experiment", "examples", "tokens", "memory", "time", "done", "would run, because"):
        table.add_column(name, overflow="fold")
    for e in plan.experiments:
        stages = plan.config.stages
        why = {s: "--fresh" if plan.config.fresh else plan.store.why_not_done(e, s) for s in stages}
        finished = "row" if e.experiment_id in done else ", ".join(s for s in stages if not why[s])
        todo = "" if e.experiment_id in done else "; ".join(f"{s}: {why[s]}" for s in stages if why[s])
        size = (f"{e.num_examples:,}", f"{e.num_tokens:,}", _memory(e), _duration(e.estimated_seconds))
        cells = (e.dataset, e.experiment_id, *size, finished, e.error or todo)
        table.add_row(*cells)
    console.print(table)
    if plan.misfit:
        console.print(f"Nothing can be run here: {plan.misfit}", soft_wrap=True)
    left = [e for e in plan.experiments if e.experiment_id not in done]
    if left and any(e.estimated_seconds for e in left):
        seconds = sum(e.estimated_seconds or 0.0 for e in left)
        console.print(
            f"About {_duration(seconds)} for one worker, stages that are done not taken off. Tokens, memory and time "
            "are estimates, from a sample of each dataset and the model's shape (raylora/estimate.py).",
            soft_wrap=True,
        )


def _memory(experiment: Experiment) -> str:
    peak = experiment.estimated_peak_memory_bytes
    return gigabytes(peak) if peak else "?"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
