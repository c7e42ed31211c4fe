"""The models behind one interface, and the baselines beside them: scikit-learn pipelines that take NaN.

A linear model and a forest err in different places, so their mean is a candidate too (benchmarks/NOTES.md). Which of
them is used is chosen by cross-validation inside the rows at hand, never by rows that are held out.
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


def _filled(*steps: tuple[str, Any]) -> Pipeline:
    """Null values become the median of the rows that a model is fitted on."""
    return Pipeline([("fill", SimpleImputer(strategy="median", keep_empty_features=True)), *steps])


def make_linear() -> Pipeline:
    return _filled(("scale", StandardScaler()), ("ridge", RidgeCV(PENALTIES)))


def make_power() -> Pipeline:
    """Ridge on columns that Yeo-Johnson's power transform has made symmetric: perplexities and lengths are skewed."""
    return _filled(("power", PowerTransformer()), ("ridge", RidgeCV(PENALTIES)))


def make_forest(seed: int) -> Pipeline:
    trees = ExtraTreesRegressor(100, max_features=0.5, min_samples_leaf=2, random_state=seed)
    return _filled(("trees", trees))


def make_candidates(seed: int) -> dict[str, Any]:
    parts = [("power", make_power()), ("forest", make_forest(seed))]
    return {"linear": make_linear(), **dict(parts), "blend": VotingRegressor(parts)}


def make_baselines() -> dict[str, Any]:
    """What a predictor must beat: the mean, the best single feature (chosen within each fold), plain ridge."""
    spline = SplineTransformer(4, degree=3, extrapolation="constant")
    single = [("scale", StandardScaler()), ("one", SelectKBest(f_regression, k=1)), ("spline", spline)]
    return {
        "mean": DummyRegressor(),
        "best single feature": _filled(*single, ("ridge", RidgeCV(PENALTIES))),
        "linear": make_linear(),
    }


def make_folds(num_folds: int, groups: np.ndarray | None, num_rows: int, seed: int) -> Any:
    """Shuffled folds; with groups, all rows of one are in the same fold. As many as asked for, or as there can be."""
    if groups is None:
        return KFold(min(num_folds, num_rows), shuffle=True, random_state=seed)
    return GroupKFold(min(num_folds, len(np.unique(groups))), shuffle=True, random_state=seed)


def choose_model(features: Any, target: np.ndarray, groups: np.ndarray | None, seed: int) -> tuple[str, Any]:
    """The candidate with the lowest 5-fold RMSE on these rows, fitted on all of them, and its name."""
    candidates = make_candidates(seed)
    folds = list(make_folds(5, groups, len(target), seed + 1).split(features, target, groups))
    alone = [name for name in candidates if name != "blend"]
    found = {name: cross_val_predict(candidates[name], features, target, cv=folds) for name in alone}
    found["blend"] = (found["power"] + found["forest"]) / 2  # what the blend would say, without fitting both again
    best = min(found, key=lambda name: float(((found[name] - target) ** 2).sum()))
    return best, candidates[best].fit(features, target)
