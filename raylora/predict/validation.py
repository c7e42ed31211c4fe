"""How good is a predictor on held-out rows? Nested cross-validation, the verdict, baselines, what features are worth.

Each outer fold holds rows out; everything else, the choice of the model too, sees the other rows only (the inner
cross-validation is ``models.choose_model``). The models of the outer folds and their held-out errors are kept: a
predictor's conformal intervals are made of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import sklearn
from joblib import Parallel, delayed
from sklearn.base import clone
from sklearn.dummy import DummyRegressor
from sklearn.model_selection import cross_val_predict

from raylora.predict.conformal import conformal_rank
from raylora.predict.models import choose_model, make_baselines, make_candidates, make_folds
from raylora.predict.novelty import fit_novelty
from raylora.predict.predictor import Predictor
from raylora.predict.tables import FEATURE_GROUPS, TrainingTable, group_of, needs_probe
from raylora.predict.uncertainty import (
    draw_resamples,
    interval,
    reduction_of_rmse,
    score_intervals,
    scores,
    share_interval,
)

LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Nominal levels at which the coverage of intervals is checked."""
NUM_SHUFFLES = 3
Told = Callable[[str, int, int], None]
"""Called with what is done, how many parts of it are, and of how many."""


def fit_predictor(
    table: TrainingTable,
    target: str,
    coverage: float = 0.9,
    num_folds: int = 5,
    seed: int = 0,
    threads: int | None = None,
    explain: bool = True,
    told: Told = lambda what, done, total: None,
) -> tuple[Predictor, pd.DataFrame]:
    """Fit a predictor of ``target``, and measure it by nested cross-validation.

    Where its held-out errors are not smaller than those of the mean beyond doubt, the predictor is the mean: every
    prediction is, and the intervals are those of the outcomes' spread. Its card still has the regression's figures.

    Args:
        coverage: share of outcomes that its intervals are to hold, 0 to 1.
        num_folds: outer folds; fewer where there are fewer rows or groups.
        threads: processes that fit folds (default: one a core).
        explain: also measure what features and groups are worth, which takes as long again.
        told: hears of the progress.

    Returns:
        The predictor, and the regression's held-out predictions, a row each: ``name``, ``measured``, ``predicted``,
        ``fold``.
    """
    features, measured = table.features, table.target
    folds = list(make_folds(num_folds, table.groups, len(measured), seed).split(features, measured, table.groups))
    # In the calls' order, and each as soon as it and those before it are done.
    parallel = Parallel(n_jobs=min(threads or os.cpu_count() or 1, len(folds)), return_as="generator")
    fits = (
        delayed(choose_model)(features.iloc[rows], measured[rows], _groups_of_rows(table, rows), seed)
        for rows, _ in folds
    )
    fold_fits = _all_of(parallel(fits), "fitting folds", len(folds), told)
    fold_kinds, fold_models = [kind for kind, _ in fold_fits], [model for _, model in fold_fits]
    predicted, fold_of = np.empty(len(measured)), np.empty(len(measured), dtype=np.int64)
    for fold, (model, (_, held_out)) in enumerate(zip(fold_models, folds, strict=True)):
        predicted[held_out], fold_of[held_out] = model.predict(features.iloc[held_out]), fold
    told("fitting all rows", 0, 1)
    kind, final_model = choose_model(features, measured, table.groups, seed)
    told("fitting all rows", 1, 1)
    sample = _Resampled(table, seed)
    baselines = {
        name: cross_val_predict(model, features, measured, cv=folds) for name, model in make_baselines().items()
    }
    residuals, residuals_of_mean = measured - predicted, measured - baselines["mean"]
    verdict = reduction_of_rmse(residuals, residuals_of_mean, sample.counts, sample.num_units)
    worth: dict[str, Any] = {}
    if explain:
        worth["effects"] = _effects(table, folds, fold_models)
        worth["importance"] = _importance(table, folds, fold_models, parallel, seed, told)
        worth["feature_groups"] = _group_gains(table, kind, folds, parallel, seed, sample, told)
    if not verdict["better"]:
        residuals = residuals_of_mean
        final_model = DummyRegressor().fit(features, measured)
        fold_models = [DummyRegressor().fit(features.iloc[rows], measured[rows]) for rows, _ in folds]
    coverages = coverage_by_level(residuals, fold_of)
    card = {
        **_fit_settings(table, target, coverage, seed),
        "needs_probe": verdict["better"] and needs_probe(features.columns),
        "verdict": verdict,
        "kind": kind,
        "kinds_of_folds": fold_kinds,
        "num_folds": len(folds),
        **sample.scores_of(predicted),
        "coverage_by_level": coverages,
        "coverage_intervals": {level: share_interval(share, sample.num_units) for level, share in coverages.items()},
        "baselines": {name: sample.scores_of(predictions) for name, predictions in baselines.items()},
        **worth,
    }
    held_out_rows = {"name": table.names, "measured": measured, "predicted": predicted, "fold": fold_of}
    novelty = fit_novelty(features, folds) if verdict["better"] else None
    return Predictor(card, final_model, fold_models, fold_of, residuals, novelty), pd.DataFrame(held_out_rows)


def _all_of(results: Iterable[Any], what: str, total: int, told: Told) -> list[Any]:
    """The results, told of one by one."""
    told(what, 0, total)
    found = []
    for result in results:
        found.append(result)
        told(what, len(found), total)
    return found


class _Resampled:
    """A table's rows, resampled: figures of held-out predictions, each with its interval."""

    def __init__(self, table: TrainingTable, seed: int) -> None:
        self.measured = table.target
        self.counts = draw_resamples(len(table.target), table.groups, seed)
        self.num_units = len(table.target) if table.groups is None else len(np.unique(table.groups))

    def scores_of(self, predicted: np.ndarray) -> dict[str, Any]:
        """The scores, and under ``intervals`` both ends of each."""
        ends = score_intervals(self.measured, predicted, self.counts, self.num_units)
        return {**scores(self.measured, predicted), "intervals": ends}

    def gain(self, predicted: np.ndarray, without: np.ndarray) -> tuple[float, list[float]]:
        """How much larger the RMSE of the predictions ``without`` something is, and its interval, on the same rows."""

        def rise(counts: np.ndarray) -> np.ndarray:
            squares = [counts @ (self.measured - p) ** 2 / counts.sum(axis=1) for p in (without, predicted)]
            return np.sqrt(squares[0]) - np.sqrt(squares[1])

        value = float(rise(np.ones((1, len(self.measured))))[0])
        return value, interval(value, rise(self.counts), self.num_units)


def _fit_settings(table: TrainingTable, target: str, coverage: float, seed: int) -> dict[str, Any]:
    """What a predictor was fitted on and how. Plain values only: they are printed, and read by other versions."""
    columns = list(table.features.columns)
    ranges = table.features.agg(["min", "max"])
    return {
        "target": target,
        "columns": columns,
        "ranges": {name: [float(ranges[name]["min"]), float(ranges[name]["max"])] for name in columns},
        "columns_with_nulls": [name for name in columns if table.features[name].isna().any()],
        "coverage": coverage,
        "seed": seed,
        "num_rows": len(table.target),
        "group_column": table.group_column,
        "num_groups": None if table.groups is None else len(np.unique(table.groups)),
        "base_models": table.base_models,
        "notes": table.notes,
        "scikit_learn": sklearn.__version__,
    }


def _groups_of_rows(table: TrainingTable, rows: np.ndarray) -> np.ndarray | None:
    return None if table.groups is None else table.groups[rows]


def coverage_by_level(residuals: np.ndarray, fold_of: np.ndarray) -> dict[str, float]:
    """Share of rows inside their interval, by nominal level ("0.9").

    Each row's interval is sized by the residuals of the *other* folds, as its own is among those of its fold.

    Args:
        residuals: of held-out rows, (n,).
        fold_of: the fold that held out each row, (n,).
    """
    errors, shares = np.abs(residuals), {}
    for level in LEVELS:
        is_inside = np.zeros(len(errors), dtype=bool)
        for fold in np.unique(fold_of):
            calibration = np.sort(errors[fold_of != fold])
            rank = conformal_rank(len(calibration), level)
            half_width = calibration[rank - 1] if rank <= len(calibration) else np.inf  # too few rows for the level
            is_inside[fold_of == fold] = errors[fold_of == fold] <= half_width
        shares[f"{level:g}"] = float(is_inside.mean())
    return shares


def _effects(table: TrainingTable, folds: Sequence[Any], models: Sequence[Any]) -> dict[str, float]:
    """By how much a prediction rises from a feature's lower quartile to its upper one, all else as it is.

    It is the difference of two points of the partial dependence (Friedman 2001), over held-out rows.
    """
    features = table.features
    ends = features.quantile([0.25, 0.75])
    effects = {}
    for column in features.columns:
        if (low := ends[column].iloc[0]) == (high := ends[column].iloc[1]):  # most rows are alike: its whole range
            low, high = features[column].min(), features[column].max()
        rises = [
            model.predict(features.iloc[held_out].assign(**{column: high}))
            - model.predict(features.iloc[held_out].assign(**{column: low}))
            for model, (_, held_out) in zip(models, folds, strict=True)
        ]
        effects[column] = float(np.concatenate(rises).mean())
    return effects


def _importance(
    table: TrainingTable, folds: Sequence[Any], models: Sequence[Any], parallel: Parallel, seed: int, told: Told
) -> dict[str, list[float]]:
    """Rise of the held-out RMSE when a feature is shuffled: mean and standard deviation over shuffles, largest first.

    Permutation importance (Breiman 2001). Values are shuffled over the whole table: within a fold of few datasets a
    feature may have one value only, and a shuffle would change nothing.
    """
    random, columns = np.random.default_rng(seed), table.features.columns
    orders = [random.permutation(len(table.target)) for _ in range(NUM_SHUFFLES)]

    def squared_errors(model: Any, held_out: np.ndarray) -> np.ndarray:
        """Of a fold's held-out rows, (shuffles, features + 1, rows): a feature shuffled at a time; last, none."""
        rows, measured = table.features.iloc[held_out], table.target[held_out]
        unshuffled = (model.predict(rows) - measured) ** 2

        def with_shuffled(column: str, order: np.ndarray) -> np.ndarray:
            values = table.features[column].to_numpy()[order[held_out]]
            return (model.predict(rows.assign(**{column: values})) - measured) ** 2

        return np.stack([[*(with_shuffled(column, order) for column in columns), unshuffled] for order in orders])

    calls = (delayed(squared_errors)(model, held_out) for model, (_, held_out) in zip(models, folds, strict=True))
    by_fold = _all_of(parallel(calls), "shuffling features, folds", len(folds), told)
    rmse = np.sqrt(np.concatenate(by_fold, axis=2).mean(axis=2))
    rises = rmse[:, :-1] - rmse[:, -1:]
    largest_first = np.argsort(-rises.mean(axis=0), kind="stable")
    return {columns[i]: [float(rises[:, i].mean()), float(rises[:, i].std())] for i in largest_first}


def _group_gains(
    table: TrainingTable,
    kind: str,
    folds: Sequence[Any],
    parallel: Parallel,
    seed: int,
    sample: _Resampled,
    told: Told,
) -> dict[str, dict[str, Any]]:
    """For each feature group the held-out RMSE without it and with it alone, its gain, and its seconds a dataset.

    All are of the kind of model that was chosen for the whole table; ``None`` without a group that is the only one.
    ``intervals`` has those of the three errors, by the same names.
    """
    columns = list(table.features.columns)
    by_group = {group: [c for c in columns if group_of(c) == group] for group in FEATURE_GROUPS}
    by_group = {group: members for group, members in by_group.items() if members}
    subsets = {("all", ""): columns}
    for group, members in by_group.items():
        subsets |= {("alone", group): members, ("without", group): [c for c in columns if c not in members]}
    subsets = {key: subset for key, subset in subsets.items() if subset}
    model = make_candidates(seed)[kind]

    def held_out(subset: list[str]) -> np.ndarray:
        return cross_val_predict(clone(model), table.features[subset], table.target, cv=folds)

    fits = parallel(delayed(held_out)(s) for s in subsets.values())
    predicted = dict(zip(subsets, _all_of(fits, "with and without feature groups", len(subsets), told), strict=True))
    found = {}
    for group, members in by_group.items():
        values: dict[str, Any] = {"rmse_without": None, "rmse_alone": None, "gain": None}
        ends: dict[str, list[float]] = {}
        for name in ("without", "alone"):
            if (name, group) in predicted:
                figures = sample.scores_of(predicted[name, group])
                values[f"rmse_{name}"], ends[f"rmse_{name}"] = figures["rmse"], figures["intervals"]["rmse"]
        if ("without", group) in predicted:
            values["gain"], ends["gain"] = sample.gain(predicted["all", ""], predicted["without", group])
        seconds = seconds_of(table.seconds, group, members)
        found[group] = {"num_columns": len(members), **values, "intervals": ends, "seconds": seconds}
    return found


def seconds_of(seconds: dict[str, float], group: str, columns: Sequence[str]) -> float | None:
    """Mean seconds a dataset that a feature group costs; 0 for hyperparameters, None where the table does not say.

    Semantic, perplexity and activation features come from the same forward passes: each is said to cost all
    ``static`` seconds, and text as well in tables that have no seconds of its own.
    """
    if group == "hyperparameters":
        return 0.0
    if group == "text" and "text" in seconds:
        return seconds["text"]
    return seconds.get("probe" if needs_probe(columns) else "static")
