"""The status of a run: workers and the sink write it, the command and the supervisor read it. Does not import Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerProgress:
    """What a worker is doing: it has done ``done`` of ``total`` items of a stage of an experiment."""

    worker: int
    experiment_id: str
    dataset: str
    stage: str
    done: int
    total: int
    started: float
    """When the stage began, in Unix seconds."""
    can_share: bool
    """Whether other workers can do some of the remaining items."""


@dataclass(frozen=True)
class Status:
    """A copy of the board: the progress of every busy worker, and notes and rows in the order in which they came."""

    progress: list[WorkerProgress] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopping: bool = False
    """Whether the command wants nothing new begun."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The values of the rows that the reader has not read yet."""


class StatusBoard:
    """Holds the status of a run. Workers write their progress, the sink its rows, the command its wish to stop.

    Args:
        rows: the values of the rows that were done before the run.
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = ()) -> None:
        self._progress: dict[int, WorkerProgress] = {}
        self._notes: list[str] = []
        self._stopping = False
        self._rows = {values["experiment_id"]: values for values in rows}

    def write(self, progress: WorkerProgress) -> None:
        self._progress[progress.worker] = progress

    def clear(self, worker: int) -> None:
        self._progress.pop(worker, None)

    def note(self, text: str) -> None:
        if text not in self._notes:  # two workers may find the same product damaged
            self._notes.append(text)

    def begin_no_more(self) -> None:
        self._stopping = True

    def add_row(self, values: dict[str, Any]) -> None:
        """Add an experiment's row, if it is its first: one may come twice when Ray restarts a supervisor or a sink."""
        self._rows.setdefault(values["experiment_id"], values)

    def read(self, num_rows_read: int | None = None) -> Status:
        """The status, with the rows after the first ``num_rows_read``; without rows if that is None."""
        rows = [] if num_rows_read is None else [*self._rows.values()][num_rows_read:]
        progress = [self._progress[key] for key in sorted(self._progress)]
        return Status(progress, [*self._notes], self._stopping, rows)
