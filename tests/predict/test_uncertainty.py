"""Intervals of a predictor's figures, and the verdict."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

from benchmarks.simulations.predictor import ridge_verdicts
from raylora.predict.uncertainty import draw_resamples, reduction_of_rmse, score_intervals, scores, share_interval


@given(st.integers(0, 1000), st.integers(3, 60))
@settings(max_examples=30, deadline=None)
def test_scores_are_those_of_the_libraries_and_lie_in_their_intervals(seed, num_rows):
    random = np.random.default_rng(seed)
    measured = np.round(random.normal(size=num_rows), 1)  # rounded: ranks with ties
    predicted = measured + random.normal(size=num_rows)
    measured[0] += 1  # not all equal
    found = scores(measured, predicted)
    assert found == pytest.approx(
        {
            "rmse": root_mean_squared_error(measured, predicted),
            "mae": mean_absolute_error(measured, predicted),
            "r2": r2_score(measured, predicted),
            "rank_correlation": spearmanr(measured, predicted).statistic,
        }
    )
    ends = score_intervals(measured, predicted, draw_resamples(num_rows, None, seed), num_rows)
    assert all(low - 1e-9 <= found[name] <= high + 1e-9 for name, (low, high) in ends.items())


def test_equal_predictions_or_outcomes_have_scores():
    constant, varied = np.full(20, 0.4), np.linspace(0, 1, 20)
    for measured, predicted in ((varied, constant), (constant, varied), (constant, constant)):
        assert scores(measured, predicted)["rank_correlation"] == 0
        ends = score_intervals(measured, predicted, draw_resamples(20, None, 0), 20)
        assert np.isfinite(list(ends.values())).all()


def test_rows_of_a_group_are_drawn_together():
    groups = np.repeat([7, 3, 5], [2, 4, 1])
    counts = draw_resamples(7, groups, 0)
    assert (counts[:, 0] == counts[:, 1]).all()
    assert (counts[:, 2:6] == counts[:, [2]]).all()
    assert (counts[:, [0, 2, 6]].sum(axis=1) == 3).all()


@pytest.mark.slow
def test_noise_is_seldom_called_better_and_a_clear_signal_always():
    """In the long run 0.5 to 3.5% of tables; more than 4 of 60 would come of 5% in one case of 5."""
    assert sum(ridge_verdicts(20, share=0.0, num_tables=60)) <= 4
    assert sum(ridge_verdicts(48, share=0.0, num_tables=40, group_size=4)) <= 4
    assert all(ridge_verdicts(40, share=0.95, num_tables=10))


def test_errors_half_as_large_are_a_reduction_by_half():
    errors = np.random.default_rng(0).normal(size=40)
    counts = draw_resamples(40, None, 0)
    half = reduction_of_rmse(errors / 2, errors, counts, 40)
    assert half["better"]
    assert [half["rmse_reduction"], *half["interval"]] == pytest.approx([0.5] * 3)
    assert not reduction_of_rmse(errors, errors, counts, 40)["better"]
    perfect = reduction_of_rmse(np.zeros(40), errors, counts, 40)
    assert perfect["better"]
    assert perfect["rmse_reduction"] == 1


def test_a_share_of_all_rows_is_not_certain():
    assert share_interval(1.0, 20) == pytest.approx([0.05 ** (1 / 20), 1.0])
    assert share_interval(0.0, 20) == pytest.approx([0.0, 1 - 0.05 ** (1 / 20)])
    low, high = share_interval(0.9, 200)
    assert 0.85 < low < 0.9 < high < 0.94
