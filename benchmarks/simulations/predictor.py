"""What a predictor says of itself, on made-up tables: its verdict, its intervals, what it calls unlike the fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd
from sklearn.base import clone
from sklearn.model_selection import cross_val_predict

from benchmarks.simulations.rate import Rate
from raylora.predict.models import make_baselines, make_folds, make_linear
from raylora.predict.novelty import fit_novelty
from raylora.predict.tables import known_from_table
from raylora.predict.uncertainty import SCORE_SCALES, draw_resamples, reduction_of_rmse, score_intervals, scores
from raylora.predict.validation import fit_predictor
from raylora.rows import STATIC_NAMES


def make_rows(num_rows: int, share: float, seed: int, group_size: int = 1) -> pd.DataFrame:
    """Ten features that know nothing of each other; the outcome is the first of them, and noise.

    Args:
        share: of the outcome's variance, what the first feature has; 0.5: a signal as large as the noise.
        group_size: rows of one dataset, which has one set of features and one signal; half of the noise is its own.
    """
    random = np.random.default_rng([num_rows, seed])
    num_groups = num_rows // group_size
    features = np.repeat(random.normal(size=(num_groups, 10)), group_size, axis=0)
    noise = random.normal(size=num_rows)
    if group_size > 1:
        noise = (noise + np.repeat(random.normal(size=num_groups), group_size)) / np.sqrt(2)
    outcome = np.sqrt(share) * features[:, 0] + np.sqrt(1 - share) * noise
    names = np.repeat([f"set_{i}" for i in range(num_groups)], group_size)
    return pd.DataFrame(features, columns=list(STATIC_NAMES[:10])).assign(
        dataset=names, overall_accuracy=np.clip(0.5 + 0.05 * outcome, 0, 1)
    )


def ridge_verdicts(num_rows: int, share: float, num_tables: int, group_size: int = 1) -> Iterator[bool]:
    """The verdict of ``fit`` with ridge as the only model: a 50th of the time of a whole fit."""
    for seed in range(num_tables):
        known = known_from_table(make_rows(num_rows, share, seed, group_size), "overall_accuracy")
        folds = list(make_folds(5, known.groups, num_rows, seed).split(known.features, known.target, known.groups))
        errors, errors_of_mean = (
            known.target - cross_val_predict(model, known.features, known.target, cv=folds)
            for model in (make_linear(), make_baselines()["mean"])
        )
        counts = draw_resamples(num_rows, known.groups, seed)
        yield reduction_of_rmse(errors, errors_of_mean, counts, num_rows // group_size)["better"]


def figure_coverage(num_rows: int, num_tables: int) -> dict[str, float]:
    """How often the interval of a figure holds the one that the folds' models have on 2,000 new rows."""
    inside: dict[str, list[bool]] = {name: [] for name in SCORE_SCALES}
    for seed in range(num_tables):
        known = known_from_table(make_rows(num_rows, 0.5, seed), "overall_accuracy")
        new = known_from_table(make_rows(2000, 0.5, 10_000 + seed), "overall_accuracy")
        predicted, of_models = np.empty(num_rows), []
        for rows, held_out in make_folds(5, None, num_rows, seed).split(known.features):
            model = clone(make_linear()).fit(known.features.iloc[rows], known.target[rows])
            predicted[held_out] = model.predict(known.features.iloc[held_out])
            of_models.append(scores(new.target, model.predict(new.features)))
        ends = score_intervals(known.target, predicted, draw_resamples(num_rows, None, seed), num_rows)
        for name, (low, high) in ends.items():
            inside[name].append(low <= np.mean([found[name] for found in of_models]) <= high)
    return {name: float(np.mean(found)) for name, found in inside.items()}


def outside_rates(num_rows: int, num_tables: int) -> tuple[float, float]:
    """Share of rows called unlike the fit's: of the same distribution, and with one feature off by 5 deviations."""
    same, shifted = [], []
    for seed in range(num_tables):
        columns = list(STATIC_NAMES[:10])
        rows, new = (make_rows(n, 0.5, seed)[columns] for n in (num_rows, 500))
        novelty = fit_novelty(rows, list(make_folds(5, None, num_rows, seed).split(rows)))
        same.append(np.mean([names != "" for names in novelty.unusual(new)]))
        off = new.assign(**{columns[seed % 10]: new[columns[seed % 10]] + 5})
        shifted.append(np.mean([names != "" for names in novelty.unusual(off)]))
    return float(np.mean(same)), float(np.mean(shifted))


def whole_fits(num_rows: int, share: float, num_tables: int) -> tuple[float, float]:
    """``fit`` as it is: how often it says "better", and how many of 500 new rows its 90% intervals hold."""
    better, inside = [], []
    for seed in range(num_tables):
        known = known_from_table(make_rows(num_rows, share, seed), "overall_accuracy")
        predictor, _ = fit_predictor(known, "overall_accuracy", seed=seed, threads=1, explain=False)
        new = make_rows(500, share, 10_000 + seed)
        found = predictor.predict(new)
        better.append(predictor.is_better_than_mean)
        inside.append(new["overall_accuracy"].between(found["low"], found["high"]).mean())
    return float(np.mean(better)), float(np.mean(inside))


def predictor() -> list[Rate]:
    """What a predictor says of itself; the published sample is in ``benchmarks.predict``."""
    rates = []
    for num_rows in (10, 20, 30, 50, 100):
        noise = np.mean([*ridge_verdicts(num_rows, 0.0, 200)])
        rates.append(Rate('verdict "better", ridge', f"{num_rows} rows of noise", float(noise), "0.05 or less"))
    grouped = np.mean([*ridge_verdicts(48, 0.0, 200, group_size=4)])
    rates.append(Rate('verdict "better", ridge', "12 datasets of 4 rows, noise", float(grouped), "0.05 or less"))
    for num_rows in (10, 20, 30, 50, 100):
        found = np.mean([*ridge_verdicts(num_rows, 0.5, 100)])
        rates.append(
            Rate('verdict "better", ridge', f"{num_rows} rows, signal as large as noise", float(found), "high")
        )
    for num_rows, share, num_tables in ((10, 0.0, 25), (20, 0.0, 25), (30, 0.5, 20)):
        better, inside = whole_fits(num_rows, share, num_tables)
        setting = f"{num_rows} rows, " + ("signal as large as noise" if share else "noise")
        rates.append(Rate('verdict "better", fit', setting, better, "high" if share else "0.05 or less"))
        rates.append(Rate("new rows in 90% intervals, fit", setting, inside, "0.90"))
    for num_rows in (10, 30, 100):
        same, shifted = outside_rates(num_rows, 60)
        wanted = "0.05" if num_rows >= 19 else f"{1 / (num_rows + 1):.2f}"
        rates.append(Rate("outside, same distribution", f"{num_rows} rows, 10 features", same, wanted))
        rates.append(Rate("outside, a feature off by 5", f"{num_rows} rows, 10 features", shifted, "high"))
    for num_rows in (20, 50):
        for name, share in figure_coverage(num_rows, 150).items():
            rates.append(Rate(f"{name} of new rows in its interval", f"{num_rows} rows", share, "0.90"))
    return rates
