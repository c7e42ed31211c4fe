"""Rows that are unlike those of the fit: in one value, or in how a value goes with the row's others.

Not the range of each feature: of rows from the same distribution 80% are beyond one of 33 ranges where the fit had 20
rows, and half where it had 50. Tried beside this: an isolation forest (does not see one value that is far off), nearest
neighbours and Mahalanobis' distance (name no feature, and see less): benchmarks/NOTES.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from sklearn.covariance import LedoitWolf

from raylora.predict.conformal import conformal_rank

SHARE = 0.05
"""Of rows from the same distribution, how many are called unlike the fit's."""


@dataclass(frozen=True)
class Novelty:
    """How rows of the fit are distributed: each of p features by itself, and all together. Its fields go to the file.

    Values are made comparable first: their distance from the median, over the spread of the middle half, through
    arcsinh (linear near 0, a logarithm far from it, so that a skewed feature does not hide the others).
    """

    center: np.ndarray
    """(p,): medians."""
    scale: np.ndarray
    """(p,): widths of the middle half of the values."""
    mean: np.ndarray
    """(p,): of the values after arcsinh; ``spread``: their standard deviation."""
    spread: np.ndarray
    precision: np.ndarray
    """(p, p): inverse of their covariance, shrunk (Ledoit and Wolf 2004), as rows may be fewer than features."""
    threshold: float
    """Beyond it a value is unusual: ``SHARE`` of held-out rows of the fit have one that is."""

    def farthest(self, features: pd.DataFrame) -> np.ndarray:
        """The largest distance of each row's values, (rows,)."""
        return self._distances(self._standardize(features)).max(axis=1)

    def unusual(self, features: pd.DataFrame) -> list[str]:
        """For each row the names of its unusual features, the farthest first, as "name, name"; "" where none is.

        One wild value makes others look odd beside it. So the farthest is replaced by what the others let expect before
        the next one is looked for.
        """
        return [", ".join(features.columns[self._unusual_columns(row)]) for row in self._standardize(features)]

    def _unusual_columns(self, row: np.ndarray) -> list[int]:
        named: list[int] = []
        while len(named) < len(row):
            distances = self._distances(row)
            distances[named] = 0
            farthest = int(distances.argmax())
            if distances[farthest] <= self.threshold:
                break
            named.append(farthest)
            row = row.copy()
            row[farthest] -= row @ self.precision[:, farthest] / self.precision[farthest, farthest]
        return named

    def _distances(self, z: np.ndarray) -> np.ndarray:
        """How many standard deviations off each value is, of rows (..., p); 0 where it is null.

        The larger of two: from the feature's mean; and from what the row's other features let expect (the residual of
        a regression on them, read off the precision matrix).
        """
        off_others = z @ self.precision / np.sqrt(np.diag(self.precision))
        return np.maximum(np.abs(z), np.abs(off_others))

    def fits(self, num_columns: int) -> bool:
        """Whether its arrays are those of so many features; a file may hold anything."""
        vectors = (self.center, self.scale, self.mean, self.spread)
        is_square = self.precision.shape == (num_columns, num_columns)
        return is_square and all(v.shape == (num_columns,) for v in vectors) and isinstance(self.threshold, float)

    def _standardize(self, features: pd.DataFrame) -> np.ndarray:
        z = (np.arcsinh((features.to_numpy() - self.center) / self.scale) - self.mean) / self.spread
        return np.nan_to_num(z)


def fit_novelty(features: pd.DataFrame, folds: Sequence[Any]) -> Novelty:
    """What rows like these look like; the threshold comes from rows that each fold holds out.

    A new row is as likely to be beyond a row of the fit as the other way round: it is beyond 19 of 20 held-out rows in
    5% of cases, whatever the distribution (Vovk et al. 2005; the folds make it approximate). With fewer than 19 rows it
    must be beyond all of them, which is one case in n + 1.

    Args:
        features: (n, p), NaN where null.
        folds: of the cross-validation: pairs of the rows that are fitted on and held out.
    """
    farthest = np.empty(len(features))
    for rows, held_out in folds:
        farthest[held_out] = _describe(features.iloc[rows]).farthest(features.iloc[held_out])
    rank = min(conformal_rank(len(farthest), 1 - SHARE), len(farthest))
    return replace(_describe(features), threshold=float(np.sort(farthest)[rank - 1]))


def _describe(features: pd.DataFrame) -> Novelty:
    center, scale = features.median().to_numpy(), (features.quantile(0.75) - features.quantile(0.25)).to_numpy()
    scale = np.where(scale > 0, scale, 1.0)  # half of the rows have the same value, or all values are null
    values = pd.DataFrame(np.arcsinh((features.to_numpy() - center) / scale))
    mean, spread = values.mean().to_numpy(), values.std(ddof=0).to_numpy()
    spread = np.where(spread > 0, spread, 1.0)
    standardized = np.nan_to_num((values.to_numpy() - mean) / spread)
    # A fold in which no feature differs has no covariance; then each distance is the plain one.
    has_spread = standardized.any()
    precision = LedoitWolf(assume_centered=True).fit(standardized).precision_ if has_spread else np.eye(len(center))
    return Novelty(center, scale, mean, spread, precision, np.inf)
