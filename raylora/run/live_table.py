"""What is shown of a run while it goes on: a live table at a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from raylora.cluster.status import Status, WorkerProgress
from raylora.console import clock, make_console
from raylora.records import ResultRow
from raylora.run.notebook import NotebookDisplay
from raylora.storage.damage import is_noted

REFRESH_SECONDS = 0.5
"""Between two looks at the run's status."""


class LiveTable:
    """Shows, inside its ``with``, what every worker does and which experiments are finished.

    Args:
        num_total: experiments of the run.
        num_done: those of them that were done before it.
    """

    def __init__(self, num_total: int, num_done: int, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.num_total, self.num_done, self.num_failed = num_total, num_done, 0
        self.num_before = num_done
        self.started = time.monotonic()
        self._read: Callable[[], Status] | None = None
        self._row_came: Callable[[ResultRow], None] = self.finished
        self._look_lock = threading.Lock()
        self._num_notes = 0
        self._live: Live | NotebookDisplay | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._shown: dict[int, tuple[str, str]] = {}

    def connect(self, read: Callable[[], Status], row_came: Callable[[ResultRow], None]) -> None:
        """From now on show the status that ``read`` returns, and call ``row_came`` with each of its rows.

        Both are called in a thread of this object's own, and by ``look_once_more`` in the caller's.
        """
        self._row_came, self._read = row_came, read

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live = Live(self._table([]), console=self.console, refresh_per_second=4, transient=True)
        elif self.console.is_jupyter:
            self._live = NotebookDisplay(self._table([]))
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(timeout=5)
        if self._live:
            self._live.stop()

    def finished(self, row: ResultRow) -> None:
        """Count a row, and print its line."""
        self.num_done += 1
        self.num_failed += not row.ok
        self.console.print(f"[{self.num_done}/{self.num_total}] {describe(row)}", soft_wrap=True)

    def look_once_more(self) -> None:
        """Show what came since the last look. It is the last one."""
        self._stop.set()
        self._look()

    def _poll(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            self._look()

    def _look(self) -> None:
        with self._look_lock:
            try:
                status = self._read() if self._read else Status()
            except Exception:  # noqa: BLE001 - the cluster may be shutting down, and a missed look must not end the run
                return
            for note in (text for text in status.notes[self._num_notes :] if not is_noted(text)):
                self.console.print(f"Note: {note}", soft_wrap=True)
            self._num_notes = max(self._num_notes, len(status.notes))
            for values in status.rows:
                self._row_came(ResultRow(values))
            if self._live:
                self._live.update(self._table(status.progress))
            else:
                self._print_changes(status.progress)

    def _print_changes(self, progress: list[WorkerProgress]) -> None:
        for p in progress:
            if self._shown.get(p.worker) != (p.dataset, p.stage):
                self._shown[p.worker] = (p.dataset, p.stage)
                self.console.print(f"worker {p.worker}: {p.dataset} · {p.stage}", soft_wrap=True)

    def _table(self, progress: list[WorkerProgress]) -> Table:
        elapsed = time.monotonic() - self.started
        num_new = self.num_done - self.num_before
        estimate = f", about {clock(elapsed / num_new * (self.num_total - self.num_done))} left" if num_new else ""
        table = Table(
            caption=f"{self.num_done} of {self.num_total} done, {self.num_failed} failed, {clock(elapsed)}{estimate}"
        )
        for name in ("worker", "dataset", "stage", "progress", "speed", "left"):
            table.add_column(name, justify="left" if name in {"dataset", "stage"} else "right")
        for p in progress:
            seconds = max(time.time() - p.started, 1e-3)
            rate = p.done / seconds
            speed, remaining = (f"{rate:.1f}/s", clock((p.total - p.done) / rate)) if rate else ("", "")
            table.add_row(str(p.worker), p.dataset, p.stage, f"{p.done}/{p.total}", speed, remaining)
        return table


def describe(row: ResultRow) -> str:
    """An experiment's result in one line: accuracy and its change, losses, time; or the cause of its failure."""
    v = row.values
    if not row.ok:
        return f"{v['dataset']}: FAILED: {v['error']}"
    parts = []
    if v.get("overall_accuracy") is not None:
        parts.append(f"accuracy {v['overall_accuracy']:.3f} ({v['accuracy_change']:+.3f})")
    if v.get("balanced_accuracy_change") is not None:
        parts.append(f"balanced {v['balanced_accuracy_change']:+.3f}")
    if v.get("correct_probability_change") is not None:
        parts.append(f"probability of the right choice {v['correct_probability_change']:+.4f}")
    if v.get("train_final_loss") is not None:
        parts.append(f"loss {v['train_initial_loss']:.2f} to {v['train_final_loss']:.2f}")
    if v.get("total_seconds") is not None:
        parts.append(clock(v["total_seconds"]))
    note = f" ({v['train_notes']})" if v.get("train_notes") else ""
    return f"{v['dataset']}: {', '.join(parts) or 'done'}{note}"
