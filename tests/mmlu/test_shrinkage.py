"""Shrunk changes: against the closed form, against what is true in simulations, and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.mmlu.shrinkage import shrunk, stderr_of_interval

NAN = float("nan")
CHANGES = st.lists(st.floats(-0.5, 0.5), min_size=3, max_size=30)


@settings(max_examples=100)
@given(CHANGES, st.floats(0.001, 0.2))
def test_equal_errors_have_a_closed_form(changes, stderr):
    changes = np.array(changes)
    variance = changes.var(ddof=1)
    kept = max(0.0, variance - stderr**2) / max(variance, 1e-300)
    expected = changes.mean() + kept * (changes - changes.mean())
    np.testing.assert_allclose(shrunk(changes, np.full(len(changes), stderr)), expected, atol=1e-9)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.floats(-0.5, 0.5), st.floats(0.001, 0.2)), min_size=3, max_size=30))
def test_each_lies_between_its_change_and_one_common_mean(pairs):
    changes, stderrs = np.array(pairs).T
    estimates = shrunk(changes, stderrs)
    moved = np.abs(estimates - changes) > 1e-9
    above = (changes - 1e-9 <= estimates)[moved & (estimates > changes)]
    assert above.all()
    assert estimates.min() >= changes.min() - 1e-9
    assert estimates.max() <= changes.max() + 1e-9
    pulled_up, pulled_down = estimates[moved & (estimates > changes)], estimates[moved & (estimates < changes)]
    if len(pulled_up) and len(pulled_down):
        assert pulled_up.max() <= pulled_down.min() + 1e-9, "the mean lies between them"


def test_500_changes_that_are_none_shrink_to_next_to_nothing():
    rng = np.random.default_rng(0)
    stderr = 0.004
    greatest = []
    for _ in range(20):
        changes = rng.normal(0, stderr, 500)
        assert changes.max() > 2.4 * stderr
        greatest.append(np.abs(shrunk(changes, np.full(500, stderr))).max())
    assert np.median(greatest) < 0.3 * stderr
    assert max(greatest) < stderr


def test_what_is_large_against_the_noise_keeps_most():
    rng = np.random.default_rng(1)
    changes = rng.normal(0, 0.004, 20)
    changes[7] += 0.1
    estimates = shrunk(changes, np.full(20, 0.004))
    assert 0.95 * changes[7] < estimates[7] < changes[7]
    among_many = rng.normal(0, 0.004, 500)
    among_many[7] += 0.2
    assert shrunk(among_many, np.full(500, 0.004))[7] > 0.75 * among_many[7]


def test_shrunk_changes_are_nearer_to_the_truth():
    rng = np.random.default_rng(2)
    truth, stderrs = rng.normal(0.01, 0.006, 400), rng.uniform(0.003, 0.012, 400)
    changes = rng.normal(truth, stderrs)
    estimates = shrunk(changes, stderrs)
    assert ((estimates - truth) ** 2).mean() < 0.6 * ((changes - truth) ** 2).mean()
    assert estimates[changes.argmax()] - truth[changes.argmax()] < (changes - truth)[changes.argmax()]


def test_of_fewer_than_three_there_is_none_and_unknown_ones_do_not_count():
    assert np.isnan(shrunk([0.1, 0.2], [0.01, 0.01])).all()
    assert np.isnan(shrunk([0.1, 0.2, NAN], [0.01, 0.01, 0.01])).all()
    assert len(shrunk([], [])) == 0
    three = shrunk([0.1, 0.2, 0.0], [0.01] * 3)
    np.testing.assert_allclose(shrunk([0.1, NAN, 0.2, 0.0, 0.3], [0.01] * 4 + [NAN]), [three[0], NAN, *three[1:], NAN])


def test_an_intervals_standard_error():
    assert stderr_of_interval([-0.0196], [0.0196]) == pytest.approx([0.01], rel=1e-4)
    assert np.isnan(stderr_of_interval([None], [0.1])).all()
