"""Who works: the workers there are, who waits for one, and the GPUs that are not to be trusted. Knows nothing of Ray.

A thread that has work waits in ``take`` for a worker, in order of rank, and hands it back with ``give_back``, or says
that it is ``lost``. Workers are started as they are wanted and as there are GPUs for them, so that a GPU that joins
while a run goes on is used, and one that leaves is not waited for.
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

log = logging.getLogger("raylora.crew")

CAPACITY_SECONDS = 2.0
"""How often it is looked whether GPUs came or went."""
AVOID_SECONDS = 60.0
"""How long somebody waits for a worker elsewhere before taking one where things went wrong."""
MAX_FAILURES_IN_A_ROW = 3
"""So many different experiments that failed on a GPU one after another, and did not fail elsewhere, condemn it."""
MAX_FAILED_STARTS = 5
"""So many workers that did not start one after another, with no other there, end the run."""


@dataclass(frozen=True)
class WorkerPlace:
    """A GPU, or a machine without any: what it says of itself where people read it, and what Ray calls its node."""

    host: str
    gpu: str
    node: str

    def __str__(self) -> str:
        return f"GPU {self.gpu} of {self.host}" if self.gpu else self.host


@dataclass(frozen=True)
class Capacity:
    """What there is to work with now: how many workers there may be, and the nodes that are alive."""

    num_workers: int
    nodes: frozenset[str]


@dataclass(eq=False)
class PoolWorker:
    """A worker that was started, where, and by what number people know it."""

    worker: Any
    place: WorkerPlace
    number: int = 0


@dataclass(eq=False)
class Waiter:
    """Somebody who waits for a worker, to do ``work`` with it."""

    work: Any
    rank: float
    avoid: WorkerPlace | None
    since: float
    served: threading.Event = field(default_factory=threading.Event)
    member: PoolWorker | None = None

    def wants(self, member: PoolWorker) -> bool:
        return member.place != self.avoid or time.monotonic() - self.since > AVOID_SECONDS


class WorkerPool:
    """All workers of a run.

    Args:
        start: starts a worker and says where it is. Called in a thread of its own; may take minutes, and may raise.
        stop: ends a worker, whatever it is doing.
        survey: looks at what there is; asked every ``REFRESH_SECONDS``.
        on_trouble: told of a GPU that is used no more, and of a worker that does not start, in one line.

    Attributes:
        broken: why nobody gets a worker any more; empty while all is well.
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
        self._there = survey()
        self._lock = threading.Lock()
        self._waiting: list[Waiter] = []  # by rank
        self._idle: list[PoolWorker] = []
        self._busy: set[PoolWorker] = set()
        self._held: list[PoolWorker] = []
        self._num_starting = 0
        self._failed: dict[WorkerPlace, set[str]] = defaultdict(set)
        self._set_aside: set[WorkerPlace] = set()
        self._closed = threading.Event()
        threading.Thread(target=self._refresh, daemon=True).start()

    @property
    def num_waiting(self) -> int:
        """Callers of ``take`` that have no worker yet."""
        return len(self._waiting)

    def take(self, rank: float = 0.0, avoid: WorkerPlace | None = None, work: Any = None) -> PoolWorker | None:
        """Wait for a worker; those of a lower rank come first.

        Args:
            avoid: one elsewhere, if there is an elsewhere.
            work: what it is wanted for, for ``draw_in``.

        Returns:
            None where no work is begun any more.
        """
        waiter = Waiter(work, rank, avoid, time.monotonic())
        with self._lock:
            if self._closed.is_set():
                return None
            self._queue(waiter)
            self._assign()
        waiter.served.wait()
        return waiter.member

    def take_spare(self, may_start: bool) -> PoolWorker | None:
        """A worker that nobody else wants now; None where there is none.

        Args:
            may_start: start one, for a later call, where a GPU has none.
        """
        with self._lock:
            if self._waiting or self._closed.is_set():
                return None
            if self._idle:
                member = self._idle.pop()
                self._busy.add(member)
                return member
            if may_start and self._num_starting == 0:
                self._start_more(1)
        return None

    def draw_in(self, most: int, suits: Callable[[Any], bool]) -> list[Waiter]:
        """Take some out of the line whose work can be begun beside somebody else's. ``let_go`` puts them back.

        No more than this worker's share of those that wait: the other workers are to have as many.

        Args:
            suits: asked of each one's work while nobody else can take or give back a worker: to be quick.
        """
        with self._lock:
            share = (len(self._waiting) - self._num_starting) // max(1, self._num_usable())
            # One that failed on a GPU waits for another GPU.
            suitable = (w for w in self._waiting if w.avoid is None and suits(w.work))
            drawn = list(itertools.islice(suitable, max(0, min(most, share))))
            self._waiting = [w for w in self._waiting if w not in drawn]
        return drawn

    def let_go(self, drawn: Iterable[Waiter]) -> None:
        """They wait again, each in its old place."""
        with self._lock:
            for waiter in drawn:
                if self._closed.is_set():
                    waiter.served.set()
                else:
                    self._queue(waiter)
            self._assign()

    def give_back(self, member: PoolWorker, well: bool = True) -> None:
        """The worker is free again. ``well``: it did what it was asked, and its GPU is beyond doubt."""
        with self._lock:
            if well:
                self._failed.pop(member.place, None)
            if member in self._busy:  # else its node went away meanwhile
                self._busy.discard(member)
                self._idle.append(member)
            self._assign()

    def lost(self, member: PoolWorker) -> None:
        """The worker is dead, or must not be used again."""
        self._stop(member)
        with self._lock:
            self._busy.discard(member)
            self._assign()

    def blame(self, place: WorkerPlace, experiment: str, cause: str) -> None:
        """An experiment failed at ``place`` and went well elsewhere.

        Too many of them one after another, and the GPU is set aside, unless it is the last one.
        """
        with self._lock:
            self._failed[place].add(experiment)
            num_failed = len(self._failed[place])
            if num_failed < MAX_FAILURES_IN_A_ROW or place in self._set_aside or self._num_usable() <= 1:
                return
            self._set_aside.add(place)
            for member in [m for m in self._idle if m.place == place]:
                self._idle.remove(member)
                self._held.append(member)
        self._on_trouble(f"{place} is set aside: {num_failed} experiments failed there in a row; the last: {cause}")

    def acquit(self, places: Iterable[WorkerPlace], experiment: str) -> None:
        """It was the experiment, not the GPUs."""
        with self._lock:
            for place in places:
                self._failed[place].discard(experiment)

    def begin_no_more(self) -> None:
        """Whoever waits, or comes from now on, gets no worker. Those who have one go on."""
        with self._lock:
            self._closed.set()
            for waiter in self._waiting:
                waiter.served.set()
            self._waiting = []

    def close(self) -> None:
        """Stop every worker."""
        self.begin_no_more()
        with self._lock:
            members = [*self._idle, *self._busy, *self._held]
            self._idle, self._busy, self._held = [], set(), []
        for member in members:
            self._stop(member)

    def _refresh(self) -> None:
        while not self._closed.wait(CAPACITY_SECONDS):
            try:
                there = self._survey()
            except Exception:  # the cluster is busy, or about to go: whoever runs something there will know
                log.exception("the cluster does not answer")
                continue
            with self._lock:
                self._there = there
                for members in (self._idle, self._held):
                    members[:] = [m for m in members if m.place.node in there.nodes]
                self._busy = {m for m in self._busy if m.place.node in there.nodes}
                self._set_aside = {p for p in self._set_aside if p.node in there.nodes}
                self._assign()

    # All below is called with the lock held

    def _queue(self, waiter: Waiter) -> None:
        bisect.insort(self._waiting, waiter, key=lambda w: w.rank)

    def _num_usable(self) -> int:
        return self._there.num_workers - len(self._set_aside)

    def _assign(self) -> None:
        """Free workers to those who wait; then as many new ones as are still wanted and allowed."""
        unserved: list[Waiter] = []
        anywhere = self._num_usable() <= 1
        for k, waiter in enumerate(self._waiting):
            if not self._idle:
                unserved += self._waiting[k:]
                break
            member = next((m for m in self._idle if anywhere or waiter.wants(m)), None)
            if member is None:
                unserved.append(waiter)
                continue
            waiter.member = member
            self._idle.remove(member)
            self._busy.add(member)
            waiter.served.set()
        self._waiting = unserved
        self._start_more(len(unserved))

    def _start_more(self, num: int) -> None:
        # A place that is set aside is kept occupied, as nothing else keeps its GPU from being given out again.
        num_there = len(self._idle) + len(self._busy) + len(self._held) + self._num_starting
        for _ in range(min(num - self._num_starting, self._there.num_workers - num_there)):
            self._num_starting += 1
            threading.Thread(target=self._start_one, daemon=True).start()

    def _start_one(self) -> None:
        try:
            member = self._start()
        except Exception as error:  # its node may be gone by now; the next look at the cluster starts another one
            log.exception("a worker did not start")
            self._did_not_start(one_line(error))
            return
        with self._lock:
            self._num_starting -= 1
            self._num_failed_starts = 0
            if not self._closed.is_set():
                (self._held if member.place in self._set_aside else self._idle).append(member)
                self._assign()
                return
        self._stop(member)

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
