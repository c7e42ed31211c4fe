"""A light process beside a run: it outlives the run's Ray, and sees to what is left when that is gone.

Ray's core ends the process that uses it, with exit code 1 and without an exception, when the raylet, the dashboard's
agent or the ``gcs_server`` die (of the latter it takes a minute to notice). So a command that uses Ray forks before it
imports anything heavy. Its child plans, starts Ray and shows rows, in a session of its own. The command, of 40 MB,
waits for it, passes signals on, and looks after Ray's processes:

    the command: waits, signals, the last line  --fork-->  the run: plans, talks to Ray, prints
           ^                                                  |
           '----- what it does now, and what to write --------'

If the child ends without having said so, the command ends what is left of its session, has the tables written from all
finished rows, and says what happened. Does not import Ray.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import resource
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from typing import Any, Protocol

import psutil

from raylora.cluster.ray_folder import delete_folder
from raylora.console import quietly
from raylora.errors import StoppedError, one_line

LOOK_SECONDS = 0.5
"""Between two looks at the run's process and at Ray's."""
LOST_SECONDS = 3.0
"""A run whose Ray has lost a process may end by itself within this time; then it is ended."""
START_SECONDS = 55.0
"""One try of starting Ray takes 4 to 8 s, and where a node is slow to come Ray gives it up after 30 s. What takes
longer than this hangs."""
TERM_SECONDS = 30.0
"""After SIGTERM the run has this time to write its tables; then they are written here."""
EXIT_SECONDS = 20.0
"""A run that has said its exit code may take this time to end its process."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
RAY_PROCESSES = {"raylet": "raylet", "gcs_server": "gcs_server", "ray::DashboardAgent": "dashboard's agent"}
"""The processes that a Ray cannot do without, by the first word of their command lines without its folders."""


class Remains(Protocol):
    """What a run leaves to be done, should its process be ended. It is pickled."""

    def write(self) -> None:
        """Write the tables from all finished rows. May raise OSError and RayloraError."""


_link: Connection | None = None
"""In the process of a watched run: the way to its watcher."""


def keep(remains: Remains) -> None:
    """Tell the watcher what to do if this process ends before its time."""
    if _link is not None:
        _tell("remains", zlib.compress(pickle.dumps(remains), 1))


def tell_ray_starts(logs: str) -> None:
    """Tell the watcher that a try of starting Ray begins.

    Args:
        logs: the folder where the user finds why that does not go well.
    """
    _tell("starting", logs)


@contextlib.contextmanager
def ray_is_used() -> Iterator[None]:
    """Inside, this process handles signals by itself, and its Ray is watched."""
    _tell("running", True)
    try:
        yield
    finally:
        _tell("running", False)


def _tell(name: str, value: Any) -> None:
    if _link is not None:
        with contextlib.suppress(OSError):  # the watcher is gone, and this process will be
            _link.send((name, value))


def can_be_watched() -> bool:
    """Whether this process may fork: not where libraries have threads, as in a notebook or a test."""
    return not {"torch", "ray"} & set(sys.modules)


def watched(work: Callable[[], int]) -> int:
    """Do ``work`` in a child process, and watch over it. Returns its exit code, in both processes.

    Raises:
        StoppedError: the child was ended by Ray or from outside.
        KeyboardInterrupt, SystemExit: it was ended here, after Ctrl-C, or with 143 after SIGTERM.
    """
    ours, theirs = Pipe(duplex=False)
    for stream in (sys.stdout, sys.stderr):
        quietly(stream.flush)
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until both processes have their handlers
    command = os.getpid()
    child = os.fork()
    if not child:
        ours.close()
        return _run_watched(theirs, command, work)
    theirs.close()
    return Watcher(child, ours).wait()


def _run_watched(link: Connection, command: int, work: Callable[[], int]) -> int:
    global _link
    from raylora.storage import run_lock

    _link = link
    run_lock.shown_process = command
    os.setsid()  # a terminal's signals reach the command alone, which passes them on once
    _end_with(command)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # Ray's processes inherit that
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = 1
    try:
        code = work()
    finally:
        for stream in (sys.stdout, sys.stderr):
            quietly(stream.flush)
        _tell("ended", code)
    return code


def _end_with(command: int) -> None:
    """Have the system kill this process when the command is killed; Linux alone does so."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != command:  # it died before that
            os._exit(1)


class Watcher:
    """Waits for a run's process.

    Args:
        child: its process id, and its session's.
        link: what it says is read from here.
    """

    def __init__(self, child: int, link: Connection) -> None:
        self._child, self._link = child, link
        self._said: dict[str, Any] = {}
        self._said_at: dict[str, float] = {}
        self._status: int | None = None
        self._asked: dict[int, float] = {}  # when each signal came first
        self._num_interrupts = 0
        self._of_ray: dict[str, psutil.Process] = {}
        self._lost: list[str] = []
        self._lost_at = 0.0
        self._cause = ""
        self._logs = ""
        """The folder of its Ray's logs, once that starts."""

    def wait(self) -> int:
        """See ``watched``."""
        former = {number: signal.signal(number, self._handle) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            while not self._is_over():
                self._look()
            if "ended" in self._said:
                self._wait_for_exit()
                return int(self._said["ended"])
            self._look_at_ray()
        finally:
            for number, handler in former.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
        # From here on a signal ends this process, as one whose store does not answer may wait for long; but not that of
        # a terminal that is gone.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self._end_session()
        if self._asked:  # of a Ray that broke down by itself the logs may say why
            delete_folder(self._logs)
        self._write_remains()
        if signal.SIGTERM in self._asked:
            sys.exit(128 + signal.SIGTERM)
        if signal.SIGINT in self._asked:
            raise KeyboardInterrupt
        raise StoppedError(self._why())

    def _handle(self, number: int, _: object) -> None:
        """Pass a signal on; a run that does not use Ray yet is ended, as it has begun nothing."""
        if number == signal.SIGHUP:  # the terminal is gone, and the run goes on
            return
        self._num_interrupts += number == signal.SIGINT
        is_new = number not in self._asked
        self._asked.setdefault(number, time.monotonic())
        if self._status is not None or "ended" in self._said:
            return
        if not self._said.get("running") or self._num_interrupts > 2:
            os.kill(self._child, signal.SIGKILL)
        elif is_new or number == signal.SIGINT:  # SIGTERM once: a second one would break off the last writing
            os.kill(self._child, number)

    def _is_over(self) -> bool:
        """Read what the run says, for ``LOOK_SECONDS`` at most. Whether it has ended, or is about to."""
        try:
            if self._link.poll(LOOK_SECONDS):
                name, value = self._link.recv()
                self._said[name], self._said_at[name] = value, time.monotonic()
                if name == "starting":
                    self._logs = value
                if name == "running":
                    self._said.pop("starting", None)
                    self._of_ray = {}
                return name == "ended"
        except (EOFError, OSError):
            return True
        if self._status is None:
            pid, status = os.waitpid(self._child, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def _look(self) -> None:
        """End the run where it will not end by itself."""
        now = time.monotonic()
        if self._said.get("running"):
            self._look_at_ray()
            if self._lost and now - self._lost_at > LOST_SECONDS:
                self._cause = self._why_ray_broke()
                os.kill(self._child, signal.SIGKILL)
        elif "starting" in self._said and now - self._said_at["starting"] > START_SECONDS:
            self._cause = f"Ray does not start on this machine: it hangs ({_where_to_look(self._said['starting'])})."
            os.kill(self._child, signal.SIGKILL)
        if now - self._asked.get(signal.SIGTERM, now) > TERM_SECONDS:
            os.kill(self._child, signal.SIGKILL)

    def _look_at_ray(self) -> None:
        if not self._said.get("running"):
            return
        if len(self._of_ray) < len(RAY_PROCESSES) and not self._lost:
            self._of_ray |= {name: process for name, process in self._find_ray().items() if name not in self._of_ray}
        if lost := [name for name, process in self._of_ray.items() if not _is_alive(process)]:
            self._lost_at = self._lost_at or time.monotonic()
            self._lost = self._lost or lost

    def _find_ray(self) -> dict[str, psutil.Process]:
        """The processes of the run's own Ray; none where it has joined a cluster."""
        found: dict[str, psutil.Process] = {}
        for process in self._session():
            with contextlib.suppress(psutil.Error):
                title = next(iter(process.cmdline()), "").strip()
                name = RAY_PROCESSES.get(title.rpartition("/")[2])
                if name and _is_alive(process):
                    found[name] = process
        return found

    def _session(self) -> list[psutil.Process]:
        """What the run's process started, however it was started, and the process itself: they are of one session."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if os.getsid(pid) == self._child:
                    found.append(psutil.Process(pid))
        return found

    def _wait_for_exit(self) -> None:
        deadline = time.monotonic() + EXIT_SECONDS
        while self._status is None and time.monotonic() < deadline:
            pid, status = os.waitpid(self._child, os.WNOHANG)
            self._status = status if pid else None
            if not pid:
                time.sleep(0.01)
        self._end_session()

    def _end_session(self) -> None:
        """Kill what is left of the session, and wait for the child."""
        for _ in range(50):
            left = [process for process in self._session() if _is_alive(process)]
            if not left:
                break
            for process in left:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            time.sleep(0.1)
        if self._status is None:
            _, self._status = os.waitpid(self._child, 0)

    def _write_remains(self) -> None:
        if "remains" not in self._said:
            return
        try:
            remains: Remains = pickle.loads(zlib.decompress(self._said["remains"]))  # the child's, not a user's
            remains.write()
        except Exception as error:  # noqa: BLE001 - of pandas, pyarrow or a store: the last line is still to be said
            quietly(print, f"raylora: the tables could not be written: {one_line(error)}", file=sys.stderr)

    def _why(self) -> str:
        if self._cause:
            return self._cause
        code = os.waitstatus_to_exitcode(self._status or 0)
        if code == -signal.SIGKILL:  # not Ray's own doing, and not done here
            return "The run's process was killed by SIGKILL, perhaps for memory."
        if self._said.get("running"):
            return self._why_ray_broke()
        if "starting" in self._said:
            return f"Ray does not start on this machine: it ended this run ({_where_to_look(self._said['starting'])})."
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"The run's process {what} before its end."

    def _why_ray_broke(self) -> str:
        if not self._lost:
            return "Ray broke down: it ended the run's process."
        # Where all are gone, which was the first is not known any more.
        lost = "processes" if len(self._lost) == len(RAY_PROCESSES) else " and its ".join(self._lost)
        return f"Ray broke down: its {lost} ended{_suspect()}."


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def _suspect() -> str:
    """A limit of this shell that Ray often ends at: its processes map much more memory than they use."""
    address_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_bytes == resource.RLIM_INFINITY:
        return ""
    return f", perhaps at this shell's limit: ulimit -v {address_bytes // 1024}; try ulimit -v unlimited"


def _where_to_look(logs: str) -> str:
    return f"`ulimit -a` shows this shell's limits, `free` the memory; its logs: {logs}"
