"""How good is a predictor on rows it has not seen? Nested cross-validation, baselines, what each feature is worth.

The outer folds hold rows out; everything else, the choice of the model too, sees the other rows only. The models of the
outer folds and their errors are kept: the intervals of a predictor are made of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from joblib import Parallel, delayed
from scipy.stats import spearmanr
from sklearn.base import clone
from sklearn.model_selection import cross_val_predict

from raylora.predict.models import choose_model, make_baselines, make_candidates, make_folds
from raylora.predict.predictor import Predictor, conformal_rank
from raylora.predict.tables import FEATURE_GROUPS, Known, group_of, needs_probe

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
NUM_SHUFFLES = 3


def fit_predictor(
    known: Known,
    target: str,
    coverage: float = 0.9,
    num_folds: int = 5,
    seed: int = 0,
    threads: int | None = None,
    explain: bool = True,
) -> tuple[Predictor, pd.DataFrame]:
    """A predictor of ``target``, and its held-out predictions: ``name``, ``measured``, ``predicted``, ``fold``.

    Args:
        explain: measure what features and groups are worth, which takes as long again.
    """
    features, measured = known.features, known.target
    folds = list(make_folds(num_folds, known.groups, len(measured), seed).split(features, measured, known.groups))
    parallel = Parallel(n_jobs=min(threads or os.cpu_count() or 1, len(folds)))
    inside = [(features.iloc[rows], measured[rows], _part(known.groups, rows)) for rows, _ in folds]
    chosen = parallel(delayed(choose_model)(*rows, seed) for rows in inside)
    predicted, fold_of = np.empty(len(measured)), np.empty(len(measured), dtype=np.int64)
    for number, ((_, model), (_, held_out)) in enumerate(zip(chosen, folds, strict=True)):
        predicted[held_out], fold_of[held_out] = model.predict(features.iloc[held_out]), number
    kind, model = choose_model(features, measured, known.groups, seed)
    residuals = measured - predicted
    card = {
        **_identity(known, target, coverage, seed),
        "kind": kind,
        "kinds_of_folds": [name for name, _ in chosen],
        "num_folds": len(folds),
        **scores(measured, predicted),
        "coverage_by_level": coverage_by_level(residuals, fold_of),
        "baselines": _baselines(known, folds),
    }
    if explain:
        card["importance"] = _importance(known, folds, [m for _, m in chosen], parallel, seed)
        card["feature_groups"] = _group_gains(known, kind, folds, parallel, seed)
    names = {"name": known.names, "measured": measured, "predicted": predicted, "fold": fold_of}
    return Predictor(card, model, [m for _, m in chosen], fold_of, residuals), pd.DataFrame(names)


def _identity(known: Known, target: str, coverage: float, seed: int) -> dict[str, Any]:
    """What a predictor was made of. Plain values only: they are printed, and read by other versions."""
    columns = list(known.features.columns)
    ends = known.features.agg(["min", "max"])
    return {
        "target": target,
        "columns": columns,
        "ranges": {name: [float(ends[name]["min"]), float(ends[name]["max"])] for name in columns},
        "columns_with_nulls": [name for name in columns if known.features[name].isna().any()],
        "needs_probe": needs_probe(columns),
        "coverage": coverage,
        "seed": seed,
        "num_rows": len(known.target),
        "group_column": known.group_column,
        "num_groups": None if known.groups is None else len(np.unique(known.groups)),
        "base_models": known.base_models,
        "notes": known.notes,
        "scikit_learn": sklearn.__version__,
    }


def _part(groups: np.ndarray | None, rows: np.ndarray) -> np.ndarray | None:
    return None if groups is None else groups[rows]


def scores(measured: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """``rmse`` and ``mae`` in the target's unit, ``r2``, and Spearman's rank correlation ``rank_correlation``."""
    errors = measured - predicted
    spread = float(((measured - measured.mean()) ** 2).sum())
    ranked = np.ptp(predicted) > 0 and spread > 0
    return {
        "rmse": float(np.sqrt((errors**2).mean())),
        "mae": float(np.abs(errors).mean()),
        "r2": 1 - float((errors**2).sum()) / spread if spread else 0.0,
        "rank_correlation": float(spearmanr(measured, predicted).statistic) if ranked else 0.0,
    }


def coverage_by_level(residuals: np.ndarray, fold_of: np.ndarray) -> dict[str, float]:
    """Share of rows within an interval as wide as the errors of the *other* folds make it, by nominal level."""
    errors, found = np.abs(residuals), {}
    for level in LEVELS:
        inside = np.zeros(len(errors), dtype=bool)
        for fold in np.unique(fold_of):
            others = np.sort(errors[fold_of != fold])
            rank = conformal_rank(len(others), level)
            inside[fold_of == fold] = errors[fold_of == fold] <= (others[rank - 1] if rank <= len(others) else np.inf)
        found[f"{level:g}"] = float(inside.mean())
    return found


def _baselines(known: Known, folds: Sequence[Any]) -> dict[str, dict[str, float]]:
    return {
        name: scores(known.target, cross_val_predict(model, known.features, known.target, cv=folds))
        for name, model in make_baselines().items()
    }


def _importance(
    known: Known, folds: Sequence[Any], models: Sequence[Any], parallel: Parallel, seed: int
) -> dict[str, list[float]]:
    """Rise of the RMSE on held-out rows when a feature is shuffled: mean and standard deviation over shuffles.

    Permutation importance (Breiman 2001), over the whole table: within a fold of few datasets, a feature may have one
    value, and a shuffle there would change nothing.
    """
    random, columns = np.random.default_rng(seed), known.features.columns
    orders = [random.permutation(len(known.target)) for _ in range(NUM_SHUFFLES)]

    def of_fold(model: Any, held_out: np.ndarray) -> np.ndarray:
        """Squared errors, shuffles x (features + 1) x rows; the last without a shuffle."""
        rows, measured = known.features.iloc[held_out], known.target[held_out]
        plain = (model.predict(rows) - measured) ** 2

        def shuffled(column: str, order: np.ndarray) -> np.ndarray:
            values = known.features[column].to_numpy()[order[held_out]]
            return (model.predict(rows.assign(**{column: values})) - measured) ** 2

        return np.stack([[*(shuffled(column, order) for column in columns), plain] for order in orders])

    parts = parallel(delayed(of_fold)(m, held_out) for m, (_, held_out) in zip(models, folds, strict=True))
    rmse = np.sqrt(np.concatenate(parts, axis=2).mean(axis=2))
    found = rmse[:, :-1] - rmse[:, -1:]
    order = np.argsort(-found.mean(axis=0), kind="stable")
    return {columns[i]: [float(found[:, i].mean()), float(found[:, i].std())] for i in order}


def _group_gains(
    known: Known, kind: str, folds: Sequence[Any], parallel: Parallel, seed: int
) -> dict[str, dict[str, Any]]:
    """Each group of features: RMSE without it and with it alone, the kind of model as chosen, and seconds a dataset.

    ``static`` seconds are for semantic, perplexity and activations together, which one pass makes, and for text, whose
    own are known in newer tables.
    """
    columns = list(known.features.columns)
    groups = {name: [c for c in columns if group_of(c) == name] for name in FEATURE_GROUPS}
    groups = {name: own for name, own in groups.items() if own}
    sets = {("all", ""): columns}
    for name, own in groups.items():
        sets |= {("alone", name): own, ("without", name): [c for c in columns if c not in own]}
    sets = {key: own for key, own in sets.items() if own}
    model = make_candidates(seed)[kind]

    def rmse(own: list[str]) -> float:
        found = cross_val_predict(clone(model), known.features[own], known.target, cv=folds)
        return scores(known.target, found)["rmse"]

    found = dict(zip(sets, parallel(delayed(rmse)(own) for own in sets.values()), strict=True))
    return {
        name: {
            "num_columns": len(own),
            "rmse_without": found.get(("without", name)),
            "rmse_alone": found[("alone", name)],
            "gain": found[("without", name)] - found[("all", "")] if ("without", name) in found else None,
            "seconds": seconds_of(known.seconds, name, own),
        }
        for name, own in groups.items()
    }


def seconds_of(seconds: dict[str, float], group: str, columns: Sequence[str]) -> float | None:
    """Mean seconds a dataset that a group costs: known where the table has them, 0 for hyperparameters."""
    if group == "hyperparameters":
        return 0.0
    if group == "text" and "text" in seconds:
        return seconds["text"]  # the one that no model is needed for
    return seconds.get("probe" if needs_probe(columns) else "static")
