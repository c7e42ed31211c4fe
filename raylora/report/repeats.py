"""Trainings of one dataset with several seeds: together one line of the ranking, and A/A pairs of each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from raylora.config.method import Method
from raylora.mmlu.paired import ALPHA, mcnemar
from raylora.mmlu.seeds import ChangeOverSeeds, change_over_seeds
from raylora.report.read_run import Answers, FinishedRun, answers_of, read_base

MIN_HELD_OUT = 2
"""Seeds that an interval needs beside the one that is taken for the base."""


@dataclass(frozen=True)
class SeedLine:
    """The trainings of a dataset that differ in their seed alone."""

    rows: list[int]
    label: str
    """The dataset, and what hyperparameters differ between its lines."""
    answers: list[Answers]
    """Of each row; empty where one is missing, they are to different questions, or there is one question only."""
    base: Answers | None

    def change(self, balanced: bool = False) -> ChangeOverSeeds | None:
        """The change of accuracy, or of balanced accuracy; None for one seed, or where answers are missing."""
        if self.base is None or len(self.answers) < 2:
            return None
        differences = np.stack([a.correct.astype(np.int8) - self.base.correct for a in self.answers])
        return change_over_seeds(differences, _balance(self.base) if balanced else None)

    def pairs_p_values(self) -> Iterator[float]:
        """McNemar's p-values of all pairs of these trainings."""
        for one, other in combinations(self.answers, 2):
            yield float(mcnemar((one.correct & ~other.correct).sum(), (other.correct & ~one.correct).sum()))

    def held_out_p_values(self) -> Iterator[float]:
        """The p-values of the others' interval over seeds, each training in turn taken for their base."""
        for k, base in enumerate(self.answers):
            others = [a.correct.astype(np.int8) - base.correct for j, a in enumerate(self.answers) if j != k]
            if len(others) >= MIN_HELD_OUT:
                yield change_over_seeds(np.stack(others)).p_value


def _balance(base: Answers) -> np.ndarray:
    """Weights of the questions, of mean 1, that make an accuracy a balanced one."""
    _, codes, sizes = np.unique(base.right_letters.to_numpy().astype(str), return_inverse=True, return_counts=True)
    weights: np.ndarray = len(codes) / (len(sizes) * sizes[codes])
    return weights


def seed_lines(run: FinishedRun) -> list[SeedLine]:
    """The rows with MMLU by dataset and hyperparameters; no lines where no two differ in their seed alone."""
    evaluated = np.flatnonzero(run.numbers("accuracy_change").notna() & run.ok)
    columns = [run.texts(name) for name in ("dataset", "data_hash", *Method.model_fields) if name != "seed"]
    seeds = run.texts("seed")
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for row in evaluated.tolist():
        groups[tuple(values[row] for values in columns)].append(row)
    if all(len({seeds[row] for row in rows}) < 2 for rows in groups.values()):
        return []
    labels, bases = run.labels_of([rows[0] for rows in groups.values()], ignored="seed"), read_base(run)
    return [_line(run, rows, label, bases) for rows, label in zip(groups.values(), labels, strict=True)]


def _line(run: FinishedRun, rows: list[int], label: str, bases: dict[str, Answers]) -> SeedLine:
    pairs = [pair for row in rows if (pair := answers_of(run, row, bases)) is not None]
    is_whole = len(pairs) == len(rows) and all(base is pairs[0][1] and len(base.correct) > 1 for _, base in pairs)
    return SeedLine(rows, label, [a for a, _ in pairs] if is_whole else [], pairs[0][1] if is_whole else None)


def a_a_pairs(lines: list[SeedLine]) -> dict[str, Any]:
    """How often a training counts as better or worse than another one on the same data.

    Returns:
        ``num_pairs``, and ``num_pairs_real``: those that McNemar's test calls different; ``num_held_out``, trainings
        taken for the base of the others with other seeds, and ``num_held_out_real``: how often these, by their interval
        over seeds, count as changed.
    """
    pairs = [p for line in lines for p in line.pairs_p_values()]
    held_out = [p for line in lines for p in line.held_out_p_values()]
    return {
        "num_pairs": len(pairs),
        "num_pairs_real": sum(p < ALPHA for p in pairs),
        "num_held_out": len(held_out),
        "num_held_out_real": sum(p < ALPHA for p in held_out),
    }
