"""The probability of the right choice: by hand, and what must not move it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy.special import softmax

from raylora.mmlu.probabilities import choice_probabilities, letter_preferences, question_probabilities
from raylora.records import Score

LETTERS = "ABCDEFGHIJ"
LOGPROBS = arrays.arrays(
    float, st.tuples(st.integers(1, 12), st.integers(2, 6)), elements=st.floats(-40, 0, allow_subnormal=False)
)


def make_score(logprobs, answers: str, scoring: str = "letters") -> Score:
    """Of (N, choices) log-likelihoods, NaN where a question has no such choice."""
    values = np.array(logprobs, dtype=float)
    table = pd.DataFrame({"question_id": [f"q{i}" for i in range(len(values))], "answer": list(answers)})
    named = {f"logprob_{LETTERS[k].lower()}": values[:, k] for k in range(values.shape[1])}
    return Score(table.assign(**named), {"scoring": scoring})


def of_right(score: Score) -> list[float]:
    return question_probabilities(score)["correct_probability"].tolist()


def test_letters_are_calibrated_by_hand():
    """A is preferred by 3 nats; the mean of A is -1, of B -4. What is left: +-1 and -+1, so p = 1 / (1 + exp(-2))."""
    score = make_score([[0, -5], [-2, -3]], "AB")
    assert of_right(score) == pytest.approx([1 / (1 + np.exp(-2))] * 2)
    wrong = make_score([[0, -5], [-2, -3]], "BA")
    assert of_right(wrong) == pytest.approx([1 / (1 + np.exp(2))] * 2)
    assert of_right(make_score([[0, -5], [-2, -3]], "AB", "logits")) == of_right(score), "the older name"


def test_other_scorings_are_not_calibrated():
    score = make_score([[0, -5], [-2, -3]], "AB", "cloze")
    assert of_right(score) == pytest.approx([1 / (1 + np.exp(-5)), 1 / (1 + np.exp(1))])


@pytest.mark.parametrize(("per", "lead"), [("character", 3.0), ("choice", -2.0)])
def test_of_cloze_the_log_likelihood_counts_that_the_answer_goes_by(per, lead):
    """Sums of -12 and -10 nats; a character of 6 and of 2: -2 and -5."""
    score = make_score([[-12, -10, -500, -500]], "A", "cloze")
    lengths = {f"num_characters_{letter}": [num] for letter, num in zip("abcd", (6, 2, 1, 1), strict=True)}
    score = Score(score.questions.assign(**lengths), {"scoring": "cloze", "cloze_per": per})
    assert of_right(score) == pytest.approx([1 / (1 + np.exp(-lead))])


def test_briers_score_by_hand():
    probabilities = np.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    with np.errstate(divide="ignore"):
        score = make_score(np.log(probabilities), "ABC", "cloze")
    table = question_probabilities(score)
    assert table["correct_probability"].tolist() == pytest.approx([0.7, 0.25, 1.0])
    assert table["brier"].tolist() == pytest.approx([0.3**2 + 3 * 0.1**2, 0.75**2 + 3 * 0.25**2, 0.0])
    assert table.index.tolist() == ["q0", "q1", "q2"]


@pytest.mark.parametrize(("lead", "probability", "brier"), [(200.0, 1.0, 0.0), (0.0, 0.25, 0.75), (-200.0, 0.0, None)])
def test_a_model_that_knows_all_and_one_that_knows_nothing(lead, probability, brier):
    """With each letter right as often as the others, calibration leaves the one perfect and the other even."""
    answers = "ABCD" * 5
    right = np.array(list(answers))[:, None] == np.array(list("ABCD"))
    score = make_score(lead * right + np.array([-1.0, -9.0, -2.0, -4.0]), answers)
    table = question_probabilities(score)
    np.testing.assert_allclose(table["correct_probability"], probability, atol=1e-12)
    # all wrong: the other three share the probability, so 1 + 3 / 9
    np.testing.assert_allclose(table["brier"], 1 + 1 / 3 if brier is None else brier, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(LOGPROBS, st.data())
def test_what_is_added_to_a_letter_or_to_a_question_does_not_move_it(logprobs, data):
    num, num_choices = logprobs.shape
    floats = st.floats(-30, 30)
    of_letters = np.array(data.draw(st.lists(floats, min_size=num_choices, max_size=num_choices)))
    of_questions = np.array(data.draw(st.lists(floats, min_size=num, max_size=num)))
    sizes = data.draw(st.lists(st.integers(2, num_choices), min_size=num, max_size=num))
    logprobs = np.where(np.arange(num_choices) < np.array(sizes)[:, None], logprobs, np.nan)
    answers = "".join(data.draw(st.sampled_from(LETTERS[:size])) for size in sizes)
    before = question_probabilities(make_score(logprobs, answers))
    after = question_probabilities(make_score(logprobs + of_letters + of_questions[:, None], answers))
    np.testing.assert_allclose(before, after, atol=1e-9)
    assert before["correct_probability"].between(0, 1).all()
    assert before["brier"].between(-1e-12, 2 + 1e-12).all()
    probabilities = choice_probabilities(make_score(logprobs, answers))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(probabilities.isna(), np.isnan(logprobs))


@settings(max_examples=40, deadline=None)
@given(LOGPROBS)
def test_of_equally_many_choices_it_is_the_mean_that_is_taken_off(logprobs):
    answers = "A" * len(logprobs)
    wanted = softmax(logprobs - logprobs.mean(axis=0), axis=1)[:, 0]
    np.testing.assert_allclose(of_right(make_score(logprobs, answers)), wanted, atol=1e-9)


def test_a_letter_that_few_questions_have_is_not_judged_by_their_level():
    """Two questions of 2 choices at -1, one of 3 at -21: C is liked as well as the others, and its mean is -21."""
    logprobs = np.array([[-1, -1, -np.inf], [-1, -1, -np.inf], [-21, -21, -21]])
    np.testing.assert_allclose(np.ptp(letter_preferences(logprobs)), 0, atol=1e-12)
    logprobs[2, 2] = -20
    preferences = letter_preferences(logprobs)
    assert preferences[2] - preferences[0] == pytest.approx(1)


@pytest.mark.parametrize("score", [
    make_score([[np.nan] * 4] * 3, "ABC", "generate"),
    make_score([[np.nan] * 4] * 3, "ABC"),
    Score(pd.DataFrame({"question_id": ["q0", "q1"], "answer": ["A", "B"]})),
])  # fmt: skip
def test_without_log_likelihoods_there_is_none(score):
    table = question_probabilities(score)
    assert table.isna().all(axis=None)
    assert list(table) == ["correct_probability", "brier"]


def test_a_question_without_log_likelihoods_costs_the_others_nothing():
    rows = [[0, -5], [np.nan, np.nan], [-2, -3]]
    first, missing, last = of_right(make_score(rows, "AAB"))
    assert [first, last] == pytest.approx([1 / (1 + np.exp(-2))] * 2)
    assert np.isnan(missing)
    assert np.isnan(of_right(make_score([[0, np.nan], [-1, -2]], "BA"))[0]), "its right choice has none"
