"""The tables of a run whose process was ended, written by the process that watched over it. Imports neither torch nor
Ray: that takes seconds, and the user waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raylora.console import make_console
from raylora.records import Experiment
from raylora.report.page import try_write_report
from raylora.storage.run_tables import RunTables
from raylora.storage.store import Store


@dataclass(frozen=True)
class LastTables:
    """What is left to do of a run: see ``raylora.cluster.watcher``.

    Args:
        tables: None where the run writes none.
        retry_failed: error rows do not count as finished.
    """

    store: Store
    experiments: Sequence[Experiment]
    tables: RunTables | None
    retry_failed: bool = False

    def write(self) -> None:
        """Write the tables and the report from all stored rows.

        Raises:
            OSError, RayloraError: they cannot be written.
        """
        with self.store.held(fresh=False):
            if self.tables is None:
                return
            with self.tables.permitted():
                pass  # takes away the permit of the run that was ended
            rows = self.store.read_rows(self.experiments).values()
            self.tables.write(row for row in rows if row.ok or not self.retry_failed)
            try_write_report(self.store, make_console())
