"""Who does what in a run: what workers write, and the command and the supervisor read. Knows nothing of Ray."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    """What the board shows: every worker's progress, and notes in the order in which they came."""

    progress: list[WorkerProgress] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    stopping: bool = False


class StatusBoard:
    """Where workers write what they are doing and the command what it wants; both read it."""

    def __init__(self) -> None:
        self._progress: dict[int, WorkerProgress] = {}
        self._notes: list[str] = []
        self._stopping = False

    def write(self, progress: WorkerProgress) -> None:
        self._progress[progress.worker] = progress

    def clear(self, worker: int) -> None:
        self._progress.pop(worker, None)

    def note(self, text: str) -> None:
        self._notes.append(text)

    def begin_no_more(self) -> None:
        self._stopping = True

    def read(self) -> Status:
        return Status([self._progress[key] for key in sorted(self._progress)], [*self._notes], self._stopping)
