"""The console that all of raylora prints with, and durations as text."""

from __future__ import annotations

from collections.abc import Iterable
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


def clock(seconds: float) -> str:
    """A duration as text: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"
