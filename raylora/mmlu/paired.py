"""Two models' answers to the same questions: intervals and p-values of a change, and whether it is more than a letter.

What is said of right answers is computed elementwise from counts: ``gained``, questions that only the new model has
right; ``lost``, those that only the old one has right; ``num``, all questions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, false_discovery_control, norm, ttest_1samp

ALPHA = 0.05
"""The level of every test: an adjusted p-value below it counts. Intervals have 1 - ALPHA, 95%."""
CRITICAL = float(norm.ppf(1 - ALPHA / 2))
LETTER_MOVED = "its favourite letter moved"
"""What a significant change of accuracy is called that goes away under balanced accuracy."""
NUM_HALVINGS = 45
"""Of the range of a limit, -1 to 1: it is then known to 6e-14."""
SAME = 1e-12
"""Probabilities that differ by less are equal: float64 rounds a softmax to 1e-16."""

Floats = npt.NDArray[np.float64]
Counts = npt.ArrayLike


def change_interval(gained: Counts, lost: Counts, num: Counts, correction: float = 1.0) -> tuple[Floats, Floats]:
    """The 95% score interval of a difference of paired proportions (Tango 1998, Statistics in Medicine 17, 891-908).

    It holds every difference d that a two-sided test at 5% does not reject: ``|gained - lost - num d| - correction`` is
    at most 1.96 standard deviations, the deviation being that of the most likely probabilities whose difference is d.

    Args:
        gained, lost, num: counts, of any shapes that fit each other; ``num`` is 1 or more.
        correction: for continuity (Chang et al. 2024, Journal of Applied Statistics). With 1, as in McNemar's corrected
            test, the interval leaves out 0 where the exact test's p-value is below 0.05; the only exceptions among up
            to 3000 differing answers have p-values of 0.0487 to 0.05. With 0 it is Tango's own, which leaves out 0 at 4
            gained and none lost, where the p-value is 0.125.

    Returns:
        Low and high limits, -1 to 1.
    """
    arrays = np.broadcast_arrays(*(np.asarray(counts, dtype=float) for counts in (gained, lost, num)))
    gains, losses, sizes = arrays
    return _low_limit(gains, losses, sizes, correction), -_low_limit(losses, gains, sizes, correction)


def _low_limit(gained: Floats, lost: Floats, num: Floats, correction: float) -> Floats:
    """By halving: unlike the quartic's roots, it cannot fail, and takes arrays."""
    low, high = np.full(gained.shape, -1.0), (gained - lost) / num
    for _ in range(NUM_HALVINGS):
        middle = (low + high) / 2
        # Tango's equation (6): the most likely share of lost questions where the difference is ``middle``.
        linear = (2 * num - gained + lost) * middle - gained - lost
        root = np.sqrt(np.maximum(linear**2 + 8 * num * lost * middle * (1 - middle), 0))
        share_lost = (root - linear) / (4 * num)
        variance = np.maximum(num * (2 * share_lost + middle * (1 - middle)), 0)
        is_rejected = gained - lost - num * middle - correction > CRITICAL * np.sqrt(variance)
        low, high = np.where(is_rejected, middle, low), np.where(is_rejected, high, middle)
    return low


def balanced_change(gained: Counts, lost: Counts, num: Counts) -> tuple[Floats, Floats, Floats]:
    """The change of balanced accuracy, the mean of the changes by right letter, with its 95% interval.

    A model that answers one letter more often gains where that letter is right, and loses where others are: accuracy
    moves with how often the letter is right, balanced accuracy does not.

    The letters' own intervals (Tango's, without correction) are combined by MOVER (Zou and Donner 2008, Statistics in
    Medicine 27, 1693-1702): each limit lies as far from the change as the root of the sum of the letters' squared
    distances, times 1 / K for K letters. With the correction in each letter, 57 questions gave an interval up to 60%
    wider than that of accuracy itself; without, it covers 95%, or 94.6% at the least (benchmarks/NOTES.md).

    Args:
        gained, lost, num: counts, (..., letters). Letters that are never right have a ``num`` of 0 and do not count.

    Returns:
        The change, its low and its high limit, each (...).
    """
    gains, losses, sizes = (np.asarray(counts, dtype=float) for counts in (gained, lost, num))
    weights = (sizes > 0) / (sizes > 0).sum(axis=-1, keepdims=True)
    sizes = np.maximum(sizes, 1)
    changes = (gains - losses) / sizes
    lows, highs = change_interval(gains, losses, sizes, correction=0)
    change = (weights * changes).sum(axis=-1)
    below, above = (np.sqrt(((weights * gap) ** 2).sum(axis=-1)) for gap in (changes - lows, highs - changes))
    return change, np.maximum(change - below, -1), np.minimum(change + above, 1)


def mean_change(
    differences: npt.ArrayLike, bound: float = 1.0
) -> tuple[float | None, float | None, float | None, float | None]:
    """The mean of the differences of two models' probabilities, question by question, by the paired t-test.

    Student's t and not a bootstrap: its p-values go below the 1 / resamples at which a bootstrap's end, which an
    adjustment over hundreds of datasets needs; it has no seed; and the differences lie between -1 and 1, so that their
    mean is close to normal. It takes no account of letters being calibrated by the same questions: where right
    letters are about as frequent as in MMLU it covers 92 to 96% all the same (benchmarks/NOTES.md).

    Args:
        differences: (N,), new - old.
        bound: what no difference can be beyond, 1 for probabilities.

    Returns:
        The mean, the low and the high limit of its 95% interval, -bound to bound, and the two-sided p-value. Where all
        differences are 0, the models are the same: no width, and a p-value of 1. Where they are equal and not 0, and
        for one question, nothing says how far the mean may be off: limits and p-value are None. NaN among the
        differences, a model without log-likelihoods, or no question: all four are None.
    """
    values = np.asarray(differences, dtype=float)
    if not len(values) or np.isnan(values).any():
        return None, None, None, None
    mean = float(values.mean())
    if np.abs(values).max() < SAME:
        return mean, mean, mean, 1.0
    if np.ptp(values) < SAME:
        return mean, None, None, None
    result = ttest_1samp(values, 0)
    low, high = result.confidence_interval(1 - ALPHA)
    return mean, max(-bound, float(low)), min(bound, float(high)), float(result.pvalue)


def mcnemar(gained: Counts, lost: Counts) -> Floats:
    """Two-sided p-values of McNemar's exact test (1947): the binomial test on the questions that differ.

    Twice one tail, as the binomial distribution with p = 1/2 is symmetric; 1 where no question differs.
    """
    gains, losses = np.asarray(gained), np.asarray(lost)
    p_values: Floats = np.minimum(1.0, 2 * binom.cdf(np.minimum(gains, losses), gains + losses, 0.5))
    return p_values


def holm(p_values: npt.ArrayLike) -> Floats:
    """P-values (m,) adjusted for m tests (Holm 1979), in the same order. NaN, no test, stays NaN and is not counted.

    The k-th smallest is multiplied by m - k + 1; each is at least as large as the one before it, and at most 1.
    """
    raw = np.asarray(p_values, dtype=float)
    order = np.argsort(raw, kind="stable")[: np.count_nonzero(~np.isnan(raw))]
    adjusted = np.full(len(raw), np.nan)
    adjusted[order] = np.maximum.accumulate(raw[order] * np.arange(len(order), 0, -1)).clip(max=1.0)
    return adjusted


def false_discovery(p_values: npt.ArrayLike) -> Floats:
    """P-values (m,) adjusted by Benjamini and Hochberg (1995), in the same order. NaN stays NaN and is not counted.

    Of those below 0.05, 5% at most are false on average, if the tests are independent or rise and fall together. Holm
    promises more, that not one is false, and finds less: here as many as pass may hold some that are not there.
    """
    adjusted = np.asarray(p_values, dtype=float).copy()
    is_known = ~np.isnan(adjusted)
    if is_known.any():
        adjusted[is_known] = false_discovery_control(adjusted[is_known])
    return adjusted


def interval_p_values(change: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike, side: npt.ArrayLike) -> Floats:
    """Two-sided p-values that belong to 95% intervals (Altman and Bland 2011, BMJ 343, d2304): 0.05 where a limit is 0.

    Args:
        change, low, high: (m,).
        side: of 0, on which a change is asked for, 1 or -1: for one on the other side the p-value is 1.
    """
    changes, lows, highs, sides = (np.asarray(values, dtype=float) for values in (change, low, high, side))
    to_zero = np.where(sides > 0, changes - lows, highs - changes)
    p_values: Floats = np.minimum(1, 2 * norm.sf(CRITICAL * sides * changes / np.maximum(to_zero, 1e-12)))
    return p_values


def verdicts(
    p_values: Any,
    change: Any,
    balanced: Any,
    balanced_low: Any,
    balanced_high: Any,
    *,
    adjust: Callable[[npt.ArrayLike], Floats] = holm,
) -> list[str]:
    """What each of m changes of accuracy is: ``gain``, ``loss``, ``letter`` or ``undecided``.

    - A gain or a loss: accuracy changed, and balanced accuracy changed to the same side. The larger of the two
      p-values, Holm-adjusted over all m, is below 0.05. So the chance of even one wrong gain or loss is at most 5%,
      whether nothing changed or favourite letters moved in any number of them.
    - ``letter``: McNemar's p-value passes by itself, adjusted, but the interval of balanced accuracy's change holds 0,
      or lies on the other side: the model's favourite letter moved.
    - Undecided: the rest.

    The p-value of balanced accuracy's change is that which belongs to its interval (``interval_p_values``).

    Args:
        p_values, change: McNemar's, and the changes of accuracy, (m,); NaN is undecided.
        balanced, balanced_low, balanced_high: changes of balanced accuracy with their limits, (m,). NaN, in rows of an
            older raylora: McNemar's test decides alone.
        adjust: ``false_discovery`` in place of Holm: then 5% of gains and losses may be wrong.
    """
    raw, changes, balanced_changes, lows, highs = (
        np.asarray(values, dtype=float) for values in (p_values, change, balanced, balanced_low, balanced_high)
    )
    side = np.sign(changes)
    of_balanced = interval_p_values(balanced_changes, lows, highs, side)
    is_real = adjust(np.where(np.isnan(raw), np.nan, np.fmax(raw, of_balanced))) < ALPHA
    is_letter = (adjust(raw) < ALPHA) & (of_balanced >= ALPHA)
    conditions = [is_real & (side > 0), is_real & (side < 0), is_letter]
    return [str(v) for v in np.select(conditions, ["gain", "loss", "letter"], "undecided")]
