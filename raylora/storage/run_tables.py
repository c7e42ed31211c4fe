"""The tables of a run while it goes on. Two processes write them, and neither may overwrite newer tables.

The sink of the run's Ray Dataset, a process of Ray's on the command's node, writes them as rows come. The command
writes them at the end, from all stored rows, whatever ended the run. The sink's process may outlive the run by seconds,
even when the command was killed. So it writes only while a file, the run's permit, exists. The command deletes the
permit before it writes, and the next run deletes any permit that is left before it begins.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from raylora.records import ResultRow
from raylora.storage.store import Store
from raylora.storage.tables import RowsTable

PERMIT = "tables-{}.permit"
"""The name of a permit's file, with an id for each run."""
_not_before: dict[Path, float] = {}
"""By permit: the ``time.monotonic()`` from which this process, the sink's, may write the run's tables again."""


class RunTables:
    """``results.csv``, ``results.parquet`` and any other table of a command's rows. Pickled for the sink's process.

    Args:
        columns: of the store's tables, in their order.
        more: tables beside those of the store.
    """

    pause = 10.0
    """The sink waits so many times as long as its last write took, so that writing takes less than a tenth of the run's
    time. Rows that come meanwhile are in the next write."""

    def __init__(self, store: Store, columns: list[str], *more: RowsTable | None) -> None:
        self._store, self._columns, self._more = store, columns, [table for table in more if table]
        # A local file, even where results go to an object store: both processes are on one node, and lock it.
        self._permit = store.root / PERMIT.format(uuid.uuid4().hex)

    def write(self, rows: Iterable[ResultRow]) -> list[ResultRow]:
        """Write the tables. Returns the rows in the tables' order: by dataset, then by experiment id.

        Raises:
            OSError, UserError: a table cannot be written.
        """
        ordered = sorted(rows, key=lambda row: (row.values["dataset"], row.values["experiment_id"]))
        self._store.write_tables(ordered, self._columns)
        for table in self._more:
            table.write(ordered)
        return ordered

    def write_if_due(self, rows: Iterable[ResultRow]) -> None:
        """Called in the sink's process: write, unless it is too soon after the last write or the permit is gone."""
        if time.monotonic() < _not_before.get(self._permit, 0.0):
            return
        started = time.monotonic()
        with _locked(self._permit) as is_valid:
            if is_valid:
                self.write(rows)
        now = time.monotonic()
        _not_before[self._permit] = now + self.pause * (now - started)

    @contextlib.contextmanager
    def permitted(self) -> Iterator[None]:
        """Inside, the sink's process of this run may write, and that of no earlier run."""
        for old_permit in self._permit.parent.glob(PERMIT.format("*")):
            _revoke(old_permit)
        self._permit.touch()
        try:
            yield
        finally:
            _revoke(self._permit)


def _revoke(permit: Path) -> None:
    """Delete a permit, after waiting for a write that is going on. No write begins after it."""
    with _locked(permit):
        permit.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(permit: Path) -> Iterator[bool]:
    """Hold the lock of a permit; False if the permit was deleted. The system frees the lock when its holder dies."""
    try:
        file = os.open(permit, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield permit.exists()  # it may have been deleted while this waited for the lock
    finally:
        os.close(file)
