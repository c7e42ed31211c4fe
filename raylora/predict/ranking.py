"""The order in which to train a chunk's datasets: draws of each outcome, then the greedy choice of the best set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from raylora.errors import UserError
from raylora.predict.predictor import Predictor

NUM_DRAWS = 4000
"""Draws of all outcomes: a ``chance_best`` then has a standard error of 0.008 at most (0.5 over the root of 4000)."""


def rank(predictor: Predictor, table: pd.DataFrame, budget: int | None, coverage: float | None, seed: int) -> Any:
    """The table's good rows in the order in which to train them, then those that failed.

    A predictor that is no better than the mean has the same prediction for all. Of any N the best is then expected to
    be equally good, so the cheapest come first: the same for less, and the soonest rows for a better predictor.

    Args:
        table: features of a chunk, with ``dataset``, ``experiment_id`` and ``error`` ("" where good) beside them; and
            ``cost``, the tokens of a training, for the order of equals. Without it they keep the table's order.
        budget: how many datasets will be trained; None: all.
        coverage: of the intervals, 0 to 1; None: the predictor's own.

    Returns:
        ``rank`` (from 1), ``dataset``, ``experiment_id``, ``prediction``, ``low``, ``high``, ``chance_best`` (share of
        draws in which it is the best of all; equal ones share a draw), ``expected_best`` (mean outcome of the best of
        those up to this one), ``train`` (within the budget), ``outside``, ``error``.

    Raises:
        UserError: no row is good, or ``coverage`` needs more rows than the predictor was fitted on.
    """
    table = _fail_unmeasured(predictor, table)
    bad = table["error"] != ""
    good = table[~bad].reset_index(drop=True)
    if good.empty:
        raise UserError(f"no dataset could be measured; the first: {table['error'].iloc[0]}")
    predictions = predictor.predict(good, coverage, "the chunk's features")
    draws = predictor.draw(good, NUM_DRAWS, seed, "the chunk's features")
    if predictor.is_better_than_mean:
        order, expected_best = order_by_expected_best(draws, predictions["prediction"].to_numpy())
        chances = chances_to_be_best(draws)
    else:
        order = cheapest_first(good)
        expected_best = np.maximum.accumulate(draws[:, order], axis=1).mean(axis=0).tolist()
        chances = np.full(len(good), 1 / len(good))
    ranking = pd.concat([good[["dataset", "experiment_id"]], predictions], axis=1)
    ranking.insert(5, "chance_best", chances)
    ranking = ranking.iloc[order].assign(error="")
    ranking.insert(6, "expected_best", expected_best)
    ranking = pd.concat([ranking, table.loc[bad, ["dataset", "experiment_id", "error"]]], ignore_index=True)
    ranking.insert(0, "rank", pd.Series(range(1, len(ranking) + 1)).where(ranking["error"] == "").astype("Int64"))
    num_trained = len(good) if budget is None else budget
    ranking.insert(7, "train", ranking["rank"].le(num_trained).fillna(False).astype(bool))
    return ranking


def chances_to_be_best(draws: np.ndarray) -> np.ndarray:
    """Share of draws (draws, datasets) in which each dataset is the best, (datasets,); equal ones share a draw."""
    is_best = draws == draws.max(axis=1, keepdims=True)
    return (is_best / is_best.sum(axis=1, keepdims=True)).mean(axis=0)


def cheapest_first(table: pd.DataFrame) -> list[int]:
    """Positions of the rows by ``cost``, those without one last; equal ones keep their order."""
    return table["cost"].argsort(kind="stable").tolist() if "cost" in table else list(range(len(table)))


def _fail_unmeasured(predictor: Predictor, table: pd.DataFrame) -> pd.DataFrame:
    """The table, where rows that lack a feature the predictor needs have an ``error``."""
    good = table[table["error"] == ""]
    if good.empty:
        return table
    errors = table["error"].copy()
    unmeasured = predictor.unmeasured(good, "the chunk's features")
    errors[good.index] = [f"not measured: {names}" if names else "" for names in unmeasured]
    return table.assign(error=errors)


def order_by_expected_best(draws: np.ndarray, predictions: np.ndarray) -> tuple[list[int], list[float]]:
    """The greedy order: each next dataset is the one that raises the expected best outcome so far the most.

    Its first N are within a factor of 1 - 1/e of the best N (Nemhauser et al. 1978: the mean of a maximum is
    submodular). Where several raise it equally, in the draws to 9 decimals, the higher prediction comes first.

    Args:
        draws: outcomes, (draws, datasets).
        predictions: (datasets,).

    Returns:
        Indices of datasets, and the expected best outcome up to each.
    """
    remaining = list(range(draws.shape[1]))
    best = np.full(len(draws), -np.inf)  # of those chosen so far, in each draw
    order, expected_best = [], []
    while remaining:
        with_each = np.maximum(best[:, None], draws[:, remaining]).mean(axis=0)
        ranks = [(round(float(mean), 9), predictions[i]) for mean, i in zip(with_each, remaining, strict=True)]
        chosen = remaining.pop(max(range(len(remaining)), key=ranks.__getitem__))
        best = np.maximum(best, draws[:, chosen])
        order.append(chosen)
        expected_best.append(float(best.mean()))
    return order, expected_best
