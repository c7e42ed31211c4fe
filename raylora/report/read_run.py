"""Read a finished run's folder: its table, what each experiment is called, loss curves, and answers to MMLU.

Only the table must be there: any other file that is missing or broken is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from raylora.config.method import Method
from raylora.errors import UserError
from raylora.storage.atomic import read_json
from raylora.storage.digests import load_parquet, open_parquet

UNREADABLE = (OSError, ValueError, KeyError, pa.ArrowException)
"""What pandas and pyarrow raise for a missing, cut or foreign file."""
NUM_CURVE_POINTS = 80
"""Points of a loss curve at most: more cannot be seen on a page that is 1280 pixels wide."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run's folder holds."""

    root: Path
    table: pd.DataFrame
    """A row for each experiment, with an index from 0: methods that take a ``row`` mean that number."""
    manifest: dict[str, Any]
    """``run.json``; empty where there is none."""

    def numbers(self, name: str) -> pd.Series[float]:
        """A column as floats; NaN where a value is null or no number, and everywhere if there is no such column."""
        if name not in self.table:
            return pd.Series(np.nan, index=self.table.index, dtype=float)
        values = pd.to_numeric(self.table[name], errors="coerce").astype("float64")
        return values.where(np.isfinite(values))

    def texts(self, name: str) -> list[str]:
        """A column as text; empty where a value is null, and everywhere if there is no such column."""
        if name not in self.table:
            return [""] * len(self.table)
        return ["" if v is None or v is pd.NA or v != v else str(v) for v in self.table[name]]  # v != v: NaN

    @cached_property
    def ok(self) -> pd.Series[bool]:
        """Whether each experiment succeeded."""
        return pd.Series([status == "ok" for status in self.texts("status")], index=self.table.index, dtype=bool)

    @cached_property
    def labels(self) -> list[str]:
        """What each experiment is called: its dataset, and where a grid has several of a dataset, what differs."""
        return self.labels_of(list(range(len(self.table))))

    def labels_of(self, rows: list[int], ignored: str = "") -> list[str]:
        """What these rows are called where there are no others, and the hyperparameter ``ignored`` does not count."""
        datasets, ids = self.texts("dataset"), self.texts("experiment_id")
        labels = [datasets[row] or ids[row] or f"row {row + 1}" for row in rows]
        for name, places in pd.Series(labels).groupby(labels).groups.items():
            if len(places) > 1:
                differences = self._differences([rows[place] for place in places], ignored)
                for place, difference in zip(places, differences, strict=True):
                    labels[place] = f"{name} · {difference}"
        return labels

    def _differences(self, rows: list[int], ignored: str) -> list[str]:
        """For rows of the same dataset, the hyperparameters in which they differ, as text."""
        columns = {name: [self.texts(name)[row] for row in rows] for name in Method.model_fields if name != ignored}
        varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
        texts = [", ".join(f"{name} {values[k]}" for name, values in varied.items()) for k in range(len(rows))]
        if len(set(texts)) < len(texts):  # the same name twice: a .json beside a .jsonl, or another run's rows
            ids = self.texts("experiment_id")
            texts = [f"{text}, {ids[row][-8:]}".lstrip(", ") for text, row in zip(texts, rows, strict=True)]
        return texts

    def folder(self, row: int) -> Path | None:
        """The folder of a row's experiment; None where there is none."""
        name = self.texts("experiment_id")[row]
        folder = self.root / "experiments" / name
        # A table may come from anyone: an id with ".." or "/" in it must not lead out of the run's folder.
        is_one_name = Path(name).name == name and name not in {"", ".", ".."}
        return folder if is_one_name and folder.is_dir() else None


def load_run(root: Path) -> FinishedRun:
    """Read a run's ``results.parquet`` (or, where that is missing or broken, ``results.csv``) and ``run.json``.

    Raises:
        UserError: there is no table in the folder, or none that can be read.
    """
    from raylora.rows import read_csv

    table, problem = None, ""
    for name, read in (("results.parquet", load_parquet), ("results.csv", read_csv)):
        if table is None and (root / name).is_file():
            try:
                table = read(root / name)
            except UNREADABLE as error:
                problem = f"{root / name}: cannot be read: {' '.join(str(error).split())[:200]}"
    if table is None:
        raise UserError(problem or f"{root}: no results.csv in it; give the folder of a run, such as results/chunk_001")
    return FinishedRun(root, table.reset_index(drop=True), read_json(root / "run.json") or {})


def loss_curve(run: FinishedRun, row: int) -> tuple[list[float], list[float]] | None:
    """Steps and losses of a training, averaged into ``NUM_CURVE_POINTS`` bins if there are more; None without any."""
    folder = run.folder(row)
    try:
        curve = pd.read_csv(folder / "loss_curve.csv", usecols=["step", "loss"]) if folder else None
    except UNREADABLE:
        return None
    if curve is None or curve.empty:
        return None
    values = curve[["step", "loss"]].apply(pd.to_numeric, errors="coerce").to_numpy(dtype=float)
    values = values[np.isfinite(values).all(axis=1)]
    if not len(values):
        return None
    starts = np.unique(np.arange(NUM_CURVE_POINTS) * len(values) // NUM_CURVE_POINTS)
    means = np.add.reduceat(values, starts) / np.diff(starts, append=len(values))[:, None]
    steps, losses = ([float(f"{v:.5g}") for v in column] for column in means.T)
    return steps, losses


@dataclass(frozen=True)
class Answers:
    """Which questions a model got right, sorted by question id; all four (N,)."""

    question_ids: pa.ChunkedArray
    subjects: pa.ChunkedArray
    right_letters: pa.ChunkedArray
    correct: np.ndarray
    """Booleans."""

    def same_questions(self, other: Answers) -> bool:
        """Whether both are answers to the same questions."""
        return bool(self.question_ids.equals(other.question_ids))


def read_answers(path: Path) -> Answers | None:
    """The answers in a ``scores.parquet``; None where there is no file, or none that can be read."""
    try:
        columns = ["question_id", "subject", "answer", "correct"]
        table = pq.read_table(open_parquet(path), columns=columns).sort_by("question_id")
    except UNREADABLE:
        return None
    return Answers(table["question_id"], table["subject"], table["answer"], table["correct"].to_numpy().astype(bool))


def read_base(run: FinishedRun) -> dict[str, Answers]:
    """The base's answers by their key. A folder holds several where runs with other settings have used it."""
    paths = sorted((run.root / "base").glob("*/scores.parquet"))
    by_key = {path.parent.name: read_answers(path) for path in paths}
    return {key: answers for key, answers in by_key.items() if answers is not None and len(answers.correct)}


def answers_of(run: FinishedRun, row: int, bases: dict[str, Answers]) -> tuple[Answers, Answers] | None:
    """The answers of a row's adapter and of its base; None where either is missing, or disagrees with the row.

    The base's are those of the key in ``run.json``. Older runs have no key there: then they are those with the same
    questions and the row's number of right answers, unless several have both.

    Args:
        bases: from ``read_base``.
    """
    folder = run.folder(row)
    adapter = read_answers(folder / "scores.parquet") if folder else None
    if adapter is None or adapter.correct.sum() != run.numbers("correct_questions")[row]:
        return None
    num_base_correct = run.numbers("base_correct_questions")[row]
    candidates = {
        key: base
        for key, base in bases.items()
        if base.same_questions(adapter) and base.correct.sum() == num_base_correct
    }
    base_of_run = candidates.get(str(run.manifest.get("base_key")))
    if base_of_run is not None:
        return adapter, base_of_run
    return (adapter, next(iter(candidates.values()))) if len(candidates) == 1 else None
