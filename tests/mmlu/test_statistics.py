"""Accuracies, comparisons and their p-values, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from raylora.mmlu.statistics import compare, compare_subjects, summarize
from raylora.records import Score


def make_score(correct: list[bool], subjects: list[str] | None = None) -> Score:
    subjects = subjects or ["anatomy"] * len(correct)
    return Score(
        pd.DataFrame(
            {
                "subject": subjects,
                "question_id": [f"q{i}" for i in range(len(correct))],
                "prediction": "A",
                "correct": correct,
            }
        )
    )


def test_accuracies_by_hand():
    summary = summarize(make_score([True, True, False, True, False], ["anatomy"] * 3 + ["philosophy", "sociology"]))
    assert summary["overall_accuracy"] == 0.6
    assert summary["subjects"]["anatomy"]["stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert summary["overall_stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(5))  # pooled within subjects
    assert summary["macro_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert summary["groups"]["stem"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["groups"]["humanities"] == {"accuracy": 1.0, "stderr": None, "num_questions": 1}
    assert summary["groups"]["other"]["accuracy"] is None


@settings(max_examples=40)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=200))
def test_comparison_against_its_definition(pairs):
    ours, base = (make_score([p[i] for p in pairs]) for i in (0, 1))
    result = compare(ours, base)
    gained, lost = sum(a and not b for a, b in pairs), sum(b and not a for a, b in pairs)
    assert (result["num_gained"], result["num_lost"]) == (gained, lost)
    assert result["difference"] == pytest.approx(ours.overall_accuracy - base.overall_accuracy)
    assert result["ci_low"] <= result["difference"] + 1e-9
    assert result["ci_high"] >= result["difference"] - 1e-9
    two_sided = min(1.0, 2 * binom.cdf(min(gained, lost), gained + lost, 0.5))
    assert result["mcnemar_p_value"] == pytest.approx(two_sided)


def test_the_bootstrap_interval_is_that_of_resampled_questions():
    rng = np.random.default_rng(1)
    ours, base = rng.random(400) < 0.6, rng.random(400) < 0.5
    result = compare(make_score(list(ours)), make_score(list(base)))
    differences = ours.astype(int) - base.astype(int)
    means = [rng.choice(differences, 400).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert (result["ci_low"], result["ci_high"]) == (pytest.approx(low, abs=0.01), pytest.approx(high, abs=0.01))


def test_scores_of_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="same questions"):
        compare(make_score([True]), make_score([True, False]))


def test_p_values_of_subjects_are_adjusted_together():
    rng = np.random.default_rng(0)
    scores = []
    for share in (0.9, 0.4):
        table = pd.DataFrame({"subject": np.repeat(["a", "b", "c"], 40), "correct": rng.random(120) < share})
        scores.append(Score(table.assign(question_id=[f"q{i}" for i in range(120)], prediction="A")))
    table = compare_subjects(*scores)
    ordered = table.sort_values("mcnemar_p_value")
    expected = np.minimum(np.maximum.accumulate(ordered["mcnemar_p_value"].to_numpy() * [3, 2, 1]), 1)
    np.testing.assert_allclose(ordered["holm_p_value"], expected)
