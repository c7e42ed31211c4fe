"""A run's folder, read back: the table, what each experiment is called, loss curves, answers subject by subject.

Nothing here fails because a file is missing or broken: what cannot be read is left out.
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

from raylora.config import Method
from raylora.errors import UserError
from raylora.storage.atomic import read_json

UNREADABLE = (OSError, ValueError, KeyError, pa.ArrowException)
NUM_CURVE_POINTS = 80
"""Points of a loss curve at most: more cannot be seen on a page that is 1280 pixels wide."""


@dataclass(frozen=True)
class FinishedRun:
    """What lies in a run's folder. ``table`` has a row each experiment, with an index from 0."""

    root: Path
    table: pd.DataFrame
    manifest: dict[str, Any]
    """``run.json``; empty where there is none."""

    def numbers(self, name: str) -> pd.Series[float]:
        """A column as floats; NaN where it is null, is no number, or there is no such column."""
        if name not in self.table:
            return pd.Series(np.nan, index=self.table.index, dtype=float)
        values = pd.to_numeric(self.table[name], errors="coerce").astype("float64")
        return values.where(np.isfinite(values))

    def texts(self, name: str) -> list[str]:
        """A column as text; empty where it is null or missing."""
        if name not in self.table:
            return [""] * len(self.table)
        return ["" if v is None or v is pd.NA or v != v else str(v) for v in self.table[name]]

    @cached_property
    def ok(self) -> pd.Series[bool]:
        return pd.Series([status == "ok" for status in self.texts("status")], index=self.table.index, dtype=bool)

    @cached_property
    def labels(self) -> list[str]:
        """What each experiment is called: its dataset, and what varies where a grid made several of one dataset."""
        datasets, ids = self.texts("dataset"), self.texts("experiment_id")
        names = [name or key or f"row {i + 1}" for i, (name, key) in enumerate(zip(datasets, ids, strict=True))]
        grouped = pd.Series(names).groupby(names).groups
        for name, members in grouped.items():
            if len(members) > 1:
                for i, text in zip(members, self._differences(list(members)), strict=True):
                    names[i] = f"{name} · {text}"
        return names

    def _differences(self, members: list[int]) -> list[str]:
        columns = {name: [self.texts(name)[i] for i in members] for name in Method.model_fields}
        varied = {name: values for name, values in columns.items() if len(set(values)) > 1}
        texts = [", ".join(f"{name} {values[k]}" for name, values in varied.items()) for k in range(len(members))]
        if len(set(texts)) < len(texts):  # the same name twice: a .json beside a .jsonl, or another run's rows
            texts = [
                f"{t}, {self.texts('experiment_id')[i][-8:]}".lstrip(", ") for t, i in zip(texts, members, strict=True)
            ]
        return texts

    def folder(self, row: int) -> Path | None:
        """The folder of a row's experiment; None where there is none within the run's."""
        name = self.texts("experiment_id")[row]
        folder = self.root / "experiments" / name
        plain = Path(name).name == name and name not in {"", ".", ".."}
        return folder if plain and folder.is_dir() else None


def load_run(root: Path) -> FinishedRun:
    """Read ``results.parquet`` (or ``results.csv``) and ``run.json``.

    Raises:
        UserError: there is no table in the folder, or none that can be read.
    """
    from raylora.rows import read_csv

    table, problem = None, ""
    for name, read in (("results.parquet", pd.read_parquet), ("results.csv", read_csv)):
        if table is None and (root / name).is_file():
            try:
                table = read(root / name)
            except UNREADABLE as error:
                problem = f"{root / name}: cannot be read: {' '.join(str(error).split())[:200]}"
    if table is None:
        raise UserError(problem or f"{root}: no results.csv in it; give the folder of a run, such as results/chunk_001")
    return FinishedRun(root, table.reset_index(drop=True), read_json(root / "run.json") or {})


def loss_curve(run: FinishedRun, row: int) -> tuple[list[float], list[float]] | None:
    """Steps and losses of a training; where there are more than ``NUM_CURVE_POINTS``, means of as many bins."""
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
    """Which questions a model got right, sorted by question id."""

    question_ids: pa.ChunkedArray
    subjects: pa.ChunkedArray
    correct: np.ndarray

    def same_questions(self, other: Answers) -> bool:
        return bool(self.question_ids.equals(other.question_ids))


def read_answers(path: Path) -> Answers | None:
    """The answers of a ``scores.parquet``; None where there is none that can be read."""
    try:
        table = pq.read_table(path, columns=["question_id", "subject", "correct"]).sort_by("question_id")
    except UNREADABLE:
        return None
    return Answers(table["question_id"], table["subject"], table["correct"].to_numpy().astype(bool))


def read_base(run: FinishedRun) -> dict[str, Answers]:
    """The base's answers by key. A folder that was used with several settings holds several."""
    paths = sorted((run.root / "base").glob("*/scores.parquet"))
    found = {path.parent.name: read_answers(path) for path in paths}
    return {key: answers for key, answers in found.items() if answers is not None and len(answers.correct)}


def answers_of(run: FinishedRun, row: int, bases: dict[str, Answers]) -> tuple[Answers, Answers] | None:
    """An adapter's answers and those of its base; None where either is missing, or is not what the row says.

    The base is the one that ``run.json`` names. Older runs do not name it: then it is the one with the row's questions
    and the row's number of right answers, if only one is.
    """
    folder = run.folder(row)
    ours = read_answers(folder / "scores.parquet") if folder else None
    if ours is None or ours.correct.sum() != run.numbers("correct_questions")[row]:
        return None
    num_right = run.numbers("base_correct_questions")[row]
    fitting = {k: b for k, b in bases.items() if b.same_questions(ours) and b.correct.sum() == num_right}
    named = fitting.get(str(run.manifest.get("base_key")))
    if named is not None:
        return ours, named
    return (ours, next(iter(fitting.values()))) if len(fitting) == 1 else None
