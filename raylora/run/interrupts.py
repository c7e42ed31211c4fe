"""Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from rich.console import Console

GRACE_SECONDS = 20
"""After Ctrl-C, the time in which experiments that are nearly done may finish."""


def exit_on_sigterm() -> None:
    """So that what is running is stopped in order. For the main thread: no other may handle signals."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


class Interrupts:
    """Ctrl-C, once: nothing new is begun, and what is nearly done may finish. Twice, or some time later: stop now."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.begin_no_more: Callable[[], None] = lambda: None
        self.came = False
        self._over = threading.Event()
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        self._former: Any = None

    def __enter__(self) -> Interrupts:
        if self._in_main_thread:  # no other may handle signals
            self._former = signal.signal(signal.SIGINT, self._handle)
            exit_on_sigterm()  # again: as it starts Ray puts a handler of its own in its place, which aborts
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._in_main_thread:
            signal.signal(signal.SIGINT, self._former)

    def _handle(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        # Not from in here: the signal may have come in the middle of a call to Ray.
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self._console.print(f"Stopping: what is done within {GRACE_SECONDS} s is kept; Ctrl-C again stops now.")
        self.begin_no_more()
        if not self._over.wait(GRACE_SECONDS):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
