"""Accuracy with its standard error, and the difference to the base model with interval and p-value."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from raylora.mmlu.questions import SUBJECT_GROUP_NAMES, SUBJECT_GROUPS
from raylora.records import Score

NUM_RESAMPLES = 10_000
"""Of the paired bootstrap."""


def summarize(score: Score) -> dict[str, Any]:
    """Accuracies (0 to 1) and standard errors: overall, macro average, the four groups, every subject.

    Overall and groups are weighted by size; ``macro_accuracy`` is the plain mean over subjects. A subject's standard
    error is the sample standard deviation (n - 1) over the root of n; None for a single question. A group's pools the
    variances within its subjects, as lm-evaluation-harness does (``pooled_sample_stderr``).

    Returns:
        ``overall_accuracy``, ``overall_stderr``, ``total_questions``, ``correct_questions``, ``macro_accuracy``,
        ``groups`` and ``subjects`` (by name: ``accuracy``, ``stderr``, ``num_questions``), ``num_unparsed`` (generated
        answers that name no letter) and ``num_truncated`` (prompts cut to fit the context window).
    """
    table = score.questions.assign(group=score.questions["subject"].map(lambda s: SUBJECT_GROUPS.get(s, "other")))
    subjects = {str(name): _accuracy(part["correct"]) for name, part in table.groupby("subject")}
    groups = {str(name): _pooled(part) for name, part in table.groupby("group")}
    overall = _pooled(table)
    return {
        "overall_accuracy": overall["accuracy"],
        "overall_stderr": overall["stderr"],
        "total_questions": score.total_questions,
        "correct_questions": score.correct_questions,
        "macro_accuracy": float(np.mean([s["accuracy"] for s in subjects.values()])),
        "groups": {
            name: groups.get(name, {"accuracy": None, "stderr": None, "num_questions": 0})
            for name in SUBJECT_GROUP_NAMES
        },
        "subjects": subjects,
        "num_unparsed": int((table["prediction"] == "").sum()),
        "num_truncated": score.info.get("num_truncated", 0),
    }


def _accuracy(correct: pd.Series[bool]) -> dict[str, Any]:
    values = correct.to_numpy(dtype=float)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"accuracy": float(values.mean()), "stderr": stderr, "num_questions": len(values)}


def _pooled(table: pd.DataFrame) -> dict[str, Any]:
    """Of several subjects: accuracy over all questions, standard error from the pooled variance within subjects."""
    by_subject = table.assign(correct=table["correct"].astype(float)).groupby("subject")["correct"]
    within = by_subject.agg(["size", "var"])
    sizes, variances = within["size"].to_numpy(), within["var"].fillna(0).to_numpy()
    degrees_of_freedom = int((sizes - 1).sum())
    squares = float(((sizes - 1) * variances).sum())
    stderr = math.sqrt(squares / degrees_of_freedom / len(table)) if degrees_of_freedom else None
    return {"accuracy": float(table["correct"].mean()), "stderr": stderr, "num_questions": len(table)}


def compare(score: Score, base: Score, seed: int = 0) -> dict[str, Any]:
    """The difference in accuracy against ``base`` on the same questions.

    Returns:
        ``difference`` of accuracies, -1 to 1; ``ci_low`` and ``ci_high``, its 95% interval by the paired percentile
        bootstrap (Efron and Tibshirani 1993); ``mcnemar_p_value``, exact (McNemar 1947): the binomial test on the
        questions that only one model has right; ``num_gained`` and ``num_lost``, how many those are.

    Raises:
        ValueError: the questions are not the same.
    """
    correct, base_correct = (s.questions.set_index("question_id")["correct"].astype(int) for s in (score, base))
    if len(correct) != len(base_correct) or set(correct.index) != set(base_correct.index):
        raise ValueError("only scores of the same questions can be compared")
    differences = (correct - base_correct.loc[correct.index]).to_numpy()
    num, gained, lost = len(differences), int((differences == 1).sum()), int((differences == -1).sum())
    # Paired differences are 1, -1 or 0. To resample them is to draw how many there are of each: a multinomial draw, in
    # place of 10,000 draws of all questions.
    draws = np.random.default_rng(seed).multinomial(
        num, [gained / num, lost / num, 1 - (gained + lost) / num], NUM_RESAMPLES
    )
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / num, [2.5, 97.5])
    return {
        "difference": (gained - lost) / num,
        "ci_low": float(low),
        "ci_high": float(high),
        "mcnemar_p_value": float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0,
        "num_gained": gained,
        "num_lost": lost,
    }


def compare_subjects(score: Score, base: Score, seed: int = 0) -> pd.DataFrame:
    """``compare`` for every subject, a row each, and ``holm_p_value``: McNemar's p-values adjusted over subjects.

    To call those below 0.05 significant is wrong about even one subject with a probability of at most 5%.

    Raises:
        ValueError: the questions are not the same.
    """
    rows = []
    for subject, of_subject in score.questions.groupby("subject"):
        base_of_subject = base.questions[base.questions["subject"] == subject]
        comparison = compare(Score(of_subject), Score(base_of_subject), seed)
        rows.append({"subject": subject, "num_questions": len(of_subject), **comparison})
    table = pd.DataFrame(rows)
    return table.assign(holm_p_value=holm(table["mcnemar_p_value"].to_numpy()))


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values (m,) adjusted for m tests (Holm 1979), in the same order.

    The k-th smallest is multiplied by m - k + 1; each is at least as large as the one before it, and at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1.0)
    return adjusted
