"""The pool of workers: idle and busy ones, the queue for them, GPUs in quarantine. Knows nothing of Ray.

A thread with work waits in ``take`` for a worker, in order of rank. It returns the worker with ``give_back``, or
reports a dead one with ``discard``. A worker is started only when somebody waits and a GPU is free: so a GPU that joins
during a run is used, and one that leaves is not waited for.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from raylora.errors import one_line

log = logging.getLogger("raylora.worker_pool")

CAPACITY_SECONDS = 2.0
"""Between two looks at which GPUs are in the cluster."""
AVOID_SECONDS = 60.0
"""A retry waits so long for another GPU than the one where the first try failed; then it takes any."""
MAX_FAILURES_IN_A_ROW = 3
"""A GPU is quarantined when so many experiments in a row failed on it and went well elsewhere."""
MAX_FAILED_STARTS = 5
"""The run ends when so many workers one after another did not start and no other worker is left."""


@dataclass(frozen=True)
class WorkerPlace:
    """A worker's GPU, with others or none beside it, or a machine without one.

    ``host`` and ``gpu`` are for people; ``node`` is the cluster's id of the machine.
    """

    host: str
    gpu: str
    node: str

    def __str__(self) -> str:
        return f"GPU{'s' if ',' in self.gpu else ''} {self.gpu} of {self.host}" if self.gpu else self.host


@dataclass(frozen=True)
class Capacity:
    """How many workers there may be now, the ids of the nodes that are alive, and how many workers share a GPU."""

    num_workers: int
    nodes: frozenset[str]
    num_sharing: int = 1


def workers_on(num_gpus: int, gpus_per_worker: float) -> int:
    """How many workers the GPUs of one machine have room for. A share of a GPU never reaches over two of them."""
    if gpus_per_worker >= 1:
        return int(num_gpus // gpus_per_worker)
    return num_gpus * int(1 / gpus_per_worker + 1e-6)  # of a third, 1 / gpus_per_worker may be 2.9999


@dataclass(eq=False)
class PoolWorker:
    """A worker that was started. ``handle`` is what it is called with, ``number`` what people see of it."""

    handle: Any
    place: WorkerPlace
    number: int = 0


@dataclass(eq=False)
class Waiter:
    """A thread that waits in ``take``, and what it wants to do with the worker."""

    work: Any
    rank: float
    avoid: WorkerPlace | None
    since: float
    served: threading.Event = field(default_factory=threading.Event)
    worker: PoolWorker | None = None

    def wants(self, worker: PoolWorker) -> bool:
        return worker.place != self.avoid or time.monotonic() - self.since > AVOID_SECONDS


class WorkerPool:
    """All workers of a run.

    Args:
        start: starts a worker. Called in a thread of its own; may take minutes, and may raise.
        stop: kills a worker, whatever it is doing.
        survey: returns the capacity; called every ``CAPACITY_SECONDS``.
        on_trouble: called with one line when a GPU is quarantined or a worker does not start.

    Attributes:
        broken: why ``take`` gives no workers any more; empty while it does.
    """

    def __init__(
        self,
        start: Callable[[], PoolWorker],
        stop: Callable[[PoolWorker], None],
        survey: Callable[[], Capacity],
        on_trouble: Callable[[str], None] = log.error,
    ) -> None:
        self._start, self._stop, self._survey, self._on_trouble = start, stop, survey, on_trouble
        self.broken = ""
        self._num_failed_starts = 0
        self._capacity = survey()
        self._lock = threading.Lock()
        self._waiting: list[Waiter] = []  # by rank
        self._idle: list[PoolWorker] = []
        self._busy: set[PoolWorker] = set()
        self._held: list[PoolWorker] = []
        self._num_starting = 0
        self._failed: dict[WorkerPlace, set[str]] = defaultdict(set)
        self._quarantined: set[WorkerPlace] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """Callers of ``take`` that have no worker yet."""
        return len(self._waiting)

    def take(self, rank: float = 0.0, avoid: WorkerPlace | None = None, work: Any = None) -> PoolWorker | None:
        """Wait for a worker; the lowest rank is served first.

        Args:
            avoid: do not give a worker there while another place may have one.
            work: what the worker is for; ``claim_waiting`` shows it to others.

        Returns:
            None when nothing new is begun any more.
        """
        waiter = Waiter(work, rank, avoid, time.monotonic())
        with self._lock:
            if self._closed.is_set():
                return None
            self._queue(waiter)
            self._assign()
        waiter.served.wait()
        return waiter.worker

    def take_spare(self, may_start: bool) -> PoolWorker | None:
        """An idle worker, if nobody waits for one; None otherwise.

        Args:
            may_start: if no worker is idle, start one on a free GPU; a later call gets it.
        """
        with self._lock:
            if self._waiting or self._closed.is_set():
                return None
            if self._idle:
                worker = self._idle.pop()
                self._busy.add(worker)
                return worker
            if may_start and self._num_starting == 0:
                self._start_more(1)
        return None

    def claim_waiting(self, most: int, suits: Callable[[Any], bool]) -> list[Waiter]:
        """Take waiting threads out of the queue, to do their work together with somebody else's; see ``requeue``.

        At most an equal share of those that wait, so that the other workers find as many.

        Args:
            suits: whether a thread's work can be done together. Called with the pool's lock held: must be quick.
        """
        with self._lock:
            share = (len(self._waiting) - self._num_starting) // max(1, self._num_usable())
            # A retry waits for another GPU than this one may be.
            suitable = (w for w in self._waiting if w.avoid is None and suits(w.work))
            drawn = list(itertools.islice(suitable, max(0, min(most, share))))
            self._waiting = [w for w in self._waiting if w not in drawn]
        return drawn

    def requeue(self, drawn: Iterable[Waiter]) -> None:
        """Put claimed threads back into the queue, in order of their ranks."""
        with self._lock:
            for waiter in drawn:
                if self._closed.is_set():
                    waiter.served.set()
                else:
                    self._queue(waiter)
            self._assign()

    def give_back(self, worker: PoolWorker, well: bool = True) -> None:
        """The worker is idle again. ``well``: it did its work, so its GPU's count of failures starts again at 0."""
        with self._lock:
            if well:
                self._failed.pop(worker.place, None)
            if worker in self._busy:  # else its node went away meanwhile
                self._busy.discard(worker)
                self._keep(worker)
            self._assign()

    def discard(self, worker: PoolWorker) -> None:
        """Kill a worker that is dead already, or may be damaged."""
        self._stop(worker)
        with self._lock:
            self._busy.discard(worker)
            self._assign()

    def record_failure(self, place: WorkerPlace, experiment: str, cause: str) -> None:
        """Count an experiment that failed at ``place`` and went well elsewhere.

        After ``MAX_FAILURES_IN_A_ROW`` the GPU is quarantined, unless it is the last one.
        """
        with self._lock:
            self._failed[place].add(experiment)
            num_failed = len(self._failed[place])
            is_last = self._num_usable() <= self._capacity.num_sharing
            if num_failed < MAX_FAILURES_IN_A_ROW or place in self._quarantined or is_last:
                return
            self._quarantined.add(place)
            for worker in [m for m in self._idle if m.place == place]:
                self._idle.remove(worker)
                self._held.append(worker)
        self._on_trouble(f"{place} is quarantined: {num_failed} experiments failed there in a row; the last: {cause}")

    def clear_failures(self, places: Iterable[WorkerPlace], experiment: str) -> None:
        """The experiment failed everywhere: that says nothing of the GPUs."""
        with self._lock:
            for place in places:
                self._failed[place].discard(experiment)

    def begin_no_more(self) -> None:
        """From now on ``take`` returns None, also to those who wait. Busy workers go on."""
        with self._lock:
            self._closed.set()
            for waiter in self._waiting:
                waiter.served.set()
            self._waiting = []

    def close(self) -> None:
        """Stop every worker."""
        self.begin_no_more()
        with self._lock:
            workers = [*self._idle, *self._busy, *self._held]
            self._idle, self._busy, self._held = [], set(), []
        for worker in workers:
            self._stop(worker)

    def _refresh(self) -> None:
        while not self._closed.wait(CAPACITY_SECONDS):
            try:
                capacity = self._survey()
            except Exception:  # the cluster is busy, or about to go: whoever runs something there will know
                log.exception("the cluster does not answer")
                continue
            with self._lock:
                self._capacity = capacity
                for workers in (self._idle, self._held):
                    workers[:] = [m for m in workers if m.place.node in capacity.nodes]
                self._busy = {m for m in self._busy if m.place.node in capacity.nodes}
                self._quarantined = {p for p in self._quarantined if p.node in capacity.nodes}
                self._assign()

    # All below is called with the lock held

    def _queue(self, waiter: Waiter) -> None:
        bisect.insort(self._waiting, waiter, key=lambda w: w.rank)

    def _num_usable(self) -> int:
        return self._capacity.num_workers - len(self._quarantined) * self._capacity.num_sharing

    def _keep(self, worker: PoolWorker) -> None:
        (self._held if worker.place in self._quarantined else self._idle).append(worker)

    def _assign(self) -> None:
        """Give idle workers to waiting threads, then start new ones for the rest, as far as the capacity allows."""
        unserved: list[Waiter] = []
        anywhere = self._num_usable() <= self._capacity.num_sharing
        for k, waiter in enumerate(self._waiting):
            if not self._idle:
                unserved += self._waiting[k:]
                break
            worker = next((m for m in self._idle if anywhere or waiter.wants(m)), None)
            if worker is None:
                unserved.append(waiter)
                continue
            waiter.worker = worker
            self._idle.remove(worker)
            self._busy.add(worker)
            waiter.served.set()
        self._waiting = unserved
        self._start_more(len(unserved))

    def _start_more(self, num: int) -> None:
        # A quarantined GPU keeps its worker: without it, the cluster would give that GPU to the next worker.
        num_there = len(self._idle) + len(self._busy) + len(self._held) + self._num_starting
        for _ in range(min(num - self._num_starting, self._capacity.num_workers - num_there)):
            self._num_starting += 1
            threading.Thread(target=self._start_one, daemon=True).start()

    def _start_one(self) -> None:
        try:
            worker = self._start()
        except Exception as error:  # its node may be gone; the next look at the capacity starts another
            log.exception("a worker did not start")
            self._did_not_start(one_line(error))
            return
        with self._lock:
            self._num_starting -= 1
            self._num_failed_starts = 0
            if not self._closed.is_set():
                self._keep(worker)
                self._assign()
                return
        self._stop(worker)

    def _did_not_start(self, cause: str) -> None:
        with self._lock:
            self._num_starting -= 1
            self._num_failed_starts += 1
            is_first, num_failed = self._num_failed_starts == 1, self._num_failed_starts
            hopeless = num_failed >= MAX_FAILED_STARTS and not (self._idle or self._busy or self._num_starting)
            if hopeless:
                self.broken = f"no worker starts, {num_failed} did not: {cause}"
        if is_first and not self._closed.is_set():
            self._on_trouble(f"a worker did not start, and another one is tried: {cause}")
        if hopeless:
            self.begin_no_more()
