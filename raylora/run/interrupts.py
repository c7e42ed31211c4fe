"""Ctrl-C and SIGTERM during a run."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from rich.console import Console

GRACE_SECONDS = 20
"""After Ctrl-C, the time in which experiments that are nearly done may finish."""


Handler = Callable[[int, FrameType | None], Any] | int | None


@contextlib.contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises ``SystemExit(143)`` (128 + 15), so that ``finally`` blocks stop what is running."""
    with _handling(signal.SIGTERM, lambda *_: sys.exit(143)):
        yield


@contextlib.contextmanager
def _handling(number: signal.Signals, handler: Handler) -> Iterator[None]:
    """Inside, a signal has this handler. Does nothing outside the main thread, as only that may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(number, handler)
    try:
        yield
    finally:
        # None: the handler before was set by C code, and Python cannot set it again.
        signal.signal(number, signal.SIG_DFL if former is None else former)


class Interrupts:
    """After Ctrl-C nothing new is begun, and experiments may finish; all stops ``GRACE_SECONDS`` later, or at a second.

    Attributes:
        begin_no_more: called at the first Ctrl-C, in a thread of its own.
        came: whether Ctrl-C was pressed.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self.begin_no_more: Callable[[], None] = lambda: None
        self.came = False
        self._over = threading.Event()
        self._handlers = contextlib.ExitStack()

    def __enter__(self) -> Interrupts:
        self._handlers.enter_context(_handling(signal.SIGINT, self._handle))
        self._handlers.enter_context(exit_on_sigterm())  # when Ray started, it set a handler that aborts
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._handlers.close()

    def _handle(self, *_: object) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True
        # In a thread: the signal may have interrupted a call to Ray in this one.
        threading.Thread(target=self._finish, daemon=True).start()

    def _finish(self) -> None:
        self._console.print(f"Stopping: what is done within {GRACE_SECONDS} s is kept; Ctrl-C again stops now.")
        self.begin_no_more()
        if not self._over.wait(GRACE_SECONDS):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
