"""One run at a time in a folder of an object store, where no file can be locked.

The holder of ``run.lock/<number>`` is the one who made it, by a write that fails where it is there already, as long as
no higher number is. It renews its object every ``RENEW_SECONDS``. Who comes next watches: an object that is renewed is
a run that lives; one that is not for ``KEEP_SECONDS`` is a dead one's, and the next number may be made. Nobody's clock
is compared with anybody else's, and a run that slept too long finds a higher number and stops.
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

from raylora.errors import RemoteError, UserError
from raylora.storage.objects import Remote

RENEW_SECONDS = 10.0
KEEP_SECONDS = 60.0
FOLDER = "run.lock"
TAKEN_OVER = "another run took it over"


class RunLock:
    """The right to write below ``remote``.

    Args:
        number: of the lock that another process of the same run holds; 0 where this one will.
    """

    def __init__(self, remote: Remote, number: int = 0) -> None:
        self._remote = remote
        self.number = number
        self._is_elsewhere = number > 0
        self._state: dict[str, Any] = {
            "owner": f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
            "process": [_process_space(), os.getpid()],
            "token": uuid.uuid4().hex,
            "renewals": 0,
            "released": False,
        }
        self._over = threading.Event()
        self._lost = ""

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Take it, renew it until the end, let go.

        Raises:
            UserError: another run has it and lives. That is seen within ``RENEW_SECONDS``; a dead one's is waited for.
        """
        self._acquire()
        thread = threading.Thread(target=self._keep_renewing, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._over.set()
            thread.join()
            with contextlib.suppress(RemoteError):
                self._release()

    def check(self) -> None:
        """To be called before something is written.

        Raises:
            UserError: it was lost; another run may be writing.
        """
        if self._is_elsewhere and self._highest()[0] != self.number:
            self._lost = TAKEN_OVER
        if self._lost:
            raise UserError(f"--output {self._remote.place}: {self._lost}: this run stops, what is finished is kept")

    def _acquire(self) -> None:
        seen: tuple[int, bytes] | None = None
        since = time.monotonic()
        while True:
            number, data = self._highest()
            if number == 0 or _is_free(data) or (seen == (number, data) and time.monotonic() - since > KEEP_SECONDS):
                self.number = number + 1
                if self._remote.create(self._name(self.number), self._data()):
                    return
                seen = None
            elif seen is None or seen[0] != number:
                seen, since = (number, data), time.monotonic()
            elif seen != (number, data):
                owner = _parsed(data).get("owner", "unknown")
                raise UserError(
                    f"--output {self._remote.place}: another run is writing here ({owner}): wait for it, or give "
                    "another --output"
                )
            time.sleep(RENEW_SECONDS / 10)

    def _keep_renewing(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(RENEW_SECONDS):
            try:
                if self._highest()[0] != self.number:
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
        if self._lost or self._highest()[0] != self.number:
            return
        self._state["released"] = True
        # The object stays, so that no number is ever given twice; those before it are of no use any more.
        self._remote.write(self._name(self.number), self._data())
        for name in self._remote.list(FOLDER):
            if name < self._name(self.number):
                self._remote.remove(name)

    def _highest(self) -> tuple[int, bytes]:
        numbers = [int(n.rpartition("/")[2]) for n in self._remote.list(FOLDER) if n.rpartition("/")[2].isdecimal()]
        number = max(numbers, default=0)
        return number, (self._remote.read(self._name(number)) or b"") if number else b""

    def _data(self) -> bytes:
        return json.dumps(self._state).encode()

    @staticmethod
    def _name(number: int) -> str:
        return f"{FOLDER}/{number:08d}"


def _is_free(data: bytes) -> bool:
    """Whether its holder let go, or was a process of this machine that is no more."""
    state = _parsed(data)
    if state.get("released"):
        return True
    process = state.get("process")
    if not isinstance(process, list) or len(process) != 2 or process[0] != _process_space():
        return False
    return not Path(f"/proc/{process[1]}").is_dir()


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _process_space() -> str:
    """What two processes share only if they see each other: this boot of the machine, and the space of process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:  # no Linux: nobody is known to be dead, and a lease runs out
        return uuid.uuid4().hex
