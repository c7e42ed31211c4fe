"""A run of a plan: what is left of it, its tables as rows come in, Ctrl-C, and what is said while it goes on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from rich.console import Console

from raylora import errors
from raylora.cluster import ray_run
from raylora.errors import ErrorKind, StoppedError
from raylora.planning.plan import Plan
from raylora.records import Experiment, ResultRow
from raylora.report.page import try_write_report
from raylora.rows import ROW_COLUMNS, error_row
from raylora.run.interrupts import Interrupts, exit_on_sigterm
from raylora.run.live_table import LiveTable
from raylora.run.manifest import manifest_of
from raylora.run.trackers import tracking
from raylora.storage.legacy import write_legacy_results
from raylora.storage.run_tables import RunTables
from raylora.storage.tables import CsvTable


def run_plan(plan: Plan, console: Console, more: CsvTable | None = None) -> list[ResultRow]:
    """Run what is not done yet; the rows of all experiments, in the tables' order.

    The tables, and ``more``, are written by the run's Ray Dataset as rows come in, and once more at the end, however it
    comes, from all that is stored.

    Raises:
        StoppedError: the run ended early; one line says why.
        KeyboardInterrupt: Ctrl-C, with experiments left.
    """
    store, config = plan.store, plan.config
    with store.held(config.fresh), _one_line_where_no_room(plan):
        rows = plan.done()
        tables = RunTables(store, ROW_COLUMNS, more)
        for experiment in plan.experiments:
            if experiment.error:
                kind = ErrorKind(experiment.error_kind)
                rows[experiment.experiment_id] = error_row(config, experiment, experiment.error, kind)
                store.write_row(experiment, rows[experiment.experiment_id])
        pending = [e for e in plan.experiments if e.experiment_id not in rows]
        store.write_manifest(manifest_of(plan))
        try:
            with tables.permitted():
                run_pending(plan, pending, rows, console, tables)
        finally:
            if len(rows) < len(plan.experiments):  # rows that were made while the command heard of none any more
                rows |= plan.stored_rows()
            ordered = tables.write(rows.values())
            try_write_report(store, console)
        write_legacy_results(store, plan.chunk, config.max_samples, ordered)
    return ordered


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
    tables: RunTables | None,
) -> None:
    """Run them, and put their rows to ``rows``, by experiment id.

    Args:
        tables: written with all of ``rows`` as they come.
    """
    if not pending:
        return
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
            watch.connect(run.read, row_came)
            interrupts.begin_no_more = run.begin_no_more

        def row_came(row: ResultRow) -> None:
            rows[row.values["experiment_id"]] = row
            watch.finished(row)
            trackers.log_row(row)

        former = [*rows.values()]
        try:
            made = ray_run.run_experiments(plan.config, plan.store, pending, on_start, tables=tables, former=former)
        except errors.ClusterLostError as error:
            raise StoppedError(f"Ray broke down: {error}") from error
        finally:
            watch.look_once_more()
        unheard = {row.values["experiment_id"]: row for row in made if row.values["experiment_id"] not in rows}
        rows.update(unheard)  # all of them, even if the terminal is gone and the first line ends this
        for row in unheard.values():
            row_came(row)
        if interrupts.came and any(e.experiment_id not in rows for e in pending):
            raise KeyboardInterrupt
