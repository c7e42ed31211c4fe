"""What so many questions can show: the smallest change of accuracy that McNemar's exact test finds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import binom

from raylora.mmlu.paired import ALPHA

POWER = 0.8
"""How often a change that the questions can show is found: 80%, as is usual in planning."""
TYPICAL_SHARE = 0.15
"""Of all questions, those that only one of base and adapter has right, before any adapter is scored. Two models whose
right answers have the correlation r, both with the accuracy p, differ in 2 p (1 - p) (1 - r) of them: 15% for p = 0.5
and r = 0.7, the upper end of what Miller (2024, arXiv 2411.00640) found between different large models."""
NEGLIGIBLE = 1e-9
"""The probability in each tail of the number of differing answers that is left out."""


def chance_to_find(change: float, num: int, share: float, alpha: float = ALPHA) -> float:
    """The probability that McNemar's exact test finds a gain of accuracy, and to the right side.

    The test is conditional: power is computed for each possible number of differing answers, and weighted by its
    probability, that of the binomial distribution (as for EXACT_COND in SAS' PROC POWER; Duffy 1984, Biometrics 40,
    1005-1015). There is no approximation in it but the tails of 1e-9.

    Args:
        change: the true gain, 0 to ``share``. A loss of the same size is found as often.
        num: questions.
        share: of all questions, those whose answer becomes right or wrong, 0 to 1.
        alpha: the two-sided level; of m tests adjusted by Holm, 0.05 / m for the smallest of their p-values.
    """
    if share <= 0:
        return 0.0
    fewest, most = binom.ppf([NEGLIGIBLE, 1 - NEGLIGIBLE], num, share)
    differing = np.arange(int(fewest), int(most) + 1)
    share_lost = (share - change) / (2 * share)
    found = binom.cdf(_most_lost(differing, alpha), differing, share_lost)
    return float((binom.pmf(differing, num, share) * found).sum())


def _most_lost(differing: npt.NDArray[np.int_], alpha: float) -> npt.NDArray[np.float64]:
    """Of so many differing answers, how many may be lost so that the p-value is below ``alpha``; -1: not even none."""
    quantile = np.maximum(binom.ppf(alpha / 2, differing, 0.5), 0)
    most: npt.NDArray[np.float64] = quantile - (2 * binom.cdf(quantile, differing, 0.5) >= alpha)
    return most


def smallest_change(num: int, share: float = TYPICAL_SHARE, num_tests: int = 1) -> float | None:
    """The smallest change of accuracy, 0 to 1, that is found with a probability of 80% (``POWER``) at 5%.

    Args:
        num: questions, 1 or more.
        share: as in ``chance_to_find``; where it is less than the change, the change itself is taken, all of it gains.
        num_tests: over which p-values are Holm-adjusted: the level is 5% / ``num_tests``, which each change meets at
            the worst. Holm is more lenient where others are found too.

    Returns:
        None where no change is found so often, not even from all wrong to all right.
    """

    def lacking(change: float) -> float:
        return chance_to_find(change, num, max(share, change), ALPHA / num_tests) - POWER

    if lacking(1.0) < 0:
        return None
    return float(brentq(lacking, 0.0, 1.0, xtol=1e-6))


def measured_share(gained: npt.ArrayLike, lost: npt.ArrayLike, num: npt.ArrayLike) -> float | None:
    """The share of differing answers of adapters that are scored: their median, as some may have changed a lot.

    Args:
        gained, lost, num: counts, a value each adapter, NaN where one is not known.

    Returns:
        0 to 1; None where it is known of no adapter.
    """
    counts = (np.asarray(values, dtype=float) for values in (gained, lost, num))
    gains, losses, sizes = counts
    shares = ((gains + losses) / sizes)[~np.isnan(gains + losses + sizes)]
    return float(np.median(shares)) if len(shares) else None


def power_line(num: int, num_datasets: int, share: float | None, num_tests: int | None = None) -> str:
    """What ``num`` questions can show, in one line: alone, and after Holm over all datasets.

    Args:
        share: from ``measured_share``; None: ``TYPICAL_SHARE`` is taken.
        num_tests: with several sets of hyperparameters a dataset, how many changes are tested (default: one a dataset).
    """
    taken = TYPICAL_SHARE if share is None else share
    num_tests = num_tests or num_datasets
    tested = f"{num_datasets:,} dataset{'' if num_datasets == 1 else 's'}"
    tested = tested if num_tests == num_datasets else f"{num_tests:,} changes of {tested}"
    alone, adjusted = (smallest_change(num, taken, tests) for tests in (1, num_tests))
    questions = f"{num:,} question{'' if num == 1 else 's'}"
    differing = f"an assumed {taken:.0%}" if share is None else f"{taken:.1%}, as measured,"
    about = f"(at 5%, found in {POWER:.0%} of cases; {differing} of the answers become right or wrong)"
    if alone is None:
        return f"{questions} can show no change of accuracy, however large {about}"
    text = f"{questions} can show changes of accuracy from {100 * alone:.1f} points on"
    if num_tests > 1:
        text += "; none" if adjusted is None else f"; from {100 * adjusted:.1f}"
        text += f" after Holm over {tested}"
    return f"{text} {about}"
