"""What a predictor is worth, in words: how far off it is, whether that is better than the mean, whether it can be true.

All are made of its card: plain values, of a file that anyone may have written.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from raylora.predict.tables import names_of
from raylora.predict.uncertainty import LEVEL
from raylora.rows import name_of_first

SUSPICIOUS_R2 = 0.98
"""Above this the outcome is nearly a function of the features, which noise of the questions alone forbids: of 500
questions at an accuracy of 0.5 it has a standard deviation of 0.022, where datasets differ by 0.05 (an R2 of 0.8)."""
OUTCOMES = {
    "overall_accuracy": "accuracy",
    "accuracy_change": "change of accuracy",
    "balanced_accuracy_change": "change of balanced accuracy",
    "correct_probability_change": "change of the right choice's probability",
}
"""What the targets are called in a sentence."""


def summary_of(card: dict[str, Any]) -> str:
    """A sentence: how far off are predictions of a new dataset, and how far off is guessing the mean?

    "To within" is the root mean square of held-out errors, which most datasets are within: 68% where errors are normal.
    """
    set_name = card["target"].partition("[")[2].rstrip("]")
    outcome = OUTCOMES.get(name_of_first(card["target"]), card["target"]) + (f" on {set_name}" if set_name else "")
    error, of_mean = card["rmse"], card["baselines"]["mean"]["rmse"]
    digits = 3 if min(error, of_mean) >= 0.001 else 5
    found = f"to within {error:.{digits}f}, the mean guess {of_mean:.{digits}f}"
    if card["verdict"]["better"]:
        return f"It predicts a new dataset's {outcome} {found}."
    return f"Features do not predict a new dataset's {outcome}: {found}."


def doubt_of(card: dict[str, Any]) -> str:
    """What to look for where the figures are too good; empty where they are not."""
    if card["r2"] <= SUSPICIOUS_R2:
        return ""
    first = next(iter(card.get("importance", {})), "")
    look = f"does {first} hold the outcome, or" if first else "does a feature hold the outcome, or"
    return (
        f"R2 {card['r2']:.3f} on held-out rows: too good to be true? Look whether it is: {look} are rows of the same "
        "data in several folds (--group COLUMN)?"
    )


def why_unmeasured(table: pd.DataFrame, unmeasured: list[str]) -> str:
    """Which rows have no prediction and which features of their own they lack, in one line, and what to do.

    Args:
        unmeasured: what ``Predictor.unmeasured`` returned, of which one at least is not empty.
    """
    rows = [row for row, names in enumerate(unmeasured) if names]
    labels = names_of(table)
    each = [f"{labels[row]} lacks {_first_names(unmeasured[row])}" for row in rows[:MAX_NAMED]]
    more = f" and {len(rows) - MAX_NAMED} more rows" if len(rows) > MAX_NAMED else ""
    lacking = list(dict.fromkeys(name for names in unmeasured if names for name in names.split(", ")))
    return (
        f"{len(rows)} of {len(table)} rows have no prediction: {'; '.join(each)}{more}: measure them (python -m "
        f"raylora.features), or fit without: --leave-out {' '.join(lacking[:MAX_NAMED])}"
        f"{' ...' if len(lacking) > MAX_NAMED else ''}"
    )


MAX_NAMED = 3
"""Rows, and features of a row, that a line names."""


def _first_names(names: str) -> str:
    named = names.split(", ")
    return ", ".join(named[:MAX_NAMED]) + (f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else "")


def verdict_of(card: dict[str, Any]) -> str:
    """One line of a card: is the predictor better than guessing the mean, by how much, and how sure is that?"""
    verdict = card["verdict"]
    # As a change of the RMSE: its sign is the one that readers expect of an error that falls.
    change, low, high = (f"{-share:+z.1%}" for share in (verdict["rmse_reduction"], *reversed(verdict["interval"])))
    found = f"RMSE on held-out rows {change} against the mean's ({LEVEL:.0%} interval {low} to {high})"
    if verdict["better"]:
        return f"Better than guessing the mean: {found}"
    return f"No better than guessing the mean, which every prediction therefore is: {found}"
