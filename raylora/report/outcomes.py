"""What the page can rank by beside accuracy: balanced accuracy, probability of the right choice, further questions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from raylora.mmlu.paired import holm, interval_p_values, verdicts
from raylora.mmlu.statistics import BALANCED_CHANGES
from raylora.report.power import power_of_run
from raylora.report.read_run import FinishedRun

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "correct_probability": "probability of the right choice",
}
P_VALUES = {"accuracy": "mcnemar_p_value", "correct_probability": "correct_probability_p_value"}
"""By outcome the column of its p-value; that of balanced accuracy is the one that belongs to its interval."""
SIDES = {"change": "change", "low": "change_low", "high": "change_high"}


@dataclass(frozen=True)
class Outcome:
    """A kind of change, of the first set of questions or of a further one."""

    kind: str
    """One of ``TITLES``."""
    question_set: str = ""

    @property
    def title(self) -> str:
        return f"{TITLES[self.kind]}, {self.question_set}" if self.question_set else TITLES[self.kind]

    def column(self, name: str) -> str:
        """The set's column of this name."""
        return f"{name}[{self.question_set}]" if self.question_set else name


def sets_of(run: FinishedRun) -> list[str]:
    """The names of a run's further sets of questions."""
    found = (re.fullmatch(r"accuracy_change\[(.+)\]", str(name)) for name in run.table.columns)
    return [match[1] for match in found if match]


def outcomes(run: FinishedRun, ranked: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the ranking by each other outcome that the table has.

    A change is significant where its p-value, Holm-adjusted over the lines, is below 0.05; of a further set's accuracy
    as of the first one's (``paired.verdicts``). Where datasets were trained with several seeds the interval of balanced
    accuracy is that over seeds; of the others only the mean is known, and nothing is called significant.

    Args:
        ranked: from ``findings.ranking``.

    Returns:
        For each outcome ``name``, ``title``, ``kind``, ``set`` (of questions; empty for the first), ``column`` (of the
        rows' own changes), ``lines`` (by the line's first row: ``change``, ``low``, ``high``, ``p_value``), ``holm``
        and ``verdicts`` (by row of the table, as in ``ranked``), and ``power`` (of a further set's accuracy: what its
        questions can show).
    """
    of_first = [Outcome(kind) for kind in TITLES if kind != "accuracy"]
    of_sets = [Outcome(kind, question_set) for question_set in sets_of(run) for kind in TITLES]
    found = []
    for outcome in (*of_first, *of_sets):
        lines = {row: _line(run, ranked, outcome, row) for row in ranked["rows"]}
        changes, p_values = (np.array([line[key] for line in lines.values()]) for key in ("change", "p_value"))
        if np.isnan(changes).all():
            continue
        balanced = [np.full(len(lines), np.nan)] * 3
        if outcome.kind == "accuracy":
            balanced = [run.numbers(outcome.column(name))[list(lines)].to_numpy() for name in BALANCED_CHANGES]
        adjusted, called = holm(p_values), verdicts(p_values, changes, *balanced)
        by_row, of_row = np.full(len(run.table), np.nan), ["undecided"] * len(run.table)
        for row, p_value, verdict in zip(lines, adjusted, called, strict=True):
            by_row[row], of_row[row] = p_value, verdict
        named = {
            "name": outcome.column(outcome.kind),
            "title": outcome.title,
            "column": outcome.column(f"{outcome.kind}_change"),
            "kind": outcome.kind,
            "set": outcome.question_set,
            "power": power_of_run(run, ranked, outcome.column) if outcome.kind == "accuracy" else None,
            "lines": lines,
        }
        found.append(named | {"holm": by_row.tolist(), "verdicts": of_row})
    return found


def _line(run: FinishedRun, ranked: dict[str, Any], outcome: Outcome, row: int) -> dict[str, float]:
    is_balanced = outcome.kind == "balanced_accuracy"
    columns = {key: run.numbers(outcome.column(f"{outcome.kind}_{side}")) for key, side in SIDES.items()}
    columns["p_value"] = run.numbers(outcome.column(P_VALUES.get(outcome.kind, "")))
    seeds: dict[str, Any] = ranked["seeds"]["lines"][row] if ranked["seeds"] else {"rows": [row]}
    if len(seeds["rows"]) > 1:
        values: dict[str, float] = dict.fromkeys(columns, np.nan) | {
            "change": float(columns["change"][seeds["rows"]].mean())
        }
        if is_balanced and not outcome.question_set:
            known = {"low": "balanced_low", "high": "balanced_high", "p_value": "balanced_p_value"}
            values |= {key: np.nan if seeds[of] is None else float(seeds[of]) for key, of in known.items()}
        return values
    values = {key: float(column[row]) for key, column in columns.items()}
    if is_balanced:
        change, low, high = (values[key] for key in ("change", "low", "high"))
        values["p_value"] = float(interval_p_values(change, low, high, np.sign(change)))
    return values
