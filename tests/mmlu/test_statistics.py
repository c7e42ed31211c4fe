"""Accuracies, comparisons and their p-values, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from raylora.mmlu.questions import LETTERS
from raylora.mmlu.statistics import (
    clustered_stderr,
    compare,
    compare_subjects,
    note_on_constant_answers,
    summarize,
)
from raylora.records import Score


def make_score(correct: list[bool], subjects: list[str] | None = None) -> Score:
    """Right letters take turns; a wrong answer is the next letter."""
    answers = [LETTERS[i % 4] for i in range(len(correct))]
    predictions = [LETTERS[(i + (not right)) % 4] for i, right in enumerate(correct)]
    return answered(predictions, answers, subjects or ["anatomy"] * len(correct))


def answered(predictions: list[str], answers: list[str], subjects: list[str]) -> Score:
    table = pd.DataFrame({"subject": subjects, "answer": answers, "prediction": predictions})
    ids = [f"q{i}" for i in range(len(table))]
    return Score(table.assign(question_id=ids, correct=table["answer"] == table["prediction"]))


def test_accuracies_by_hand():
    summary = summarize(make_score([True, True, False, True, False], ["anatomy"] * 3 + ["philosophy", "sociology"]))
    assert summary["overall_accuracy"] == 0.6
    assert summary["subjects"]["anatomy"]["stderr"] == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert summary["macro_accuracy"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert summary["groups"]["stem"]["accuracy"] == pytest.approx(2 / 3)
    assert summary["groups"]["humanities"] == {"accuracy": 1.0, "stderr": None, "num_questions": 1}
    assert summary["groups"]["other"]["accuracy"] is None
    # Right letters A B C D A, answers A B D D B: recalls are 1/2, 1, 0 and 1.
    assert summary["balanced_accuracy"] == pytest.approx((1 / 2 + 1 + 0 + 1) / 4)
    assert [summary[f"prediction_share_{letter}"] for letter in "abcd"] == [0.2, 0.4, 0.0, 0.4]


def test_an_answer_without_a_letter_is_in_no_share():
    summary = summarize(answered(["A", "", "", "B"], ["A", "A", "B", "B"], ["anatomy"] * 4))
    assert [summary[f"prediction_share_{letter}"] for letter in "abcd"] == [0.25, 0.25, 0, 0]
    assert summary["num_unparsed"] == 2


@pytest.mark.parametrize(
    ("num_subjects", "num", "degrees_of_freedom"),
    [(20, 20, 0), (57, 58, 1), (57, 86, 29), (57, 87, 30), (57, 570, 513)],
)
def test_a_standard_error_of_few_questions_a_subject_is_binomial(num_subjects, num, degrees_of_freedom):
    """Of 20 and of 58 questions it was 0.0 beside an accuracy of 0.4."""
    subjects = [f"subject {i % num_subjects}" for i in range(num)]
    correct = np.random.default_rng(num).random(num) < 0.4
    summary = summarize(make_score(list(correct), subjects))
    accuracy = correct.mean()
    binomial = math.sqrt(accuracy * (1 - accuracy) / (num - 1))
    of_subjects = pd.Series(correct.astype(float)).groupby(subjects).agg(["size", "var"]).fillna(0)
    squares = float(((of_subjects["size"] - 1) * of_subjects["var"]).sum())
    pooled = math.sqrt(squares / degrees_of_freedom / num) if degrees_of_freedom else 0.0
    assert summary["overall_stderr"] == pytest.approx(pooled if degrees_of_freedom >= 30 else binomial)
    assert summary["groups"]["other"]["stderr"] == summary["overall_stderr"]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["anatomy", "virology", "sociology"]), st.booleans()), min_size=1))
def test_the_clustered_standard_error_is_that_of_a_plain_loop(questions):
    subjects, correct = zip(*questions, strict=True)
    num, mean = len(correct), sum(correct) / len(correct)
    found = summarize(make_score(list(correct), list(subjects)))["overall_stderr_clustered"]
    if len(set(subjects)) < 2 or len(set(correct)) < 2:
        assert found is None
        return
    variance = sum((x - mean) ** 2 for x in correct) / (num * (num - 1))
    for i in range(num):
        for j in range(num):
            if i != j and subjects[i] == subjects[j]:
                variance += (correct[i] - mean) * (correct[j] - mean) / num**2
    assert found == pytest.approx(math.sqrt(variance))


def test_the_clustered_standard_error_covers_other_subjects_like_these():
    """200 times 57 subjects of 20 questions, whose accuracies are spread by 0.15 around 0.5."""
    rng = np.random.default_rng(0)
    subjects = pd.Series(np.repeat(np.arange(57), 20).astype(str))
    truths = np.repeat(rng.normal(0.5, 0.15, (200, 57)).clip(0, 1), 20, axis=1)
    answers = rng.random(truths.shape) < truths
    accuracies = answers.mean(axis=1)
    stderrs = [clustered_stderr(pd.Series(correct), subjects) for correct in answers]
    covers = np.abs(accuracies - 0.5) < 1.96 * np.array(stderrs)
    assert 0.9 < covers.mean() <= 0.99
    assert np.median(stderrs) > 1.4 * np.sqrt(0.25 / 1140), "independent questions would be surer"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["anatomy", "virology", "sociology"]), st.booleans()), min_size=1))
def test_no_standard_error_is_zero(questions):
    subjects, correct = zip(*questions, strict=True)
    summary = summarize(make_score(list(correct), list(subjects)))
    parts = [*summary["groups"].values(), *summary["subjects"].values()]
    errors = [summary["overall_stderr"], *(part["stderr"] for part in parts)]
    assert all(error is None or 0 < error <= 0.5 + 1e-9 for error in errors)
    assert (summary["overall_stderr"] is None) == (len(set(correct)) == 1)


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


def test_the_balanced_change_is_the_difference_of_balanced_accuracies():
    rng = np.random.default_rng(3)
    answers, subjects = list(rng.choice(list("ABCD"), 200)), list(rng.choice(["anatomy", "virology"], 200))
    ours, base = (answered(list(rng.choice(list("ABCD"), 200)), answers, subjects) for _ in range(2))
    result = compare(ours, base)
    balanced, balanced_base = (summarize(score)["balanced_accuracy"] for score in (ours, base))
    assert result["balanced_accuracy_change"] == pytest.approx(balanced - balanced_base)
    assert result["balanced_accuracy_change_low"] < balanced - balanced_base < result["balanced_accuracy_change_high"]


def test_the_order_of_the_questions_does_not_matter():
    rng = np.random.default_rng(4)
    ours, base = (make_score(list(rng.random(50) < 0.5)) for _ in range(2))
    assert compare(Score(ours.questions.sample(frac=1, random_state=1)), base) == compare(ours, base)


def test_scores_of_other_questions_are_not_compared():
    with pytest.raises(ValueError, match="same questions"):
        compare(make_score([True]), make_score([True, False]))


def test_p_values_of_subjects_are_adjusted_together():
    rng = np.random.default_rng(0)
    subjects = [name for name in "abc" for _ in range(40)]
    scores = [make_score(list(rng.random(120) < share), subjects) for share in (0.9, 0.4)]
    table = compare_subjects(*scores)
    ordered = table.sort_values("mcnemar_p_value")
    expected = np.minimum(np.maximum.accumulate(ordered["mcnemar_p_value"].to_numpy() * [3, 2, 1]), 1)
    np.testing.assert_allclose(ordered["holm_p_value"], expected)
    assert list(table["num_questions"]) == [40, 40, 40]
    for row in table.to_dict("records"):
        alone = compare(*(Score(s.questions[s.questions["subject"] == row["subject"]]) for s in scores))
        shared = [name for name in alone if name in table]
        assert {name: row[name] for name in shared} == pytest.approx({name: alone[name] for name in shared})
    assert set(table["verdict"]) == {"gain"}


def test_a_subject_whose_favourite_letter_moved_did_not_get_better():
    """Of 60 questions 45 have D for an answer: from always A to always D is 45 gained, 15 lost."""
    answers, subjects = ["A"] * 15 + ["D"] * 45, ["anatomy"] * 60
    table = compare_subjects(answered(["D"] * 60, answers, subjects), answered(["A"] * 60, answers, subjects))
    assert table["difference"].item() == 0.5
    assert table["holm_p_value"].item() < 0.001
    assert table["balanced_accuracy_change"].item() == 0
    assert table["verdict"].item() == "letter"


def with_logprobs(score: Score, logprobs: np.ndarray, scoring: str = "letters") -> Score:
    columns = {f"logprob_{letter.lower()}": logprobs[:, k] for k, letter in enumerate("ABCD")}
    return Score(score.questions.assign(**columns), {"scoring": scoring})


def test_the_probability_of_the_right_choice_and_its_change():
    """By hand: ours gives the right choices 0.7 and 0.4, the base 0.25 each, the rest shared evenly."""
    base = with_logprobs(make_score([True, False]), np.log(np.full((2, 4), 0.25)), "cloze")
    shares = np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.4, 0.2, 0.2]])
    ours = with_logprobs(make_score([True, False]), np.log(shares), "cloze")
    summary, result = summarize(ours), compare(ours, base)
    assert summary["correct_probability"] == pytest.approx(0.55)
    assert summary["brier"] == pytest.approx((0.09 + 3 * 0.01 + 0.36 + 3 * 0.04) / 2)
    assert result["correct_probability_change"] == pytest.approx(0.3)
    assert result["brier_change"] == pytest.approx(summary["brier"] - 0.75)
    assert result["correct_probability_change_low"] < 0.3 < result["correct_probability_change_high"]
    # t = 0.3 / (0.15 root 2 / root 2) = 2 with one degree of freedom: 1 - 2 arctan(2) / pi
    assert result["correct_probability_p_value"] == pytest.approx(1 - 2 * math.atan(2) / math.pi)


def test_a_moved_preference_for_a_letter_is_no_change_of_probability():
    rng = np.random.default_rng(0)
    logprobs = rng.normal(-2, 1, (40, 4))
    base = make_score([True] * 40)
    moved = with_logprobs(base, logprobs + np.array([0, 0, 0, 5]))
    result = compare(moved, with_logprobs(base, logprobs))
    assert result["correct_probability_change"] == pytest.approx(0, abs=1e-12)
    assert result["correct_probability_p_value"] == 1


def test_probabilities_are_paired_by_question_and_null_without_log_likelihoods():
    rng = np.random.default_rng(5)
    ours, base = (with_logprobs(make_score([True] * 30), rng.normal(-2, 1, (30, 4))) for _ in range(2))
    turned = Score(ours.questions.sample(frac=1, random_state=1), ours.info)
    assert compare(turned, base) == pytest.approx(compare(ours, base))
    written = with_logprobs(make_score([True] * 30), np.full((30, 4), np.nan), "generate")
    assert summarize(written)["correct_probability"] is None
    assert summarize(written)["brier"] is None
    for one, other in ((written, base), (ours, written)):
        result = compare(one, other)
        assert {result[name] for name in result if "probability" in name or "brier" in name} == {None}
        assert result["mcnemar_p_value"] == 1


@pytest.mark.parametrize(
    ("shares", "num", "scoring", "wanted"),
    [
        ([1, 0, 0, 0], 57, "letters", "answers A to 57 of 57 questions: letters cannot show a change"),
        ([0, 0, 0, 1], 57, "logits", "answers D to 57 of 57 questions: letters cannot show a change"),
        ([0.05, 0.95, 0, 0], 20, "", "answers B to 19 of 20 questions: letters can hardly show a change"),
        ([0.06, 0.94, 0, 0], 100, "letters", ""),
        ([1, 0, 0, 0], 19, "letters", ""),
        ([1, 0, 0, 0], 57, "cloze", ""),
        ([1, 0, 0, 0], 57, "generate", ""),
        ([None] * 4, 57, "letters", ""),
        ([math.nan] * 4, math.nan, "letters", ""),
    ],
)
def test_constant_answers_are_said(shares, num, scoring, wanted):
    note = note_on_constant_answers(shares, num, scoring)
    assert note == (f"{wanted}; try --scoring cloze" if wanted else "")
