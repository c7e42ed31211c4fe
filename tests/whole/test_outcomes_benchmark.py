"""``python -m benchmarks.outcomes``: how many questions an outcome needs, on tiny data."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks import outcomes, small_datasets
from raylora.data.datasets import read_dataset
from raylora.mmlu.statistics import compare
from tests.helpers.runs import make_score, write_run


def test_the_questions_that_a_change_needs_by_hand():
    """Mean 0.5, variance 1/3: (1.96 + 0.84)^2 / 3 / 0.25."""
    wanted = (norm.ppf(0.975) + norm.ppf(0.8)) ** 2 * (1 / 3) / 0.25
    assert outcomes.questions_needed(np.array([1, 0, 1, 0])) == pytest.approx(wanted)
    assert outcomes.questions_needed(np.array([1, -1])) == np.inf


def test_a_runs_adapters_have_a_row_each(tmp_path):
    sizes = {"anatomy": 30, "virology": 30}
    base = make_score(1, sizes, None, 0.0)
    score = make_score(2, sizes, base, 0.3)
    write_run(tmp_path / "run", ["one", "failed"], scores=(base, score), num_failed=1)
    (row,) = outcomes.table_of(tmp_path / "run").to_dict("records")
    change = compare(score, base)
    assert row["dataset"] == "one"
    assert row["accuracy change"] == pytest.approx(change["difference"])
    assert row["correct_probability change"] == pytest.approx(change["correct_probability_change"])
    assert row["brier change"] == pytest.approx(change["brier_change"])
    assert row["accuracy questions"] > 0


def test_the_interval_of_a_probability_holds_where_letters_are_calibrated_by_the_same_questions():
    """Four standard errors of a simulated 0.95 are 0.028."""
    assert outcomes.coverage(57, [0.23, 0.25, 0.25, 0.27], (1.0, 0.5), 1000) > 0.922


def test_twenty_four_different_datasets_are_made_of_the_demos_material(tmp_path):
    paths = small_datasets.write_datasets(tmp_path)
    assert len({path.read_text() for path in paths}) == 24
    for path in paths:
        dataset = read_dataset(path)
        assert (len(dataset.examples), dataset.num_bad_records) == (int(path.stem.split("_")[-2]), 0)
