"""How far the figures of a predictor may be off, and the verdict: is it better than guessing the mean?

Every interval comes from resampling held-out rows (Efron and Tibshirani 1993), where rows of one group are drawn
together. Its half width is the standard deviation over resamples times Student's quantile, on a scale where the figure
is about normal: the logarithm of an error, Fisher's z of a correlation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import beta, rankdata, t

LEVEL = 0.9
"""Of the intervals of all figures: 5% on each side, as the verdict may be "better" by chance in 5% of tables."""
DEPENDENCE = 1.25
"""By how much the intervals of figures are widened: cross-validated errors depend on each other, as their models share
rows (Bates et al. 2024), which no resampling of them sees. In tables of 20 rows figures varied 1.24 to 1.33 times as
much as resamples of them, and intervals of 90% held 76 to 81%; widened, 87 to 90% (docs/prediction.md)."""
NUM_RESAMPLES = 1000
"""The half width of an interval then has a relative standard error of 2% (one over the root of 2 x 1000)."""
TINY = 1e-30
"""In place of an error of 0, whose logarithm is undefined."""

Scale = tuple[Callable[[Any], Any], Callable[[Any], Any]]
PLAIN: Scale = (lambda x: x, lambda x: x)
POSITIVE: Scale = (lambda x: np.log(np.maximum(x, TINY)), np.exp)
BELOW_ONE: Scale = (lambda x: -np.log(np.maximum(1 - x, TINY)), lambda y: 1 - np.exp(-y))
CORRELATION: Scale = (lambda x: np.arctanh(np.clip(x, -1 + 1e-12, 1 - 1e-12)), np.tanh)
SCORE_SCALES = {"rmse": POSITIVE, "mae": POSITIVE, "r2": BELOW_ONE, "rank_correlation": CORRELATION}


def draw_resamples(num_rows: int, groups: np.ndarray | None, seed: int) -> np.ndarray:
    """How often each row is in each resample, (NUM_RESAMPLES, n): a group (n,) is drawn whole; None: rows are."""
    codes = np.arange(num_rows) if groups is None else np.unique(groups, return_inverse=True)[1]
    num_units = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(num_units, np.full(num_units, 1 / num_units), NUM_RESAMPLES)
    return drawn[:, codes].astype(np.float64)


def interval(
    value: float, resampled: np.ndarray, num_units: int, scale: Scale = PLAIN, widened: float = DEPENDENCE
) -> list[float]:
    """Both ends of a figure's interval of level ``LEVEL``.

    Args:
        resampled: the figure in each resample, (NUM_RESAMPLES,).
        num_units: rows, or groups where rows are grouped.
    """
    to_normal, back = scale
    # A resample's variance is (n - 1) / n times that of a sample.
    spread = to_normal(resampled).std() * np.sqrt(num_units / (num_units - 1))
    half = widened * t.ppf((1 + LEVEL) / 2, num_units - 1) * spread
    middle = to_normal(value)
    return [float(back(middle - half)), float(back(middle + half))]


def scores(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``rmse`` and ``mae`` in the target's unit, ``r2``, and Spearman's rank correlation ``rank_correlation``.

    Where all measured outcomes are equal, or all predictions, r2 or the correlation is undefined, and 0 here.

    Args:
        measured: (n,).
        predicted: (n,).
    """
    found = _weighted_scores(measured, predicted, np.ones((1, len(measured))))
    return {name: float(value[0]) for name, value in found.items()}


def score_intervals(
    measured: np.ndarray, predicted: np.ndarray, resamples: np.ndarray, num_units: int
) -> dict[str, list[float]]:
    """The interval of each of ``scores``; ``resamples`` are those of ``draw_resamples``."""
    resampled, values = _weighted_scores(measured, predicted, resamples), scores(measured, predicted)
    return {name: interval(values[name], resampled[name], num_units, scale) for name, scale in SCORE_SCALES.items()}


def _weighted_scores(measured: np.ndarray, predicted: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The scores under each row of weights, (k,) each; ``weights``: (k, n)."""
    errors, shares = measured - predicted, weights / weights.sum(axis=1, keepdims=True)
    mse, variance = shares @ errors**2, _covariance(measured, measured, shares)
    # Spearman's correlation is Pearson's of the ranks. Those of the whole table stay: a resample has no others.
    ranks, others = rankdata(measured), rankdata(predicted)
    norms = np.sqrt(_covariance(ranks, ranks, shares) * _covariance(others, others, shares))
    has_ranks = norms > 1e-9
    return {
        "rmse": np.sqrt(mse),
        "mae": shares @ np.abs(errors),
        "r2": np.where(variance > 0, 1 - mse / np.where(variance > 0, variance, 1), 0.0),
        "rank_correlation": np.where(
            has_ranks, _covariance(ranks, others, shares) / np.where(has_ranks, norms, 1), 0.0
        ),
    }


def _covariance(x: np.ndarray, y: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Of two (n,) arrays under each row of shares (k, n), which sum to 1: (k,), rounding below 0 cut off for x = y."""
    x, y = x - x.mean(), y - y.mean()
    found = shares @ (x * y) - (shares @ x) * (shares @ y)
    return np.maximum(found, 0) if x is y or np.array_equal(x, y) else found


def reduction_of_rmse(
    errors: np.ndarray, errors_of_mean: np.ndarray, resamples: np.ndarray, num_units: int
) -> dict[str, Any]:
    """By what share a predictor's RMSE is below that of the mean, on the same held-out rows: the verdict.

    Errors of cross-validation depend on each other, but where features say nothing, a model that is fitted to them errs
    more than the mean does. So the interval is not widened: on noise the verdict was "better" in 0.5 to 3.5% of tables
    (docs/prediction.md). With the corrected test of Nadeau and Bengio (2003) it never was, and a signal as large as the
    noise was found in 10% of tables of 30 rows in place of 38%.

    Args:
        errors: of the predictor, (n,): each by the model of the fold that held the row out.
        errors_of_mean: of the mean of the rows that each fold was fitted on, (n,).
        resamples: of ``draw_resamples``.

    Returns:
        ``better``: whether the whole interval is above 0; ``rmse_reduction``, as a share; ``interval``: both ends.
    """
    mse, mse_of_mean = (e**2 for e in (errors, errors_of_mean))
    ratio = float(np.sqrt(mse.mean() / max(mse_of_mean.mean(), TINY)))
    resampled = np.sqrt(resamples @ mse / np.maximum(resamples @ mse_of_mean, TINY))
    ends = interval(1 - ratio, 1 - resampled, num_units, BELOW_ONE, widened=1)
    return {"better": ends[0] > 0, "rmse_reduction": 1 - ratio, "interval": ends}


def share_interval(share: float, num_units: int) -> list[float]:
    """The interval of a share of rows, exact (Clopper and Pearson 1934): at its ends it is as wide as it must be.

    Args:
        num_units: rows, or groups: the rows of a group count as one, as if they were all inside or all outside.
    """
    num_inside, tail = share * num_units, (1 - LEVEL) / 2
    low = beta.ppf(tail, num_inside, num_units - num_inside + 1) if share > 0 else 0.0
    high = beta.ppf(1 - tail, num_inside + 1, num_units - num_inside) if share < 1 else 1.0
    return [float(low), float(high)]
