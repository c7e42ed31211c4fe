"""The console that all of raylora prints with, and durations as text."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from raylora.texts import shown_line


class LineConsole(Console):
    """A console in which every text, be it a line or a table's cell, is a single line that may be shown."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(shown_line(text), **options)


def make_console(**options: Any) -> Console:
    """A console that prints names as they are: ``[x]`` or ``:x:`` in a dataset's name is no markup and no emoji.

    No name and no error can break a line, move the cursor or show a secret.
    """
    return LineConsole(highlight=False, markup=False, emoji=False, **options)


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print what the user is to know, and what stops nothing, a line each."""
    for note in notes:
        console.print(f"Note: {note}", soft_wrap=True)


def quietly(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Call something that prints; where nobody reads it any more, that is no error."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        call(*args, **options)


class LastingStream:
    """A standard stream whose reader may go away: a terminal that is closed, a pipe to ``head``, a log on a full disk.

    What cannot be written is lost, and the program goes on.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._let_go(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._let_go(error)

    def _let_go(self, error: OSError) -> None:
        """Write to nowhere from now on, so that what is in the stream's buffer raises nothing later."""
        if error.errno in {errno.EPIPE, errno.EIO}:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def outlasting_terminal() -> Iterator[None]:
    """Inside, the program goes on when the terminal that it was started at goes away, or nobody reads its output."""
    streams = sys.stdout, sys.stderr
    is_main = threading.current_thread() is threading.main_thread()
    former = signal.getsignal(signal.SIGHUP)
    if is_main and former == signal.SIG_DFL:  # else it is ignored, as by nohup, or somebody's own
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    sys.stdout, sys.stderr = (stream and LastingStream(stream) for stream in streams)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream:
                quietly(stream.flush)
        sys.stdout, sys.stderr = streams
        if is_main and former == signal.SIG_DFL:
            signal.signal(signal.SIGHUP, former)


def clock(seconds: float) -> str:
    """A duration as text: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
