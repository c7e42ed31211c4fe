"""Intervals and p-values of paired answers: against published figures, other ways to compute them, and simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, multinomial, norm, t, ttest_rel

from raylora.mmlu.paired import (
    balanced_change,
    change_interval,
    false_discovery,
    holm,
    interval_p_values,
    mcnemar,
    mean_change,
    verdicts,
)
from raylora.mmlu.questions import LETTERS

COUNTS = st.tuples(st.integers(0, 40), st.integers(0, 40), st.integers(0, 60)).filter(any)
"""Gained, lost, and answered alike."""


@pytest.mark.parametrize(
    ("gained", "lost", "num", "low", "high"),
    [
        (1, 7, 21, -0.517, -0.026),  # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33, table II
        (7, 1, 21, 0.026, 0.517),
    ],
)
def test_without_correction_it_is_tangos_interval(gained, lost, num, low, high):
    found = [float(limit) for limit in change_interval(gained, lost, num, correction=0)]
    assert found == pytest.approx([low, high], abs=5e-4)


def corrected_score(difference: float, gained: int, lost: int, num: int) -> float:
    """The statistic of the corrected test: the likeliest probabilities of that difference are found by search."""
    same = num - gained - lost

    def surprise(share_lost: float) -> float:
        shares = np.array([share_lost + difference, share_lost, 1 - 2 * share_lost - difference]).clip(1e-300)
        return -float(np.array([gained, lost, same]) @ np.log(shares))

    bounds = (max(0.0, -difference), (1 - difference) / 2)
    share_lost = minimize_scalar(surprise, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
    distance = gained - lost - num * difference
    variance = num * (2 * share_lost + difference - difference**2)
    return float(np.sign(distance) * max(0.0, abs(distance) - 1) / np.sqrt(variance))


@pytest.mark.parametrize(("gained", "lost", "num"), [(4, 1, 57), (9, 20, 114), (3, 3, 30), (300, 250, 14042)])
def test_a_limit_is_where_the_corrected_test_just_rejects(gained, lost, num):
    low, high = (float(limit) for limit in change_interval(gained, lost, num))
    change, critical = (gained - lost) / num, norm.ppf(0.975)
    for sign, limit, end in ((1, low, -0.999), (-1, high, 0.999)):
        wanted = brentq(
            lambda d, s=sign: s * corrected_score(d, gained, lost, num) - critical, end, change - sign / num
        )
        assert limit == pytest.approx(wanted, abs=1e-6)


def test_where_no_answer_differs_there_is_an_interval_still():
    """From no differing answer of n follows a limit by hand: |n d| - 1 = z root(n d (1 - d)), quadratic in d."""
    for num in (57, 14042):
        z2 = norm.ppf(0.975) ** 2
        wanted = np.roots([num**2 + num * z2, -2 * num - num * z2, 1]).max()
        low, high = change_interval(0, 0, num)
        assert float(high) == pytest.approx(wanted, rel=1e-9)
        assert float(low) == -float(high)


@settings(max_examples=100, deadline=None)
@given(COUNTS)
def test_an_interval_holds_its_change_lies_in_range_and_has_a_mirror_image(counts):
    gained, lost, same = counts
    num = gained + lost + same
    low, high = change_interval(gained, lost, num)
    assert -1 <= low < high <= 1
    assert low <= (gained - lost) / num <= high
    assert [float(v) for v in change_interval(lost, gained, num)] == [-float(high), -float(low)]
    inner_low, inner_high = change_interval(gained, lost, num, correction=0)
    assert low <= inner_low <= inner_high <= high


def test_it_leaves_out_zero_where_the_exact_test_says_so():
    """All pairs of up to 400 differing answers."""
    gained, lost = (a.ravel() for a in np.meshgrid(np.arange(401), np.arange(401)))
    few = gained + lost <= 400
    gained, lost = gained[few], lost[few]
    low, high = change_interval(gained, lost, 1000)
    p_values = mcnemar(gained, lost)
    at_odds = ((low > 0) | (high < 0)) != (p_values < 0.05)
    assert 0 < at_odds.sum() <= 44  # 22 pairs and their mirror images
    assert p_values[at_odds].min() > 0.0487
    assert p_values[at_odds].max() < 0.05


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemars_test_is_the_binomial_test(gained, lost):
    wanted = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert float(mcnemar(gained, lost)) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("num", [57, 114])
@pytest.mark.parametrize("differing", [0.005, 0.02, 0.1, 0.4])
@pytest.mark.parametrize("up", [0.5, 0.8])
def test_it_covers_the_true_change(num, differing, up):
    """Not simulated: over all outcomes, with their probabilities. The bootstrap covered 0.24 to 0.88 of such cases."""
    gained, lost = (a.ravel() for a in np.meshgrid(np.arange(num + 1), np.arange(num + 1)))
    fits = gained + lost <= num
    gained, lost = gained[fits], lost[fits]
    shares = [differing * up, differing * (1 - up), 1 - differing]
    probability = multinomial.pmf(np.stack([gained, lost, num - gained - lost], axis=1), num, shares)
    low, high = change_interval(gained, lost, num)
    covers = (low <= shares[0] - shares[1]) & (shares[0] - shares[1] <= high)
    assert probability.sum() == pytest.approx(1)
    assert probability[covers].sum() > 0.95


@pytest.mark.parametrize("num", [57, 114, 570])
@pytest.mark.parametrize(
    ("gains", "losses"),  # by right letter: the share of its questions
    [
        ([0.05] * 4, [0.05] * 4),
        ([0.3] * 4, [0.1] * 4),
        ([0.0, 0.1, 0.1, 0.6], [0.6, 0.1, 0.1, 0.0]),  # from A to D
    ],
)
def test_the_balanced_interval_covers_the_true_change(num, gains, losses):
    rng = np.random.default_rng(num)
    sizes = rng.multinomial(num, [0.23, 0.25, 0.25, 0.27], 4000)
    shares = np.stack([gains, losses, 1 - np.add(gains, losses)], axis=-1)
    outcomes = rng.multinomial(sizes, shares)
    change, low, high = balanced_change(outcomes[..., 0], outcomes[..., 1], sizes)
    true = np.mean(np.subtract(gains, losses))
    assert change.mean() == pytest.approx(true, abs=0.01)
    # 0.945: four standard errors of a simulated 0.95 are 0.014
    assert ((low <= true) & (true <= high)).mean() > 0.945
    row_low, row_high = change_interval(outcomes[..., 0].sum(axis=1), outcomes[..., 1].sum(axis=1), sizes.sum(axis=1))
    assert (high - low).mean() < 1.1 * (row_high - row_low).mean()


def test_a_letter_that_is_never_right_does_not_count():
    three = balanced_change([3, 1, 0], [0, 0, 2], [10, 10, 10])
    four = balanced_change([3, 1, 0, 0], [0, 0, 2, 0], [10, 10, 10, 0])
    assert np.array(three) == pytest.approx(np.array(four))
    assert float(three[0]) == pytest.approx((0.3 + 0.1 - 0.2) / 3)
    low, high = change_interval([3, 1, 0], [0, 0, 2], 10, correction=0)
    changes = np.array([0.3, 0.1, -0.2])
    assert float(three[1]) == pytest.approx(three[0] - np.sqrt(((changes - low) ** 2).sum()) / 3)
    assert float(three[2]) == pytest.approx(three[0] + np.sqrt(((high - changes) ** 2).sum()) / 3)


def test_a_favourite_letter_that_moves_is_no_gain(shared_data):
    """The real questions: from always A to always D, and half of the As turned to Ds."""
    questions = json.loads((shared_data / "mmlu" / "test_all_subjects.json").read_text())
    right = np.array([LETTERS[q["answer"]] for q in questions])
    assert len(right) == 14042
    sizes = np.array([(right == letter).sum() for letter in "ABCD"])
    half = np.random.default_rng(0).random(len(right)) < 0.5
    everywhere = np.ones(len(right), dtype=bool)
    for turned, p_value in ((everywhere, 1e-10), (half, 1e-5)):
        gained = np.array([0, 0, 0, (turned & (right == "D")).sum()])
        lost = np.array([(turned & (right == "A")).sum(), 0, 0, 0])
        assert mcnemar(gained.sum(), lost.sum()) < p_value
        difference = (gained.sum() - lost.sum()) / sizes.sum()
        balanced, low, high = balanced_change(gained, lost, sizes)
        assert low < 0 < high
        row = [mcnemar(gained.sum(), lost.sum()), difference, balanced, low, high]
        assert verdicts(*([float(value)] for value in row)) == ["letter"]


NAN = float("nan")
ROWS = [  # p-value, change, balanced change with its limits, and the verdict
    (0.2, 0.1, 0.1, 0.05, 0.15, "undecided"),
    (1e-6, 0.1, 0.1, 0.05, 0.15, "gain"),
    (1e-6, -0.1, -0.1, -0.15, -0.05, "loss"),
    (1e-6, 0.1, 0.05, -0.05, 0.15, "letter"),
    (1e-6, 0.1, -0.1, -0.15, -0.05, "letter"),  # balanced accuracy even fell
    (1e-6, 0.1, -1.0, -1.0, -0.9, "letter"),
    (1e-6, 0.1, NAN, NAN, NAN, "gain"),  # a row of an older raylora
    (NAN, NAN, NAN, NAN, NAN, "undecided"),  # a row without MMLU
]


@pytest.mark.parametrize("row", ROWS)
def test_the_verdict_of_one_row(row):
    assert verdicts(*([value] for value in row[:5])) == [row[5]]


def test_verdicts_of_many_rows_are_adjusted_together():
    assert verdicts(*zip(*[row[:5] for row in ROWS], strict=True)) == [row[5] for row in ROWS]
    # Of the balanced change the interval leaves out 0, at p = 0.03: enough alone, and neither real nor gone among 40.
    change, low = 0.1, 0.1 - 0.1 * norm.ppf(0.975) / norm.ppf(0.985)
    row = [1e-6, 0.1, change, low, 0.2]
    assert low > 0
    assert verdicts(*([value] for value in row)) == ["gain"]
    others = [0.5, 0.0, 0.0, -0.1, 0.1]
    assert verdicts(*zip(row, *[others] * 39, strict=True)) == ["undecided"] * 40


def test_false_discovery_by_hand():
    assert false_discovery([0.04, 0.01, 0.03]) == pytest.approx([0.04, 0.03, 0.04])
    assert false_discovery([0.9, 0.5]) == pytest.approx([0.9, 0.9])
    assert false_discovery([0.02, NAN, 0.01]) == pytest.approx([0.02, NAN, 0.02], nan_ok=True)
    assert np.isnan(false_discovery([NAN])).all()
    assert false_discovery([]).tolist() == []


@given(st.lists(st.one_of(st.floats(0, 1), st.just(NAN)), max_size=30))
def test_false_discovery_is_never_stricter_than_holm(p_values):
    adjusted = false_discovery(p_values)
    known = ~np.isnan(p_values)
    assert (adjusted[known] <= holm(p_values)[known] + 1e-12).all()
    assert (adjusted[known] >= np.array(p_values)[known] - 1e-12).all()
    assert np.isnan(adjusted[~known]).all()


def test_verdicts_by_false_discovery_find_more():
    p_values, change = [0.001, 0.02, 0.03, 0.04], [0.05, 0.04, -0.03, 0.02]
    unknown = [NAN] * 4
    assert verdicts(p_values, change, unknown, unknown, unknown) == ["gain", *["undecided"] * 3]
    found = verdicts(p_values, change, unknown, unknown, unknown, adjust=false_discovery)
    assert found == ["gain", "gain", "loss", "gain"]


def test_holm_by_hand():
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([0.02, NAN, 0.01]) == pytest.approx([0.02, NAN, 0.02], nan_ok=True)
    assert holm([]).tolist() == []


def test_the_change_of_a_mean_by_hand():
    """Differences 0.1, 0.2, 0.3: mean 0.2, standard error 0.1 / root 3."""
    change, low, high, p_value = mean_change([0.1, 0.2, 0.3])
    stderr = 0.1 / np.sqrt(3)
    assert change == pytest.approx(0.2)
    assert (low, high) == pytest.approx((0.2 - t.ppf(0.975, 2) * stderr, 0.2 + t.ppf(0.975, 2) * stderr))
    assert p_value == pytest.approx(2 * t.sf(0.2 / stderr, 2))


def test_the_change_of_a_mean_is_a_paired_test():
    rng = np.random.default_rng(1)
    ours, base = rng.random(60), rng.random(60)
    _, low, high, p_value = mean_change(ours - base)
    wanted = ttest_rel(ours, base)
    assert p_value == pytest.approx(wanted.pvalue)
    assert (low, high) == pytest.approx(tuple(wanted.confidence_interval()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("differences", "wanted"),
    [
        ([0.0] * 5, (0, 0, 0, 1)),
        ([0.0], (0, 0, 0, 1)),
        ([0.25] * 4, (0.25, None, None, None)),
        ([0.1 + 1e-16, 0.1, 0.1], (0.1, None, None, None)),
        ([0.5], (0.5, None, None, None)),
        ([], (None,) * 4),
        ([0.1, np.nan], (None,) * 4),
    ],
)
def test_differences_that_are_all_equal_claim_nothing(differences, wanted):
    found = mean_change(differences)
    assert [v is None for v in found] == [v is None for v in wanted]
    assert [v for v in found if v is not None] == pytest.approx([v for v in wanted if v is not None])


@pytest.mark.filterwarnings("error")
@settings(max_examples=80, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=2, max_size=40))
def test_the_interval_of_a_mean_agrees_with_its_p_value(differences):
    change, low, high, p_value = mean_change(differences)
    if p_value is None:
        assert np.ptp(differences) < 1e-9
        return
    assert -1 <= low <= change <= high <= 1
    mirrored = mean_change([-d for d in differences])
    assert mirrored == pytest.approx((-change, -high, -low, p_value))
    if abs(p_value - 0.05) > 1e-6 and p_value < 1:
        assert (low > 0 or high < 0) == (p_value < 0.05)


@pytest.mark.parametrize("change", [0.03, -0.03])
def test_a_p_value_is_that_of_its_interval(change):
    stderr = 0.01
    low, high = (change + sign * norm.ppf(0.975) * stderr for sign in (-1, 1))
    assert float(interval_p_values(change, low, high, np.sign(change))) == pytest.approx(2 * norm.sf(3))
    to_zero = min(0, change * 2), max(0, change * 2)
    assert float(interval_p_values(change, *to_zero, np.sign(change))) == pytest.approx(0.05)
    assert float(interval_p_values(0.0, -0.1, 0.1, 0.0)) == 1
