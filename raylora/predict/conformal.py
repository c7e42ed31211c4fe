"""Conformal intervals: ends that hold a promised share of new outcomes, whatever the distribution of errors."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np

from raylora.errors import UserError


def cv_plus(by_fold: np.ndarray, fold_of: np.ndarray, errors: np.ndarray, coverage: float) -> tuple[Any, Any]:
    """Lower and upper ends of CV+ intervals, (m,) each; see ``Predictor.predict``.

    Args:
        by_fold: each fold model's predictions of the m new rows, (folds, m).
        fold_of: the fold that held out each of the n calibration rows, (n,).
        errors: their absolute residuals, (n,).

    Raises:
        UserError: n is too small for this coverage.
    """
    rank = conformal_rank(len(errors), coverage)
    if is_too_few(len(errors), coverage):
        needed = next(n for n in itertools.count(1) if not is_too_few(n, coverage))
        raise UserError(f"--coverage {coverage:g}: needs {needed} rows, the predictor has {len(errors)}")
    per_row = by_fold[fold_of]  # (n, m): the new rows' predictions by the model of each calibration row's fold
    low = np.sort(per_row - errors[:, None], axis=0)[len(errors) - rank]
    high = np.sort(per_row + errors[:, None], axis=0)[rank - 1]
    return low, high


def conformal_rank(num_rows: int, coverage: float) -> int:
    """ceil((n + 1) * coverage): the finite-sample correction (Vovk et al. 2005; Lei et al. 2018)."""
    return math.ceil(round((num_rows + 1) * coverage, 9))  # rounded: 100 * 0.55 is 55.00000000000001 in floats


def is_too_few(num_rows: int, coverage: float) -> bool:
    """Whether so many held-out errors give no interval: it ends at the ``conformal_rank``-th smallest of them."""
    return conformal_rank(num_rows, coverage) > num_rows
