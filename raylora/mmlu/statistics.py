"""Accuracy with its standard error, probability of the right choice, and their changes from the base model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from raylora.mmlu.cloze import accuracies, letters_of
from raylora.mmlu.paired import balanced_change, change_interval, holm, mcnemar, mean_change, verdicts
from raylora.mmlu.probabilities import LETTER_SCORINGS, question_probabilities
from raylora.mmlu.questions import LETTERS, SUBJECT_GROUP_NAMES, subject_group
from raylora.records import Score

PREDICTION_SHARES = tuple(f"prediction_share_{letter.lower()}" for letter in LETTERS)
"""Columns of a row and a summary; those behind the fourth are there where a question has so many choices."""
BALANCED_CHANGES = tuple(f"balanced_accuracy_change{side}" for side in ("", "_low", "_high"))
PROBABILITY_CHANGES = (
    *(f"correct_probability_change{side}" for side in ("", "_low", "_high")),
    "correct_probability_p_value",
)
MIN_CONSTANT_SHARE, MIN_CONSTANT_QUESTIONS = 0.95, 20
"""Answers are called constant where so many of so many questions are answered with one letter. If the right letters of
20 questions are drawn evenly, one of them is right for 19 in 2e-10 of the cases."""
MIN_DEGREES_OF_FREEDOM = 30
"""Questions less subjects, of which fewer do not estimate the variance within subjects. Simulated, 57 subjects: with 5,
every tenth estimate is 0; with 10, it lies between half and 1.4 times the true standard error in 95% of cases; with 30,
within 26% of it, and accuracy +- 1.96 of it covers 94%."""


def summarize(score: Score) -> dict[str, Any]:
    """Accuracies (0 to 1) and standard errors: overall, macro average, the four groups, every subject.

    Overall and groups are weighted by size; ``macro_accuracy`` is the plain mean over subjects, ``balanced_accuracy``
    that over right letters (the mean of their recalls). A subject's standard error is the sample standard deviation
    (n - 1) over the root of n. The overall one, and a group's, pools the variances within subjects, as
    lm-evaluation-harness does (``pooled_sample_stderr``), unless there are too few questions a subject for that
    (``MIN_DEGREES_OF_FREEDOM``): then it is sqrt(p (1 - p) / (n - 1)) of all questions together, p being the accuracy.
    Where all answers are right, or all wrong, a standard error is None: nothing says how far the accuracy may be off.

    Returns:
        ``overall_accuracy``, ``overall_stderr``, ``overall_stderr_clustered`` (see ``clustered_stderr``),
        ``total_questions``, ``correct_questions``, ``macro_accuracy``, ``balanced_accuracy``, ``prediction_share_a`` to
        ``_d``, and further where a question has more choices (of all questions, how many were answered with the letter,
        0 to 1), ``correct_probability`` (mean over questions, 0 to 1) and ``brier`` (0 to 2), both None without
        log-likelihoods (``probabilities.question_probabilities``), ``groups`` and ``subjects`` (by name: ``accuracy``,
        ``stderr``, ``num_questions``), ``accuracy_per_choice``, ``_character``, ``_byte`` and ``_token`` (of cloze
        alone), ``num_unparsed`` (generated answers that name no letter) and ``num_truncated`` (prompts cut to fit the
        context window).
    """
    table = score.questions
    found = accuracies_of(table)
    subjects, groups, overall = found["subjects"], found["groups"], found["overall"]
    probabilities = question_probabilities(score)
    return {
        "overall_accuracy": overall["accuracy"],
        "overall_stderr": overall["stderr"],
        "overall_stderr_clustered": clustered_stderr(table["correct"], table["subject"]),
        "total_questions": score.total_questions,
        "correct_questions": score.correct_questions,
        "macro_accuracy": float(np.mean([s["accuracy"] for s in subjects.values()])),
        "balanced_accuracy": float(table.groupby("answer")["correct"].mean().mean()),
        **{
            name: float((table["prediction"] == letter).mean())
            for name, letter in zip(
                PREDICTION_SHARES, LETTERS[: max(4, len(letters_of(score.questions)))], strict=False
            )
        },
        **{str(name): _mean_or_none(values) for name, values in probabilities.items()},
        "groups": {
            name: groups.get(name, {"accuracy": None, "stderr": None, "num_questions": 0})
            for name in SUBJECT_GROUP_NAMES
        },
        "subjects": subjects,
        **accuracies(score.questions),
        "num_unparsed": int((table["prediction"] == "").sum()),
        "num_truncated": score.info.get("num_truncated", 0),
    }


def accuracies_of(table: pd.DataFrame) -> dict[str, Any]:
    """Accuracies and standard errors of answers: ``overall``, and by name ``groups`` and ``subjects``.

    Args:
        table: ``subject`` and ``correct`` of each question.

    Returns:
        A dict each of ``accuracy``, ``stderr`` and ``num_questions``; see ``summarize``.
    """
    grouped = table.groupby(table["subject"].map(subject_group))
    return {
        "overall": _pooled(table),
        "groups": {str(name): _pooled(part) for name, part in grouped},
        "subjects": {str(name): _accuracy(part["correct"]) for name, part in table.groupby("subject")},
    }


def _mean_or_none(values: pd.Series[float]) -> float | None:
    """None where a value is missing, or all are."""
    return float(values.mean()) if len(values) and values.notna().all() else None


def clustered_stderr(correct: pd.Series[bool], subjects: pd.Series[str]) -> float | None:
    """The standard error of an accuracy for other questions like these, of other subjects like these.

    Questions of a subject are right or wrong together, so they say less than as many independent ones. It adds their
    products within subjects (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640, equation 4). With few
    subjects it is uncertain, and too small on average: of G, by about the root of (G - 1) / G.

    Args:
        correct, subjects: of each question, (N,).

    Returns:
        0 to 1; None with fewer than two subjects, and where all answers are right, or all wrong.
    """
    num, errors = len(correct), correct - correct.mean()
    squares = float((errors**2).sum())
    if subjects.nunique() < 2 or correct.nunique() < 2:
        return None
    products = float((errors.groupby(subjects).sum() ** 2).sum()) - squares
    return math.sqrt(squares / (num * (num - 1)) + products / num**2)


def _accuracy(correct: pd.Series[bool]) -> dict[str, Any]:
    accuracy, num = float(correct.mean()), len(correct)
    # The root of p (1 - p) / (n - 1) is the sample standard deviation of 0s and 1s over the root of n.
    stderr = math.sqrt(accuracy * (1 - accuracy) / (num - 1)) if 0 < accuracy < 1 else None
    return {"accuracy": accuracy, "stderr": stderr, "num_questions": num}


def _pooled(table: pd.DataFrame) -> dict[str, Any]:
    """Of several subjects: accuracy over all questions, standard error from the pooled variance within subjects."""
    together = _accuracy(table["correct"])
    by_subject = table.groupby("subject")["correct"].agg(["size", "mean"])
    sizes, accuracies = by_subject["size"].to_numpy(), by_subject["mean"].to_numpy(dtype=float)
    degrees_of_freedom = int((sizes - 1).sum())
    squares = float((sizes * accuracies * (1 - accuracies)).sum())
    if degrees_of_freedom < MIN_DEGREES_OF_FREEDOM or not squares:
        return together
    return {**together, "stderr": math.sqrt(squares / degrees_of_freedom / len(table))}


def compare(score: Score, base: Score) -> dict[str, Any]:
    """The difference in accuracy against ``base`` on the same questions.

    Returns:
        ``difference`` of accuracies, -1 to 1; ``ci_low`` and ``ci_high``, its 95% interval
        (``paired.change_interval``); ``mcnemar_p_value``, of the exact test; ``num_gained`` and ``num_lost``, questions
        that only this model, or only the base, has right; ``balanced_accuracy_change``, with ``_low`` and ``_high``,
        its 95% interval (``paired.balanced_change``); ``correct_probability_change``, with ``_low``, ``_high`` and
        ``correct_probability_p_value`` (``paired.mean_change``), and ``brier_change``, None where one of them has no
        log-likelihoods. ``mcnemar_p_value`` and ``difference`` are those of accuracy.

    Raises:
        ValueError: the questions are not the same.
    """
    counts = _paired_counts(score, base)
    of_counts = _changes(*(c.sum(axis=0, keepdims=True) for c in counts))
    ours, theirs = (question_probabilities(s) for s in (score, base))
    differences = (ours - theirs).sort_index()  # question by question, as pandas pairs them by their ids
    of_probability = mean_change(differences["correct_probability"])
    return {
        **{name: values.item() for name, values in of_counts.items()},
        **dict(zip(PROBABILITY_CHANGES, of_probability, strict=True)),
        "brier_change": _mean_or_none(differences["brier"]),
    }


def compare_subjects(score: Score, base: Score) -> pd.DataFrame:
    """``compare`` for every subject, but for probabilities: a row each, with ``holm_p_value`` and ``verdict``.

    ``holm_p_value`` is McNemar's p-value, adjusted over subjects: to call those below 0.05 significant is wrong about
    even one subject with a probability of at most 5%. ``verdict``: see ``paired.verdicts``.

    Raises:
        ValueError: the questions are not the same.
    """
    gained, lost, num = _paired_counts(score, base)
    changes = _changes(gained, lost, num)
    subjects = sorted(score.questions["subject"].unique())
    p_values = changes["mcnemar_p_value"]
    return pd.DataFrame(
        {
            "subject": subjects,
            "num_questions": num.sum(axis=1),
            **changes,
            "holm_p_value": holm(p_values),
            "verdict": verdicts(p_values, changes["difference"], *(changes[name] for name in BALANCED_CHANGES)),
        }
    )


def _paired_counts(score: Score, base: Score) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Questions gained, lost and asked, each (subjects, right letters), both sorted."""
    ours, theirs = (s.questions.set_index("question_id") for s in (score, base))
    if len(ours) != len(theirs) or set(ours.index) != set(theirs.index):
        raise ValueError("only scores of the same questions can be compared")
    difference = ours["correct"].astype(int) - theirs["correct"].loc[ours.index].astype(int)
    pairs = ours[["subject", "answer"]].assign(gained=difference == 1, lost=difference == -1, num=1)
    counts = pairs.groupby(["subject", "answer"])[["gained", "lost", "num"]].sum().unstack(fill_value=0)
    return counts["gained"].to_numpy(), counts["lost"].to_numpy(), counts["num"].to_numpy()


def _changes(gained: np.ndarray, lost: np.ndarray, num: np.ndarray) -> dict[str, np.ndarray]:
    """What ``compare`` says of right answers, as arrays (m,), of counts (m, letters)."""
    balanced = dict(zip(BALANCED_CHANGES, balanced_change(gained, lost, num), strict=True))
    gained, lost, num = gained.sum(axis=1), lost.sum(axis=1), num.sum(axis=1)
    low, high = change_interval(gained, lost, num)
    return {
        "difference": (gained - lost) / num,
        "ci_low": low,
        "ci_high": high,
        "mcnemar_p_value": mcnemar(gained, lost),
        "num_gained": gained,
        "num_lost": lost,
        **balanced,
    }


def note_on_constant_answers(shares: Sequence[float | None], num_questions: float, scoring: str) -> str:
    """What to say of a model that answers (nearly) all questions with one letter; empty where it does not.

    Such as ``answers A to 57 of 57 questions: letters cannot show a change; try --scoring cloze``. The caller puts the
    model before it.

    Args:
        shares: of all questions, how many were answered with each letter, 0 to 1; None or NaN: not known.
        num_questions: may be NaN, where it is not known.
        scoring: how it was scored: of anything but letters nothing is said.
    """
    known = [(share, letter) for share, letter in zip(shares, LETTERS, strict=False) if share is not None]
    share, letter = max((pair for pair in known if not math.isnan(pair[0])), default=(0.0, ""))
    is_constant = share > MIN_CONSTANT_SHARE - 1e-9 and num_questions >= MIN_CONSTANT_QUESTIONS
    if scoring not in LETTER_SCORINGS or not is_constant:
        return ""
    num = round(share * num_questions)
    what = f"letters {'cannot' if num == num_questions else 'can hardly'} show a change"
    return f"answers {letter} to {num} of {num_questions:.0f} questions: {what}; try --scoring cloze"
