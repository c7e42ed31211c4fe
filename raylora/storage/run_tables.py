"""The tables of a run while it goes on: two processes write them, and none over what the other one wrote later.

The sink of the run's Ray Dataset writes them with every row, in a process of Ray's on the command's node. The command
itself writes them at the end, from all that is stored, whatever ended the run. A process of Ray's may live on for
seconds after its run, even after the command was killed: what allows it to write is a file, a permit, which the command
takes away before it writes, and the next run before it begins.
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
from raylora.storage.tables import CsvTable

PERMIT = "tables-{}.permit"
_not_before: dict[Path, float] = {}
"""When this process may write a run's tables again, by its permit."""


class RunTables:
    """``results.csv``, ``results.parquet`` and what else a command's rows go to. Travels to the sink's process.

    Args:
        more: a table beside those of the store.
    """

    pause = 10.0
    """After the sink wrote, it writes no more for so many times as long. Rows that come meanwhile wait for the next."""

    def __init__(self, store: Store, columns: list[str], more: CsvTable | None = None) -> None:
        self._store, self._columns, self._more = store, columns, more
        # On the node of both processes, whatever the place of the results: they lock it.
        self._permit = store.root / PERMIT.format(uuid.uuid4().hex)

    def write(self, rows: Iterable[ResultRow]) -> list[ResultRow]:
        """The rows in their order: by dataset, then by hyperparameters."""
        ordered = sorted(rows, key=lambda row: (row.values["dataset"], row.values["experiment_id"]))
        self._store.write_tables(ordered, self._columns)
        if self._more:
            self._more.write(ordered)
        return ordered

    def write_if_due(self, rows: Iterable[ResultRow]) -> None:
        """From the sink's process: unless it has just written them, or the command has taken over."""
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
        """From its beginning to its end the sink's process may write, and that of no earlier run."""
        for former in self._permit.parent.glob(PERMIT.format("*")):
            _take_away(former)
        self._permit.touch()
        try:
            yield
        finally:
            _take_away(self._permit)


def _take_away(permit: Path) -> None:
    """Wait for a table that is being written; there is none after it."""
    with _locked(permit):
        permit.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(permit: Path) -> Iterator[bool]:
    """Hold a permit; False where it was taken away. The system lets go of it when its holder dies."""
    try:
        file = os.open(permit, os.O_RDWR)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield permit.exists()
    finally:
        os.close(file)
