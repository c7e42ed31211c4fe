"""A run from Python: ``raylora.run("folder", model=...)``, and what it leaves, as a notebook shows it."""

from __future__ import annotations

import math
import os
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Unpack

import pandas as pd

from raylora.config.keywords import FolderKeywords
from raylora.config.run import Config, load_config
from raylora.console import make_console, print_notes
from raylora.errors import UserError
from raylora.mmlu.paired import LETTER_MOVED
from raylora.planning.plan import find_files, make_plan
from raylora.report.findings import ranking
from raylora.report.page import write_report
from raylora.report.read_run import FinishedRun, load_run
from raylora.rows import load_results
from raylora.run.execute import run_plan
from raylora.run.pushes import Pushes
from raylora.storage.hub_names import PREFIX
from raylora.storage.places import location
from raylora.storage.remote_store import store_at
from raylora.texts import shown_line

MAX_SHOWN = 10
"""Datasets, and failures, that a notebook shows: what fits below a cell without scrolling."""
VERDICTS = {"gain": "better", "loss": "worse", "letter": LETTER_MOVED}


def run(folder: str | Path, **options: Unpack[FolderKeywords]) -> Run:
    """Run all datasets of a folder, on every GPU, as the batch command does. What is finished already is not run again.

    >>> run = raylora.run("my_datasets", model="Qwen/Qwen2.5-0.5B-Instruct")
    >>> run.best["dataset"], run.table, run.report

    Args:
        folder: a chunk of ``data_root`` by its name, any folder of dataset files, a single file, or
            ``hf://datasets/org/name`` of the hub.
        options: any option of the batch command; those that are None keep their value from the environment, or their
            default.

    Returns:
        The run. A dataset that failed is no exception: its row has the status ``error`` and the cause.

    Raises:
        UserError: an option, the folder, the model or the questions cannot be used; one line says why.
        MachineError: this machine cannot do it, and another one may.
        StoppedError: the run ended early. What is finished is kept: the same call goes on from there.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    config = load_config(**given)
    config, console = config.model_copy(update=_where(folder, config)), make_console()
    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    print_notes(console, plan.notes)
    run_plan(plan, console, pushes=Pushes(plan, console))
    return Run(plan.store.root)


def _where(folder: str | Path, config: Config) -> dict[str, Any]:
    """The options that name the datasets."""
    text = os.fspath(folder)
    if text.strip().lower().startswith(PREFIX):
        from raylora.storage.hub_names import dataset_location

        return {"dataset": (dataset_location(text), *config.dataset)}
    path = location(folder)
    is_name = "/" not in text and (config.data_root / text).is_dir()
    if is_name or not path.exists():
        return {"chunk": text}
    if not path.is_dir():
        return {"dataset": (path, *config.dataset)}
    path = path.absolute() if "://" in str(path) else Path(os.path.abspath(path))  # noqa: PTH100 - "." has no name
    if path.name.isdecimal():
        raise UserError(f"{path}: a number is taken for a place in the list of chunks: give the folder another name")
    return {"data_root": path.parent, "chunk": path.name}


class Run:
    """A finished run: ``raylora.run`` returns it, and ``Run("results/chunk_001")`` reads an earlier one.

    Attributes:
        folder: the run's own, with all of its files.

    Raises:
        UserError: there is no table in the folder, or none that can be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = store_at(location(folder)).root
        self._run: FinishedRun = load_run(self.folder)
        self._ranked: dict[str, Any] = ranking(self._run)

    @cached_property
    def table(self) -> pd.DataFrame:
        """A row for each experiment, failed ones too, with the types of ``load_results``."""
        return load_results(self.folder)

    @property
    def best(self) -> pd.Series[Any] | None:
        """The row with the highest change of MMLU accuracy, whether significant or not; None where none has one.

        Where datasets were trained with several seeds, the mean over them counts, and this is the first seed's row.
        """
        best = self._order[0] if self._order else None
        return None if best is None else self.table.iloc[best].rename(self._label(best))

    @property
    def report(self) -> Path:
        """The page with the run's figures, for a browser; written where it is missing."""
        path = self.folder / "report.html"
        return path if path.is_file() else write_report(self.folder)

    @cached_property
    def _order(self) -> list[int]:
        """The rows with a change of accuracy, the highest first."""
        return sorted(self._ranked["rows"], key=lambda row: -self._change(row)[0])

    def _change(self, row: int) -> tuple[float, float, float]:
        """The change of accuracy and both ends of its 95% interval, shares; an end is NaN where it is unknown."""
        if self._ranked["seeds"]:
            line = self._ranked["seeds"]["lines"][row]
            low, high = (math.nan if line[end] is None else line[end] for end in ("low", "high"))
            return line["change"], low, high
        names = ("accuracy_change", "accuracy_change_low", "accuracy_change_high")
        change, low, high = (float(self._run.numbers(name)[row]) for name in names)
        return change, low, high

    def _label(self, row: int) -> str:
        seeds = self._ranked["seeds"]
        return shown_line(seeds["lines"][row]["label"] if seeds else self._run.labels[row])

    def _sentence(self) -> str:
        num_ok, num_rows = int(self._run.ok.sum()), len(self._run.table)
        if not self._order:
            return f"{num_ok} of {num_rows} rows succeeded"
        gains, losses = self._ranked["num_gains"], self._ranked["num_losses"]
        change = 100 * self._change(self._order[0])[0]
        return (
            f"{num_ok} of {num_rows} rows succeeded; {gains} of {len(self._order)} datasets better, {losses} worse "
            f"(Holm at 5%); the best: {self._label(self._order[0])} {change:+z.1f} points"
        )

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}): {self._sentence()}"

    def _repr_html_(self) -> str:
        """The ranking, as a notebook shows it."""
        lines = [_html_row(("dataset", "MMLU accuracy, points", "95% interval", ""), "th")] if self._order else []
        for row in self._order[:MAX_SHOWN]:
            change, low, high = (100 * share for share in self._change(row))
            interval = "" if math.isnan(low + high) else f"{low:+z.1f} to {high:+z.1f}"
            verdict = VERDICTS.get(self._ranked["verdicts"][row], "undecided")
            lines.append(_html_row((self._label(row), f"{change:+z.1f}", interval, verdict)))
        failed = [row for row, ok in enumerate(self._run.ok) if not ok]
        errors = self._run.texts("error")
        notes = [f"{self._run.labels[row]} failed: {errors[row][:200]}" for row in failed[:MAX_SHOWN]]
        if hidden := max(len(self._order) - MAX_SHOWN, 0) + max(len(failed) - MAX_SHOWN, 0):
            notes.append(f"{hidden} more in .table")
        below = "".join(f"<p>{escape(shown_line(note))}</p>" for note in [*notes, f"Page: {self.report}"])
        return f"<p>{escape(self._sentence())}</p><table>{''.join(lines)}</table>{below}"


def _html_row(cells: tuple[str, ...], tag: str = "td") -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>"
