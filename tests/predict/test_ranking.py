"""Which datasets to train first: the rule."""

from __future__ import annotations

import numpy as np
import pytest

from raylora.errors import UserError
from raylora.predict.ranking import order_by_expected_best, rank
from tests.helpers.predictors import make_table


def test_a_budget_is_not_spent_on_the_same_bet_twice():
    """Two that are good or bad together, and a third that is a little worse by itself, and different."""
    luck = np.random.default_rng(0).normal(size=(5000, 2))
    draws = np.stack([luck[:, 0], luck[:, 0] - 0.01, luck[:, 1] - 0.05], axis=1)
    order, expected = order_by_expected_best(draws, draws.mean(axis=0))
    assert order == [0, 2, 1]
    assert expected == sorted(expected)
    assert expected[-1] == pytest.approx(draws.max(axis=1).mean())


def test_where_nothing_is_uncertain_the_higher_prediction_comes_first():
    predictions = np.array([0.2, 0.5, 0.1, 0.4])
    order, expected = order_by_expected_best(np.tile(predictions, (10, 1)), predictions)
    assert order == [1, 3, 0, 2]
    assert expected == pytest.approx([0.5] * 4)


def test_a_ranking_has_every_dataset_and_marks_the_budget(predictor):
    table = make_table(12, seed=4).assign(experiment_id=[f"e{i}" for i in range(12)], error="")
    table.loc[7, "error"] = "set_7.json: line 1: not JSON"
    ranking = rank(predictor, table, budget=3, coverage=None, seed=0)
    assert len(ranking) == 12
    assert ranking["train"].tolist() == [True] * 3 + [False] * 9
    assert ranking["rank"].tolist()[:11] == list(range(1, 12))
    assert ranking.iloc[11]["dataset"] == "set_7"
    assert ranking.iloc[11]["error"].endswith("not JSON")
    assert ranking["chance_best"].sum() == pytest.approx(1)
    assert ranking["expected_best"].dropna().is_monotonic_increasing
    assert rank(predictor, table, 3, None, 0).equals(ranking), "the same seed should give the same ranking"
    assert rank(predictor, table, None, None, 0)["train"].sum() == 11


def test_a_chunk_of_which_nothing_can_be_measured_is_one_line(predictor):
    table = make_table(10).assign(experiment_id="e", error="broken.json: not JSON")
    with pytest.raises(UserError, match=r"no dataset could be measured; the first: broken.json"):
        rank(predictor, table, 1, None, 0)
