"""Which datasets to train first: the rule."""

from __future__ import annotations

import numpy as np
import pytest

from raylora.errors import UserError
from raylora.predict.ranking import chances_to_be_best, order_by_expected_best, rank
from tests.helpers.predictors import fitted_to_noise, make_table


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


def test_equal_datasets_share_the_chance_to_be_best():
    """The first of eight equals once had all of it."""
    assert chances_to_be_best(np.full((100, 8), 0.4)) == pytest.approx([1 / 8] * 8)
    draws = np.array([[0.5, 0.5, 0.1], [0.2, 0.3, 0.1]])
    assert chances_to_be_best(draws) == pytest.approx([0.25, 0.75, 0])


def test_where_nothing_is_known_the_cheapest_come_first():
    predictor, _ = fitted_to_noise()
    cost = [50.0, 10.0, None, 10.0, 30.0, 20.0]
    table = make_table(6).assign(experiment_id=[f"e{i}" for i in range(6)], error="")
    ranking = rank(predictor, table.assign(cost=cost), 2, None, 0)
    assert ranking["dataset"].tolist() == [f"set_{i}" for i in (1, 3, 5, 4, 0, 2)]
    assert ranking["train"].tolist() == [True] * 2 + [False] * 4
    assert ranking["chance_best"].tolist() == pytest.approx([1 / 6] * 6)
    assert ranking["prediction"].nunique() == 1
    assert ranking["expected_best"].is_monotonic_increasing
    assert rank(predictor, table, 2, None, 0)["dataset"].tolist() == table["dataset"].tolist()


def test_a_chunk_of_which_nothing_can_be_measured_is_one_line(predictor):
    table = make_table(10).assign(experiment_id="e", error="broken.json: not JSON")
    with pytest.raises(UserError, match=r"no dataset could be measured; the first: broken.json"):
        rank(predictor, table, 1, None, 0)
