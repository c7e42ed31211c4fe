"""What the page can rank by beside accuracy: balanced accuracy, and the probability of the right choice."""

from __future__ import annotations

from typing import Any

import numpy as np

from raylora.mmlu.paired import holm, interval_p_values, verdicts
from raylora.report.read_run import FinishedRun

OUTCOMES = {
    "balanced_accuracy": "balanced accuracy",
    "correct_probability": "probability of the right choice",
}
"""What each outcome is called; ``<outcome>_change`` is its column, with ``_low`` and ``_high``."""


def outcomes(run: FinishedRun, ranked: dict[str, Any]) -> list[dict[str, Any]]:
    """The lines of the ranking by each other outcome that the table has.

    A change is real where its p-value, Holm-adjusted over the lines, is below 0.05. Where datasets were trained with
    several seeds the interval of balanced accuracy is that over seeds; of the probability only the mean is known, and
    nothing is called real.

    Args:
        ranked: from ``findings.ranking``.

    Returns:
        For each outcome ``name``, ``title``, ``column`` (of the rows' own changes), ``lines`` (by the line's first row:
        ``change``, ``low``, ``high``, ``p_value``), ``holm`` and ``verdicts`` (by row of the table, as in ``ranked``).
    """
    found = []
    for name, title in OUTCOMES.items():
        lines = {row: _line(run, ranked, name, row) for row in ranked["rows"]}
        changes, p_values = (np.array([line[key] for line in lines.values()]) for key in ("change", "p_value"))
        if np.isnan(changes).all():
            continue
        unknown = np.full(len(lines), np.nan)
        adjusted, called = holm(p_values), verdicts(p_values, changes, unknown, unknown, unknown)
        by_row, of_row = np.full(len(run.table), np.nan), ["undecided"] * len(run.table)
        for row, p_value, verdict in zip(lines, adjusted, called, strict=True):
            by_row[row], of_row[row] = p_value, verdict
        outcome = {"name": name, "title": title, "column": f"{name}_change", "lines": lines}
        found.append(outcome | {"holm": by_row.tolist(), "verdicts": of_row})
    return found


def _line(run: FinishedRun, ranked: dict[str, Any], name: str, row: int) -> dict[str, float]:
    names = {"change": "change", "low": "change_low", "high": "change_high", "p_value": "p_value"}
    columns = {key: run.numbers(f"{name}_{column}") for key, column in names.items()}
    seeds: dict[str, Any] = ranked["seeds"]["lines"][row] if ranked["seeds"] else {"rows": [row]}
    if len(seeds["rows"]) > 1:
        values: dict[str, float] = dict.fromkeys(columns, np.nan) | {
            "change": float(columns["change"][seeds["rows"]].mean())
        }
        if name == "balanced_accuracy":
            known = {"low": "balanced_low", "high": "balanced_high", "p_value": "balanced_p_value"}
            values |= {key: np.nan if seeds[of] is None else float(seeds[of]) for key, of in known.items()}
        return values
    values = {key: float(column[row]) for key, column in columns.items()}
    if name == "balanced_accuracy":
        change, low, high = (values[key] for key in ("change", "low", "high"))
        values["p_value"] = float(interval_p_values(change, low, high, np.sign(change)))
    return values
