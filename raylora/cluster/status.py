"""Who does what in a run: what workers and the sink write, and the command and the supervisor read. No Ray here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class WorkerProgress:
    """What a worker is doing: ``done`` of ``total`` in ``stage`` of ``dataset``, since ``started`` (Unix seconds).

    ``can_share``: other workers can do a part of what is not done yet.
    """

    worker: int
    experiment_id: str
    dataset: str
    stage: str
    done: int
    total: int
    started: float
    can_share: bool


@dataclass(frozen=True)
class Status:
    """What the board shows: every worker's progress, and notes and rows in the order in which they came."""

    progress: list[WorkerProgress] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopping: bool = False
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Values of rows, without those that the reader has read before."""


class StatusBoard:
    """Where workers write what they are doing, the sink the rows, and the command what it wants; all read it.

    Args:
        rows: values of the rows that were there before the run.
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
        self._notes.append(text)

    def begin_no_more(self) -> None:
        self._stopping = True

    def add_row(self, values: dict[str, Any]) -> None:
        """An experiment's row. Its first one counts: Ray runs a killed supervisor, or a killed sink, again."""
        self._rows.setdefault(values["experiment_id"], values)

    def read(self, num_rows_read: int | None = None) -> Status:
        """What it shows now, with the rows after so many; without rows if None."""
        rows = [] if num_rows_read is None else [*self._rows.values()][num_rows_read:]
        progress = [self._progress[key] for key in sorted(self._progress)]
        return Status(progress, [*self._notes], self._stopping, rows)
