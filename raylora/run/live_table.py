"""Watching a run: a live table at a terminal, plain lines elsewhere."""

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

REFRESH_SECONDS = 0.5


class LiveTable:
    """Shows what every worker does and what is finished, from its ``with`` to the end of it."""

    def __init__(self, num_total: int, num_done: int, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.num_total, self.num_done, self.num_failed = num_total, num_done, 0
        self.num_before = num_done
        self.started = time.monotonic()
        self._read: Callable[[], Status] | None = None
        self._row_came: Callable[[ResultRow], None] = self.finished
        self._looking = threading.Lock()
        self._num_notes = 0
        self._live: Live | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._shown: dict[int, tuple[str, str]] = {}

    def connect(self, read: Callable[[], Status], row_came: Callable[[ResultRow], None] | None = None) -> None:
        """``read`` returns what the run's board shows from now on; ``row_came`` is told of its rows, one by one."""
        self._row_came = row_came or self.finished
        self._read = read

    def __enter__(self) -> LiveTable:
        if self.console.is_terminal:
            self._live = Live(self._table([]), console=self.console, refresh_per_second=4, transient=True)
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
        """One line for each row that is done."""
        self.num_done += 1
        self.num_failed += not row.ok
        self.console.print(f"[{self.num_done}/{self.num_total}] {describe(row)}", soft_wrap=True)

    def look_once_more(self) -> None:
        """What came since the last look. Nothing is looked at after it."""
        self._stop.set()
        self._look()

    def _poll(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            self._look()

    def _look(self) -> None:
        with self._looking:
            try:
                status = self._read() if self._read else Status()
            except Exception:  # noqa: BLE001 - the cluster may be going away; what is shown is not worth failing for
                return
            for values in status.rows:
                self._row_came(ResultRow(values))
            for note in status.notes[self._num_notes :]:
                self.console.print(f"Note: {note}", soft_wrap=True)
            self._num_notes = max(self._num_notes, len(status.notes))
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
        fresh = self.num_done - self.num_before
        left = f", about {clock(elapsed / fresh * (self.num_total - self.num_done))} left" if fresh else ""
        table = Table(
            caption=f"{self.num_done} of {self.num_total} done, {self.num_failed} failed, {clock(elapsed)}{left}"
        )
        for name in ("worker", "dataset", "stage", "progress", "speed", "left"):
            table.add_column(name, justify="left" if name in {"dataset", "stage"} else "right")
        for p in progress:
            seconds = max(time.time() - p.started, 1e-3)
            rate = p.done / seconds
            left = clock((p.total - p.done) / rate) if rate else ""
            cells = (str(p.worker), p.dataset, p.stage, f"{p.done}/{p.total}", f"{rate:.1f}/s" if rate else "", left)
            table.add_row(*cells)
        return table


def describe(row: ResultRow) -> str:
    """What came of an experiment, in one line."""
    v = row.values
    if not row.ok:
        return f"{v['dataset']}: FAILED: {v['error']}"
    parts = []
    if v.get("overall_accuracy") is not None:
        parts.append(f"accuracy {v['overall_accuracy']:.3f} ({v['accuracy_change']:+.3f})")
    if v.get("train_final_loss") is not None:
        parts.append(f"loss {v['train_initial_loss']:.2f} to {v['train_final_loss']:.2f}")
    if v.get("total_seconds") is not None:
        parts.append(clock(v["total_seconds"]))
    return f"{v['dataset']}: {', '.join(parts) or 'done'}"
