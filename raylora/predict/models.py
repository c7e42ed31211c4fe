"""Candidate models and baselines: scikit-learn pipelines that accept NaN.

A linear model and a forest err on different rows, so their mean is a candidate too: 5-fold RMSE 0.0106, against 0.0112
and 0.0115 alone (benchmarks/NOTES.md). The candidate is chosen by cross-validation on the rows it is fitted on, never
by held-out rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import ExtraTreesRegressor, VotingRegressor
from sklearn.feature_selection import SelectKBest, f_regression
from sklearn.impute import SimpleImputer
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, KFold, cross_val_predict
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import PowerTransformer, SplineTransformer, StandardScaler

PENALTIES = np.logspace(-3, 4, 15)
"""Ridge's penalties, half a decade apart; ``RidgeCV`` chooses one by leave-one-out on the rows it is fitted on."""


def _imputed(*steps: tuple[str, Any]) -> Pipeline:
    """A pipeline that first replaces nulls by the median of the rows it is fitted on."""
    # A column that is null in all of a fold's rows is kept (as zeros): later steps see the same columns in every fold.
    return Pipeline([("fill", SimpleImputer(strategy="median", keep_empty_features=True)), *steps])


def make_linear() -> Pipeline:
    """Ridge on standardized columns."""
    return _imputed(("scale", StandardScaler()), ("ridge", RidgeCV(PENALTIES)))


def make_power() -> Pipeline:
    """Ridge on columns that Yeo-Johnson's power transform has made symmetric: perplexities and lengths are skewed."""
    # Not standardized before it: values around 0 leave the transform little to do (RMSE 0.0118 in place of 0.0112).
    return _imputed(("power", PowerTransformer()), ("ridge", RidgeCV(PENALTIES)))


def make_forest(seed: int) -> Pipeline:
    """Extremely randomized trees: RMSE 0.0115, a random forest's is 0.0132, gradient boosting's 0.0131."""
    trees = ExtraTreesRegressor(100, max_features=0.5, min_samples_leaf=2, random_state=seed)
    return _imputed(("trees", trees))


def make_candidates(seed: int) -> dict[str, Any]:
    """The models to choose from, by name; ``blend`` is the mean of ``power`` and ``forest``.

    Plain ridge is one of them for small tables: with 40 rows its RMSE was 0.0225, the forest's 0.0251.
    """
    parts = [("power", make_power()), ("forest", make_forest(seed))]
    return {"linear": make_linear(), **dict(parts), "blend": VotingRegressor(parts)}


def make_baselines() -> dict[str, Any]:
    """What a predictor must beat: the mean, a spline of the best feature (chosen within each fold), plain ridge."""
    spline = SplineTransformer(4, degree=3, extrapolation="constant")
    single = [("scale", StandardScaler()), ("one", SelectKBest(f_regression, k=1)), ("spline", spline)]
    return {
        "mean": DummyRegressor(),
        "best single feature": _imputed(*single, ("ridge", RidgeCV(PENALTIES))),
        "linear": make_linear(),
    }


def make_folds(num_folds: int, groups: np.ndarray | None, num_rows: int, seed: int) -> Any:
    """A shuffled K-fold; with ``groups`` (n,) a grouped one, where all rows of a group are in the same fold.

    It has ``num_folds`` folds, or fewer where there are fewer rows (or groups) than that.
    """
    if groups is None:
        return KFold(min(num_folds, num_rows), shuffle=True, random_state=seed)
    return GroupKFold(min(num_folds, len(np.unique(groups))), shuffle=True, random_state=seed)


def choose_model(features: Any, target: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[str, Any]:
    """The name of the candidate with the lowest 5-fold RMSE on these rows, and the model, fitted on all of them.

    Args:
        features: (n, columns), NaN where null.
        target: (n,).
        groups: (n,), or None where rows are independent.
    """
    candidates = make_candidates(seed)
    # Another shuffle than the outer folds' of validation.py, which take ``seed``.
    folds = list(make_folds(5, groups, len(target), seed + 1).split(features, target, groups))
    out_of_fold = {
        name: cross_val_predict(model, features, target, cv=folds)
        for name, model in candidates.items()
        if name != "blend"
    }
    # The blend's out-of-fold predictions, without fitting its two parts again.
    out_of_fold["blend"] = (out_of_fold["power"] + out_of_fold["forest"]) / 2
    best = min(out_of_fold, key=lambda name: float(((out_of_fold[name] - target) ** 2).sum()))
    return best, candidates[best].fit(features, target)
