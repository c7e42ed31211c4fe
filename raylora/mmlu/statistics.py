"""Accuracy and its uncertainty, of one model and against the base."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from raylora.mmlu.questions import GROUPS, SUBJECT_GROUPS
from raylora.records import Score

NUM_RESAMPLES = 10_000


def summarize(score: Score) -> dict[str, Any]:
    """Accuracies (0 to 1) and standard errors: overall, macro average, the four groups, every subject.

    Overall and groups are weighted by size; ``macro_accuracy`` is the plain mean over subjects. A standard error is the
    sample standard deviation (n - 1) over the root of n; None for a single question.
    """
    table = score.questions.assign(group=score.questions["subject"].map(lambda s: SUBJECT_GROUPS.get(s, "other")))
    subjects = {str(name): _accuracy(part["correct"]) for name, part in table.groupby("subject")}
    groups = {str(name): _accuracy(part["correct"]) for name, part in table.groupby("group")}
    overall = _accuracy(table["correct"])
    return {
        "overall_accuracy": overall["accuracy"],
        "overall_stderr": overall["stderr"],
        "total_questions": score.total_questions,
        "correct_questions": score.correct_questions,
        "macro_accuracy": float(np.mean([s["accuracy"] for s in subjects.values()])),
        "groups": {name: groups.get(name, {"accuracy": None, "stderr": None, "num_questions": 0}) for name in GROUPS},
        "subjects": subjects,
        "num_unparsed": int((table["prediction"] == "").sum()),
        "num_truncated": score.info.get("num_truncated", 0),
    }


def _accuracy(correct: pd.Series[bool]) -> dict[str, Any]:
    values = correct.to_numpy(dtype=float)
    stderr = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return {"accuracy": float(values.mean()), "stderr": stderr, "num_questions": len(values)}


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
