"""Who works: the workers there are, who waits for one, and the GPUs that are not to be trusted. Knows nothing of Ray.

A thread that has work waits in ``take`` for a worker, in order of rank, and hands it back with ``give_back``, or says
that it is ``lost``. Workers are started as they are wanted and as there are GPUs for them, so that a GPU that joins
while a run goes on is used, and one that leaves is not waited for.
"""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

log = logging.getLogger("raylora.crew")

REFRESH_SECONDS = 2.0
"""How often somebody who waits looks whether GPUs came or went."""
MAX_FAILURES_IN_A_ROW = 3
"""So many different experiments that failed on a GPU one after another, and did not fail elsewhere, condemn it."""


@dataclass(frozen=True)
class Place:
    """A GPU, or a machine without any: what it says of itself where people read it, and what Ray calls it."""

    host: str
    gpu: str
    node: str

    def __str__(self) -> str:
        return f"GPU {self.gpu} of {self.host}" if self.gpu else self.host


@dataclass(eq=False)
class Member:
    """A worker that was started, and where."""

    worker: Any
    place: Place


@dataclass(eq=False)
class _Waiter:
    rank: float
    avoid: Place | None
    arrived: threading.Event = field(default_factory=threading.Event)
    member: Member | None = None


class Crew:
    """All workers of a run.

    Args:
        start: starts a worker and says where it is. Called in a thread of its own; may take minutes, and may raise.
        stop: ends a worker, whatever it is doing.
        num_wanted: how many workers there may be now; asked often.
    """

    def __init__(
        self, start: Callable[[], Member], stop: Callable[[Member], None], num_wanted: Callable[[], int]
    ) -> None:
        self._start, self._stop, self._num_wanted = start, stop, num_wanted
        self._lock = threading.Lock()
        self._waiting: list[_Waiter] = []
        self._idle: list[Member] = []
        self._busy: set[Member] = set()
        self._held: list[Member] = []
        self._num_starting = 0
        self._failed: dict[Place, set[str]] = defaultdict(set)
        self.set_aside: dict[Place, str] = {}
        """GPUs that are used no more, each with the last thing that went wrong there."""

    def take(self, rank: float = 0.0, avoid: Place | None = None) -> Member:
        """Wait for a worker; those of a lower rank come first. ``avoid``: one elsewhere, if there is an elsewhere."""
        waiter = _Waiter(rank, avoid)
        with self._lock:
            self._waiting.append(waiter)
            self._assign()
        while not waiter.arrived.wait(REFRESH_SECONDS):
            with self._lock:
                self._assign()
        assert waiter.member
        return waiter.member

    def take_spare(self) -> Member | None:
        """A worker that nobody else wants now; None where there is none. One may be started for the next call."""
        with self._lock:
            if self._waiting:
                return None
            if self._idle:
                member = self._idle.pop()
                self._busy.add(member)
                return member
            self._start_up_to(1)
        return None

    def give_back(self, member: Member, well: bool = True) -> None:
        """The worker is free again. ``well``: it did what it was asked, and its GPU is beyond doubt."""
        with self._lock:
            if well:
                self._failed.pop(member.place, None)
            self._busy.discard(member)
            self._idle.append(member)
            self._assign()

    def lost(self, member: Member) -> None:
        """The worker is dead, or must not be used again."""
        self._stop(member)
        with self._lock:
            self._busy.discard(member)
            self._assign()

    def blame(self, place: Place, experiment: str, cause: str) -> None:
        """An experiment failed at ``place`` and went well elsewhere, or was not tried there.

        Too many of them one after another, and the GPU is set aside, unless it is the last one.
        """
        with self._lock:
            self._failed[place].add(experiment)
            if len(self._failed[place]) < MAX_FAILURES_IN_A_ROW or place in self.set_aside or self._num_usable() <= 1:
                return
            self.set_aside[place] = cause
            log.error("%s is set aside: %d experiments failed there in a row", place, len(self._failed[place]))
            for member in [m for m in self._idle if m.place == place]:
                self._idle.remove(member)
                self._held.append(member)

    def acquit(self, places: Iterable[Place], experiment: str) -> None:
        """It was the experiment, not the GPUs."""
        with self._lock:
            for place in places:
                self._failed[place].discard(experiment)

    def close(self) -> None:
        with self._lock:
            members = [*self._idle, *self._busy, *self._held]
            self._idle, self._busy, self._held = [], set(), []
        for member in members:
            self._stop(member)

    # All below is called with the lock held

    def _num_usable(self) -> int:
        return self._num_wanted() - len(self.set_aside)

    def _assign(self) -> None:
        """Free workers to those who wait; then as many new ones as are still wanted and allowed."""
        for waiter in sorted(self._waiting, key=lambda w: w.rank):
            there = [m for m in self._idle if m.place != waiter.avoid]
            if not there and self._num_usable() <= 1:
                there = self._idle
            if there:
                waiter.member = there[0]
                self._idle.remove(there[0])
                self._busy.add(there[0])
                self._waiting.remove(waiter)
                waiter.arrived.set()
        self._start_up_to(len(self._waiting))

    def _start_up_to(self, num: int) -> None:
        # A place that is set aside is kept occupied, as nothing else keeps its GPU from being given out again.
        num_there = len(self._idle) + len(self._busy) + len(self._held) + self._num_starting
        for _ in range(min(num - self._num_starting, self._num_wanted() - num_there)):
            self._num_starting += 1
            threading.Thread(target=self._start_one, daemon=True).start()

    def _start_one(self) -> None:
        member = None
        try:
            member = self._start()
        except Exception:
            log.exception("a worker did not start")
        with self._lock:
            self._num_starting -= 1
            if member:
                (self._held if member.place in self.set_aside else self._idle).append(member)
                self._assign()
