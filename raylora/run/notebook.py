"""Progress in a notebook's cell: one text that is replaced.

Rich's own way wants ipywidgets, and without them each look at the run is a copy of the table more.
"""

from __future__ import annotations

import io
from typing import Any

from rich.table import Table

from raylora.console import make_console

WIDTH = 100
"""Characters in a line: what a cell's output shows without wrapping at the usual size."""


class NotebookDisplay:
    """What ``rich.live.Live`` does at a terminal: shows a table, and takes it away at the end."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._handle: Any = None

    def start(self) -> None:
        from IPython.display import display

        self._handle = display(_as_text(self._table), raw=True, display_id=True)

    def update(self, table: Table) -> None:
        self._handle.update(_as_text(table), raw=True)

    def stop(self) -> None:
        self._handle.update({"text/plain": ""}, raw=True)


def _as_text(table: Table) -> dict[str, str]:
    """As plain text, so that no name in it is HTML."""
    console = make_console(file=io.StringIO(), width=WIDTH, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return {"text/plain": captured.get()}
