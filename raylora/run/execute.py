"""A run of a plan: what is left of it, its tables as rows come in, Ctrl-C, and what is said while it goes on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from raylora import errors
from raylora.cluster import ray_run
from raylora.errors import StoppedError
from raylora.planning.plan import Plan
from raylora.records import Experiment, ResultRow
from raylora.report.page import try_write_report
from raylora.rows import ROW_COLUMNS, error_row
from raylora.run.interrupts import Interrupts, exit_on_sigterm
from raylora.run.live_table import LiveTable
from raylora.run.manifest import manifest_of
from raylora.run.trackers import tracking
from raylora.storage.legacy import write_legacy_results


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
        store.write_manifest(manifest_of(plan))
        try:
            if pending:
                run_pending(plan, pending, rows, console, tables.row_came)
        finally:
            ordered = tables.write()
            try_write_report(store, console)
        write_legacy_results(store, plan.chunk, config.max_samples, ordered)
    return ordered


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
    from raylora.cluster.failures import store_failure
    from raylora.errors import CannotGoOnError

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
    plan.check_fit()
    with (
        exit_on_sigterm(),  # and again within Interrupts, as Ray puts a handler of its own in its place
        ray_run.cluster(plan.config) as dashboard,
        LiveTable(len(plan.experiments), len(rows), console) as watch,
        Interrupts(console) as interrupts,
        tracking(plan, console) as trackers,
    ):
        console.print(dashboard, soft_wrap=True)

        def on_start(run: ray_run.RunHandle) -> None:
            watch.connect(run.read)
            interrupts.begin_no_more = run.begin_no_more

        try:
            for row in ray_run.run_experiments(plan.config, plan.store, pending, on_start):
                rows[row.values["experiment_id"]] = row
                row_came()
                watch.finished(row)
                trackers.log_row(row)
        except errors.ClusterLostError as error:
            raise StoppedError(f"Ray broke down: {error}") from error
        if interrupts.came and any(e.experiment_id not in rows for e in pending):
            raise KeyboardInterrupt


def _in_order(plan: Plan, rows: dict[str, ResultRow]) -> list[ResultRow]:
    names = sorted(plan.experiments, key=lambda e: (e.dataset, e.experiment_id))
    return [rows[e.experiment_id] for e in names if e.experiment_id in rows]
