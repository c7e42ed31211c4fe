"""Changes of many datasets, shrunk towards their mean: the greatest of many noisy ones is partly luck."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from raylora.mmlu.paired import CRITICAL, Floats

MIN_CHANGES = 3
"""Of fewer, the spread is not known."""


def stderr_of_interval(low: npt.ArrayLike, high: npt.ArrayLike) -> Floats:
    """The standard error that belongs to a 95% interval. Unlike that of the counts, it is not 0 where none differ."""
    width: Floats = np.asarray(high, dtype=float) - np.asarray(low, dtype=float)
    return width / (2 * CRITICAL)


def shrunk(changes: npt.ArrayLike, stderrs: npt.ArrayLike) -> Floats:
    """Empirical Bayes estimates of true changes, which are taken as normally distributed around a common mean.

    The variance of the true changes is that of DerSimonian and Laird (1986, Controlled Clinical Trials 7, 177-188):
    what the observed ones vary more than their standard errors explain. Each is moved to the mean of all, by the share
    that its own error has in its variance (Efron and Morris 1975, JASA 70, 311-319). With equal errors s and a sample
    variance V of the changes, (V - s^2) / V of its distance to the mean is left, or nothing where V is less.

    A single true change among hundreds that are none is moved too far: a normal distribution has no place for it.

    Args:
        changes, stderrs: (m,), observed changes and their standard errors, above 0; NaN: one that is not known.

    Returns:
        (m,), NaN where not known; NaN throughout where fewer than ``MIN_CHANGES`` are known.
    """
    observed, errors = np.asarray(changes, dtype=float), np.asarray(stderrs, dtype=float)
    is_known = ~np.isnan(observed + errors)
    estimates = np.full(len(observed), np.nan)
    if is_known.sum() < MIN_CHANGES:
        return estimates
    observed, variances = observed[is_known], errors[is_known] ** 2
    weights = 1 / variances
    mean = np.average(observed, weights=weights)
    excess = (weights * (observed - mean) ** 2).sum() - (len(observed) - 1)
    between = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum()))
    mean = np.average(observed, weights=1 / (variances + between))
    estimates[is_known] = mean + between / (between + variances) * (observed - mean)
    return estimates
