"""An order in which to train, by draws from a predictor's held-out errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from raylora.errors import UserError
from raylora.predict.predictor import Predictor

NUM_DRAWS = 4000


def rank(predictor: Predictor, table: pd.DataFrame, budget: int | None, coverage: float | None, seed: int) -> Any:
    """The table's good rows in the order in which to train them, then those that failed.

    Returns:
        ``rank`` (from 1), ``dataset``, ``experiment_id``, ``prediction``, ``low``, ``high``, ``chance_best`` (share of
        draws in which it is the best of all), ``expected_best`` (of the trainings up to this one), ``train`` (within
        the budget), ``outside``, ``error``.
    """
    table = _with_unmeasured(predictor, table)
    bad = table["error"] != ""
    good = table[~bad].reset_index(drop=True)
    if good.empty:
        raise UserError(f"no dataset could be measured; the first: {table['error'].iloc[0]}")
    found = predictor.predict(good, coverage, "the chunk's features")
    draws = predictor.draw(good, NUM_DRAWS, seed, "the chunk's features")
    order, expected = order_by_expected_best(draws, found["prediction"].to_numpy())
    ranking = pd.concat([good[["dataset", "experiment_id"]], found], axis=1)
    best = np.bincount(draws.argmax(axis=1), minlength=len(good))
    ranking.insert(5, "chance_best", best / len(draws))
    ranking = ranking.iloc[order].assign(error="")
    ranking.insert(6, "expected_best", expected)
    ranking = pd.concat([ranking, table.loc[bad, ["dataset", "experiment_id", "error"]]], ignore_index=True)
    ranking.insert(0, "rank", pd.Series(range(1, len(ranking) + 1)).where(ranking["error"] == "").astype("Int64"))
    last = len(good) if budget is None else budget
    ranking.insert(7, "train", ranking["rank"].le(last).fillna(False).astype(bool))
    return ranking


def _with_unmeasured(predictor: Predictor, table: pd.DataFrame) -> pd.DataFrame:
    """The table, in which rows without a feature that the predictor cannot do without have failed."""
    good = table[table["error"] == ""]
    if good.empty:
        return table
    errors = table["error"].copy()
    errors[good.index] = [f"not measured: {u}" if u else "" for u in predictor.unmeasured(good, "the chunk's features")]
    return table.assign(error=errors)


def order_by_expected_best(draws: np.ndarray, predictions: np.ndarray) -> tuple[list[int], list[float]]:
    """Columns of ``draws`` (draws x datasets), each next one the one that adds most to the mean of the best so far.

    The greedy choice of N is within 1 - 1/e of the best N (Nemhauser et al. 1978: the mean of a maximum is submodular).
    Where none adds anything that draws can show, the higher prediction comes first.

    Returns:
        The order, and the mean of the best up to each place.
    """
    left = list(range(draws.shape[1]))
    best = np.full(len(draws), -np.inf)
    order, expected = [], []
    while left:
        gains = np.maximum(best[:, None], draws[:, left]).mean(axis=0)
        chosen = left[max(range(len(left)), key=lambda i: (round(float(gains[i]), 9), predictions[left[i]]))]
        left.remove(chosen)
        best = np.maximum(best, draws[:, chosen])
        order.append(chosen)
        expected.append(float(best.mean()))
    return order, expected
