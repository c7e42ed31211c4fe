"""A lock for one run at a time in a folder of an object store, where files cannot be locked.

The lock is a row of numbered objects, ``run.lock/00000001`` and on. The run that created the highest number holds it;
creating fails if the object exists, so that of several runs which try the same number one succeeds. The holder
rewrites its object every ``RENEW_SECONDS``. Another run that wants the lock watches this object. If it changes, the
holder is alive and the other run gives up. If it stays the same for ``KEEP_SECONDS``, the holder is taken for dead and
the other run creates the next number. Both intervals are measured by one clock each, so machines' clocks may differ.
A holder that was suspended for longer than that finds the higher number and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raylora.errors import LockLostError, RemoteError, UserError
from raylora.storage.objects import Remote

RENEW_SECONDS = 10.0
KEEP_SECONDS = 60.0
"""A lock that is not renewed for so long, six times in a row, is free."""
FOLDER = "run.lock"
TAKEN_OVER = "another run took it over"
shown_process: int | None = None
"""The process id of the command, as its user knows it, where this process is another one (``raylora.cluster.watcher``).
"""


def this_run() -> str:
    """This run, as others that want the same output are told of it."""
    since = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    return f"process {shown_process or os.getpid()} on {socket.gethostname()} since {since}"


class RunLock:
    """The right to write below ``remote``, which one process at a time can hold.

    Args:
        number: of the lock that another process of the same run holds; 0 where this one will, or none does.
    """

    def __init__(self, remote: Remote, number: int = 0) -> None:
        self._remote = remote
        self.number = number
        self._state: dict[str, Any] = {
            "owner": this_run(),
            "process": [_process_space(), os.getpid()],
            "token": uuid.uuid4().hex,
            "renewals": 0,
            "released": False,
        }
        self._ended = threading.Event()
        self._lost = ""
        """Why it was lost; empty while it is held."""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Acquire the lock, renew it in a thread, release it at the end.

        A lock of a dead run is waited for, ``KEEP_SECONDS`` or, if it was a process of this machine, not at all.

        Raises:
            UserError: another run holds it and is alive, which is seen after ``RENEW_SECONDS`` at most.
            RemoteError: the object store does not answer.
        """
        self._acquire()
        thread = threading.Thread(target=self._keep_renewing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            with contextlib.suppress(RemoteError):
                self._release()

    def check(self) -> None:
        """To be called before something is written. Asks the store: whoever was suspended cannot know it otherwise.

        Raises:
            LockLostError: another run may be writing.
            RemoteError: the object store does not answer.
        """
        if self.number and not self._lost and self._highest_number() != self.number:
            self._lost = TAKEN_OVER
        if self._lost:
            raise LockLostError(f"--output {self._remote.place}", f"{self._lost}: this run stops")

    def _acquire(self) -> None:
        seen: tuple[int, bytes] | None = None
        first_seen = time.monotonic()
        while True:
            number, data = self._read_highest()
            is_expired = seen == (number, data) and time.monotonic() - first_seen > KEEP_SECONDS
            if number == 0 or _is_free(data) or is_expired:
                self.number = number + 1
                if self._remote.create(self._name(self.number), self._data()):
                    return
                seen = None  # another run was faster: watch its lock
            elif seen is None or seen[0] != number:
                seen, first_seen = (number, data), time.monotonic()
            elif seen != (number, data):  # it was renewed
                owner = _parse_state(data).get("owner", "unknown")
                raise UserError(
                    f"--output {self._remote.place}: another run is writing here ({owner}): wait for it, or give "
                    "another --output"
                )
            time.sleep(RENEW_SECONDS / 10)

    def _keep_renewing(self) -> None:
        renewed = time.monotonic()
        while not self._ended.wait(RENEW_SECONDS):
            try:
                if self._highest_number() != self.number:
                    self._lost = TAKEN_OVER
                    return
                self._state["renewals"] += 1
                self._remote.write(self._name(self.number), self._data())
                renewed = time.monotonic()
            except RemoteError as error:
                if time.monotonic() - renewed > KEEP_SECONDS:
                    self._lost = f"its lock could not be renewed ({error.strerror})"
                    return

    def _release(self) -> None:
        if self._lost or self._highest_number() != self.number:
            return
        self._state["released"] = True
        # The object stays, so that no number is used twice; lower numbers are of no use any more.
        self._remote.write(self._name(self.number), self._data())
        for name in self._remote.list(FOLDER):
            if name < self._name(self.number):
                self._remote.remove(name)

    def _read_highest(self) -> tuple[int, bytes]:
        """The highest number and its object's content; 0 where there is none yet."""
        number = self._highest_number()
        return number, (self._remote.read(self._name(number)) or b"") if number else b""

    def _highest_number(self) -> int:
        names = [path.rpartition("/")[2] for path in self._remote.list(FOLDER)]
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def _data(self) -> bytes:
        return json.dumps(self._state).encode()

    @staticmethod
    def _name(number: int) -> str:
        return f"{FOLDER}/{number:08d}"


def _is_free(data: bytes) -> bool:
    """Whether the holder released the lock, or was a process of this machine that has ended."""
    state = _parse_state(data)
    if state.get("released"):
        return True
    process = state.get("process")
    if not isinstance(process, list) or len(process) != 2 or process[0] != _process_space():
        return False
    return not Path(f"/proc/{process[1]}").is_dir()


def _parse_state(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _process_space() -> str:
    """Where a process id means the same process: this boot of this machine, and its namespace of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # not Linux: no process is known to be dead, and its lock expires
        return uuid.uuid4().hex
