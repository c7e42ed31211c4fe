"""What several trainings of one dataset, each with a seed of its own, say about the next one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.stats import norm, t

MIN_P_VALUE = 1e-12
"""Smaller p-values are given as this one: so far out no distribution is known."""


@dataclass(frozen=True)
class ChangeOverSeeds:
    """The change that a training with a fresh seed makes, on all questions of the kind that was asked.

    The interval holds it with a probability of ``level``: it counts the noise of the questions and that of the seeds.
    """

    mean: float
    low: float
    high: float
    p_value: float
    """The smallest 1 - ``level`` at which the interval leaves 0 out."""
    seed_std: float
    """Sample standard deviation of the changes over seeds, on the questions asked."""
    num_seeds: int


def change_over_seeds(
    differences: np.ndarray, weights: np.ndarray | None = None, level: float = 0.95
) -> ChangeOverSeeds:
    """The change of accuracy over trainings with several seeds, with an interval for a fresh one.

    The observed changes are those of a two-way layout with random effects of seeds and questions. A fresh seed's change
    differs from the mean of N by its own effect, by their mean effect (together 1 + 1/N times the variance of the
    seeds), and by the sampling of the questions. The variance of N observed changes holds the seeds' and a part of the
    questions', which is taken off. The parts of the interval are added as squares, each with its own quantile: that of
    Student's t for the seeds, the normal one for the questions (MOVER: Zou and Donner 2008). In simulations it holds 94
    to 97% at 95 (benchmarks/statistics.py), and more where seeds make no difference or next to no answer differs.

    Args:
        differences: (N, Q): 1 where the training with that seed made an answer right, -1 where it made one wrong, else
            0; N is at least 2.
        weights: (Q,), of mean 1: how much each question counts, for a balanced accuracy. None: all alike.

    Raises:
        ValueError: there are fewer than two seeds or questions.
    """
    num_seeds, num_questions = differences.shape
    if num_seeds < 2 or num_questions < 2:
        raise ValueError("an interval over seeds needs two seeds and two questions")
    weighted = differences * (1.0 if weights is None else weights)
    of_seeds, of_questions = weighted.mean(axis=1), weighted.mean(axis=0)
    mean = float(weighted.mean())
    residuals = weighted - of_seeds[:, None] - of_questions + mean
    noise = float((residuals**2).sum()) / ((num_seeds - 1) * (num_questions - 1) * num_questions)
    seeds, questions = float(of_seeds.var(ddof=1)), float(of_questions.var(ddof=1)) / num_questions
    growth = 1 + 1 / num_seeds

    def half_width(level: float) -> float:
        quantile, normal = t.ppf((1 + level) / 2, num_seeds - 1), norm.ppf((1 + level) / 2)
        of_seeds = max(0.0, quantile**2 * growth * seeds - normal**2 * growth * noise)
        # Where few answers differ their variance says too little. Tango's interval ends here where none does.
        at_least = normal**2 / (num_questions + normal**2)
        return math.sqrt(of_seeds + max(normal**2 * questions, at_least**2))

    width = half_width(level)
    low, high = max(-1.0, mean - width), min(1.0, mean + width)
    return ChangeOverSeeds(mean, low, high, _p_value(abs(mean), half_width), math.sqrt(seeds), num_seeds)


def _p_value(mean: float, half_width: Callable[[float], float]) -> float:
    """The smallest 1 - level at which an interval of this half width around ``mean`` leaves 0 out."""
    if half_width(1 - MIN_P_VALUE) < mean:
        return MIN_P_VALUE
    return 1 - float(brentq(lambda level: half_width(level) - mean, 0.0, 1 - MIN_P_VALUE))
