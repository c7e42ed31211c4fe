"""The interval of several training seeds: it holds a fresh one, and agrees with its p-value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from raylora.mmlu.seeds import change_over_seeds


def simulate(rng, num_seeds: int, num_questions: int, of_seeds: float, noise: float, mean: float) -> np.ndarray:
    """Differences (seeds + 1, questions) in the last row the probabilities that a fresh seed changes an answer."""
    margin = rng.normal(0, 1, num_questions)
    effects = margin + mean + rng.normal(0, of_seeds, (num_seeds + 1, 1))
    right = effects[:-1] + rng.normal(0, noise, (num_seeds, num_questions)) > 0
    return np.vstack([right - 1.0 * (margin > 0), norm.cdf(effects[-1] / noise) - (margin > 0)])


@pytest.mark.slow
@pytest.mark.parametrize(("num_seeds", "of_seeds"), [(2, 0.2), (3, 0.05), (5, 0.2), (5, 0.02)])
def test_the_interval_holds_what_a_fresh_seed_does_on_fresh_questions(num_seeds, of_seeds):
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        fresh = simulate(rng, num_seeds, 600, of_seeds, 0.2, 0.03)
        # The questions asked are 200 of the 600; what is true of the fresh seed is its change on all others.
        found = change_over_seeds(fresh[:-1, :200])
        held += found.low <= fresh[-1, 200:].mean() <= found.high
    assert 0.92 <= held / 400 <= 1, held / 400


def test_seeds_that_agree_leave_the_noise_of_the_questions_alone():
    answers = np.array([1, 1, 1, -1] + [0] * 196)
    found = change_over_seeds(np.tile(answers, (4, 1)))
    width = 1.96 * answers.std(ddof=1) / np.sqrt(200)
    assert (found.mean, found.seed_std) == (0.01, 0)
    assert found.high - found.mean == pytest.approx(width, rel=1e-3)


def test_where_no_answer_differs_the_interval_has_a_width_all_the_same():
    found = change_over_seeds(np.zeros((3, 57)))
    assert found.low == -found.high
    assert 0.05 < found.high < 0.08
    assert found.p_value == pytest.approx(1, abs=1e-6)


@given(st.integers(2, 6), st.integers(10, 60), st.integers(0, 999))
def test_the_interval_leaves_zero_out_where_the_p_value_says_so(num_seeds, num_questions, seed):
    rng = np.random.default_rng(seed)
    differences = rng.choice([-1, 0, 0, 0, 1, 1], (num_seeds, num_questions))
    found = change_over_seeds(differences)
    assert (found.low <= 0 <= found.high) == (found.p_value >= 0.05 - 1e-9)
    assert -1 <= found.low <= found.mean <= found.high <= 1
    mirrored = change_over_seeds(-differences)
    assert (mirrored.low, mirrored.p_value) == pytest.approx((-found.high, found.p_value))


def test_weights_make_it_the_change_of_a_balanced_accuracy():
    letters = np.array([0] * 30 + [1] * 10)
    differences = np.stack([np.where(letters == 0, 1, -1)] * 3)
    weights = 40 / (2 * np.array([30, 10])[letters])
    assert change_over_seeds(differences).mean == 0.5
    assert change_over_seeds(differences, weights).mean == pytest.approx(0)


def test_one_seed_is_refused():
    with pytest.raises(ValueError, match="two seeds"):
        change_over_seeds(np.zeros((1, 50)))
