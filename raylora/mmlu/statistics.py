"""Accuracy and its uncertainty, of one model and against the base."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from raylora.mmlu.questions import SUBJECT_GROUP_NAMES, SUBJECT_GROUPS
from raylora.records import Score

NUM_RESAMPLES = 10_000


def summarize(score: Score) -> dict[str, Any]:
    """Accuracies (0 to 1) and standard errors: overall, macro average, the four groups, every subject.

    Overall and groups are weighted by size; ``macro_accuracy`` is the plain mean over subjects. A subject's standard
    error is the sample standard deviation (n - 1) over the root of n; None for a single question. That of a group
    pools the variances within its subjects, as lm-evaluation-harness has it (``pooled_sample_stderr``).
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
    """Of several subjects: accuracy over all questions, standard error from the variance within subjects."""
    within = table.assign(correct=table["correct"].astype(float)).groupby("subject")["correct"].agg(["size", "var"])
    sizes, variances = within["size"].to_numpy(), within["var"].fillna(0).to_numpy()
    freedom = int((sizes - 1).sum())
    stderr = math.sqrt(float(((sizes - 1) * variances).sum()) / freedom / len(table)) if freedom else None
    return {"accuracy": float(table["correct"].mean()), "stderr": stderr, "num_questions": len(table)}


def compare(score: Score, base: Score, seed: int = 0) -> dict[str, Any]:
    """The difference in accuracy against ``base`` on the same questions.

    Returns:
        ``difference``; ``ci_low`` and ``ci_high``, the 95% paired percentile bootstrap (Efron and Tibshirani 1993);
        ``mcnemar_p_value``, exact (McNemar 1947): the binomial test on the questions where only one is right;
        ``num_gained`` and ``num_lost``, those questions.

    Raises:
        ValueError: the questions are not the same.
    """
    ours, theirs = (s.questions.set_index("question_id")["correct"].astype(int) for s in (score, base))
    if len(ours) != len(theirs) or set(ours.index) != set(theirs.index):
        raise ValueError("only scores of the same questions can be compared")
    differences = (ours - theirs.loc[ours.index]).to_numpy()
    num, gained, lost = len(differences), int((differences == 1).sum()), int((differences == -1).sum())
    # A resample of paired differences, which are -1, 0 or 1, is a multinomial draw of how many there are of each.
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
    """``compare`` for every subject, a row each, and ``holm_p_value``.

    Below 0.05, the chance of even one false finding among the subjects is at most 5%.
    """
    rows = []
    for subject, part in score.questions.groupby("subject"):
        theirs = base.questions[base.questions["subject"] == subject]
        rows.append({"subject": subject, "num_questions": len(part), **compare(Score(part), Score(theirs), seed)})
    table = pd.DataFrame(rows)
    return table.assign(holm_p_value=holm(table["mcnemar_p_value"].to_numpy()))


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values (m,) adjusted together (Holm 1979).

    Sorted, the k-th smallest times m - k + 1, never smaller than the one before, at most 1.
    """
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1)).clip(max=1.0)
    return adjusted
