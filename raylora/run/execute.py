"""Run a plan: its experiments that are not done, with the tables and the live table as rows come in, and Ctrl-C."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console

from raylora.cluster import ray_run, watcher
from raylora.cluster.failures import store_failure
from raylora.errors import CannotGoOnError, ClusterLostError, ErrorKind, StoppedError
from raylora.planning.plan import Plan
from raylora.records import Experiment, ResultRow
from raylora.report.page import try_write_report
from raylora.rows import ROW_COLUMNS, error_row
from raylora.run.further_tables import further_tables
from raylora.run.interrupts import Interrupts, exit_on_sigterm
from raylora.run.last_tables import LastTables
from raylora.run.live_table import LiveTable
from raylora.run.manifest import manifest_of
from raylora.run.pushes import Pushes, pushing
from raylora.run.trackers import tracking
from raylora.storage.legacy import write_legacy_results
from raylora.storage.run_tables import RunTables
from raylora.storage.tables import CsvTable


def run_plan(
    plan: Plan, console: Console, more: CsvTable | None = None, pushes: Pushes | None = None
) -> list[ResultRow]:
    """Run the experiments that are not done yet. Returns the rows of all experiments, in the tables' order.

    The run's Ray Dataset writes the tables, and ``more``, as rows come in. However the run ends, they are written once
    more from all stored rows.

    Raises:
        StoppedError: the run ended early; one line says why.
        KeyboardInterrupt: Ctrl-C, and some experiments are not done.
    """
    store, config, pushes = plan.store, plan.config, pushes or Pushes(plan, console)
    with store.held(config.fresh), _stopped_if_store_fails(plan):
        rows = plan.done()
        tables = RunTables(store, ROW_COLUMNS, more, *further_tables(plan))
        plan.write_columns()
        for experiment in plan.experiments:
            if experiment.error:
                kind = ErrorKind(experiment.error_kind)
                rows[experiment.experiment_id] = error_row(config, experiment, experiment.error, kind)
                store.write_row(experiment, rows[experiment.experiment_id])
        pending = [e for e in plan.experiments if e.experiment_id not in rows]
        store.write_manifest(manifest_of(plan))
        with pushing(pushes, rows.values()):
            try:
                with tables.permitted():
                    run_pending(plan, pending, rows, console, tables, pushes.push)
            finally:
                if len(rows) < len(plan.experiments):  # some were stored after the command read the last ones
                    rows |= plan.stored_rows()
                ordered = tables.write(rows.values())
                try_write_report(store, console)
        write_legacy_results(store, plan.chunk, config.max_samples, ordered)
    return ordered


@contextlib.contextmanager
def _stopped_if_store_fails(plan: Plan) -> Iterator[None]:
    """Raise StoppedError, with its one line, for an error that means that results cannot be stored."""
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
    came: Callable[[ResultRow], None] = lambda row: None,
) -> None:
    """Run the ``pending`` experiments, and add their rows to ``rows``.

    Args:
        rows: rows by experiment id, of the experiments that are done.
        tables: written with all of ``rows`` as they come.
        came: called with each new row; must return at once.

    Raises:
        StoppedError, KeyboardInterrupt: as ``run_plan``.
        CannotGoOnError, OSError, UserError: results, or a table, cannot be written.
    """
    if not pending:
        return
    plan.check_fit()
    watcher.keep(LastTables(plan.store, plan.experiments, tables, plan.config.retry_failed))
    with (
        exit_on_sigterm(),  # set again by Interrupts, as Ray replaces the handler when it starts
        ray_run.cluster(plan.config) as dashboard,
        LiveTable(len(plan.experiments), len(rows), console) as live_table,
        Interrupts(console) as interrupts,
        watcher.ray_is_used(),
        tracking(plan, console) as trackers,
    ):
        console.print(dashboard, soft_wrap=True)

        def on_start(run: ray_run.RunHandle) -> None:
            live_table.connect(run.read, row_came)
            interrupts.begin_no_more = run.begin_no_more

        def row_came(row: ResultRow) -> None:
            rows[row.values["experiment_id"]] = row
            live_table.finished(row)
            trackers.log_row(row)
            came(row)

        rows_before = [*rows.values()]
        try:
            new_rows = ray_run.run_experiments(
                plan.config, plan.store, pending, on_start, tables=tables, former=rows_before
            )
        except ClusterLostError as error:
            raise StoppedError(f"Ray broke down: {error}") from error
        finally:
            live_table.look_once_more()
        unread = {row.values["experiment_id"]: row for row in new_rows if row.values["experiment_id"] not in rows}
        # All of them before the first is printed: where the terminal is gone, printing raises.
        rows.update(unread)
        for row in unread.values():
            row_came(row)
        if interrupts.came and any(e.experiment_id not in rows for e in pending):
            raise KeyboardInterrupt
