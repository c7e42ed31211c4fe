"""Rows that are unlike those of the fit."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from raylora.predict.models import make_folds
from raylora.predict.novelty import Novelty, fit_novelty


def make_features(num_rows: int, seed: int) -> pd.DataFrame:
    """Twelve features: some go together, some are skewed, one has two values only."""
    random = np.random.default_rng(seed)
    common = random.normal(size=(num_rows, 1))
    values = common + random.normal(size=(num_rows, 12)) * np.array([0.3] * 4 + [1.0] * 8)
    values[:, 4:7] = np.exp(values[:, 4:7])
    values[:, 7] = random.choice([1e-4, 2e-4], size=num_rows)
    return pd.DataFrame(values, columns=[f"f{i}" for i in range(12)])


def novelty_of(rows: pd.DataFrame) -> Novelty:
    return fit_novelty(rows, list(make_folds(5, None, len(rows), 0).split(rows)))


def share_outside(novelty: Novelty, rows: pd.DataFrame) -> float:
    return float(np.mean([names != "" for names in novelty.unusual(rows)]))


@pytest.mark.parametrize(("num_rows", "most"), [(10, 0.12), (30, 0.08), (150, 0.08)])
def test_one_row_in_twenty_of_the_same_distribution_is_outside(num_rows, most):
    """By ranges it was most of them. With 10 rows it can be one in 11 only."""
    shares, by_range = [], []
    for seed in range(20):
        rows, new = make_features(num_rows, seed), make_features(200, 1000 + seed)
        shares.append(share_outside(novelty_of(rows), new))
        by_range.append(float((new.lt(rows.min()) | new.gt(rows.max())).any(axis=1).mean()))
    assert 0.01 < np.mean(shares) < most
    assert np.mean(shares) < np.mean(by_range)


def test_a_shifted_feature_is_seen_and_named_first():
    rows, new = make_features(100, 0), make_features(200, 1)
    novelty = novelty_of(rows)
    for column in ("f0", "f9", "f5"):
        shifted = new.assign(**{column: new[column] + 8 * rows[column].std()})
        found = novelty.unusual(shifted)
        assert np.mean([names.split(", ")[0] == column for names in found]) > 0.9


def test_a_value_that_does_not_go_with_the_others_is_seen_within_its_range():
    rows = make_features(100, 0)
    novelty = novelty_of(rows)
    usual = pd.DataFrame([[1.5] * 4 + list(rows.median())[4:]], columns=rows.columns)
    assert novelty.unusual(usual) == [""]
    odd = usual.assign(f2=-1.5)
    assert rows["f2"].min() < -1.5
    assert novelty.unusual(odd)[0].split(", ")[0] == "f2"


def test_nulls_and_columns_without_spread_are_no_news():
    rows = make_features(40, 0)
    rows.loc[::3, "f1"] = np.nan
    rows["f3"] = [0.0] * 39 + [1.0]
    rows["f6"] = [np.nan] * 39 + [2.0]
    novelty = novelty_of(rows)
    nulls = pd.DataFrame(np.nan, index=range(2), columns=rows.columns)
    assert novelty.unusual(nulls) == ["", ""]
    one = rows[["f3"]]
    assert novelty_of(one).unusual(one.assign(f3=1e30)) == ["f3"] * 40


def test_the_names_stop_where_the_rest_is_usual():
    """One wild value once made all that go with it look odd."""
    rows = make_features(100, 0)
    wild = pd.DataFrame([rows.median()]).assign(f0=1e9)
    assert novelty_of(rows).unusual(wild) == ["f0"]
