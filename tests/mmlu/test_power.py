"""What so many questions can show: against simulated runs, a closed form, and what must hold for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.mmlu.paired import ALPHA, mcnemar
from raylora.mmlu.power import TYPICAL_SHARE, chance_to_find, measured_share, power_line, smallest_change

NAN = float("nan")


@pytest.mark.parametrize(
    ("num", "share", "num_tests"),
    [(57, 0.15, 1), (114, 0.2, 4), (570, 0.1, 1), (570, 0.02, 40), (14_042, 0.15, 1), (14_042, 0.15, 40)],
)
def test_the_exact_test_finds_that_change_in_80_percent(num, share, num_tests):
    change = smallest_change(num, share, num_tests)
    share = max(share, change)
    shares = [(share + change) / 2, (share - change) / 2, 1 - share]
    gained, lost, _ = np.random.default_rng(num + num_tests).multinomial(num, shares, size=20_000).T
    found = (mcnemar(gained, lost) < ALPHA / num_tests) & (gained > lost)
    assert found.mean() == pytest.approx(0.8, abs=0.015)


def test_six_questions_must_all_be_gained():
    """2 / 2^6 is the first p-value below 0.05, so the change d is found with a probability of d^6."""
    assert smallest_change(6, 0.1) == pytest.approx(0.8 ** (1 / 6), abs=1e-5)
    assert smallest_change(5, 0.1) is None
    assert smallest_change(14, 0.1, num_tests=500) is None, "2 / 2^14 is above 0.05 / 500"
    assert chance_to_find(0.0, 100, 0.0) == 0


@settings(max_examples=40, deadline=None)
@given(
    st.integers(6, 3000), st.floats(1.2, 4), st.integers(1, 400), st.floats(1, 10), st.floats(0.01, 0.3)
)  # fmt: skip
def test_more_questions_show_less_and_more_tests_more(num, more_questions, num_tests, more_tests, share):
    change = smallest_change(num, share, num_tests)
    with_more_questions = smallest_change(int(num * more_questions) + 1, share, num_tests)
    with_more_tests = smallest_change(num, share, int(num_tests * more_tests))
    if change is None:
        assert with_more_tests is None
        return
    assert with_more_questions <= change + 1e-5
    assert with_more_tests is None or with_more_tests >= change - 1e-5


def test_the_share_of_differing_answers_is_the_median_of_those_known():
    assert measured_share([1, 2, 30, NAN], [1, 2, 30, 4], [100, 100, 100, 100]) == pytest.approx(0.04)
    assert measured_share([NAN], [NAN], [100]) is None
    assert measured_share([], [], []) is None


def test_what_can_be_shown_is_one_line():
    alone, adjusted = (100 * smallest_change(14_042, TYPICAL_SHARE, num) for num in (1, 40))
    assert power_line(14_042, 40, None) == (
        f"14,042 questions can show changes of accuracy from {alone:.1f} points on; "
        f"from {adjusted:.1f} after Holm over 40 datasets "
        "(at 5%, found in 80% of cases; an assumed 15% of the answers become right or wrong)"
    )
    line = power_line(114, 1, 0.088)
    assert "Holm" not in line
    assert "8.8%, as measured, of the answers" in line
    assert "; none after Holm over 500 changes of 1 dataset (" in power_line(10, 1, 0.1, num_tests=500)
    assert power_line(1, 4, None).startswith("1 question can show no change of accuracy, however large (")
