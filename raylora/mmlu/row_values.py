"""A row's columns of MMLU, and of further sets of questions."""

from __future__ import annotations

from typing import Any

from raylora.mmlu.questions import SUBJECT_GROUP_NAMES
from raylora.mmlu.statistics import (
    BALANCED_CHANGES,
    PREDICTION_SHARES,
    PROBABILITY_CHANGES,
    compare,
    note_on_constant_answers,
    summarize,
)
from raylora.records import Score

ONLY_OF_ALL = ("thinking", "token_budget", "mmlu_oom_backoffs")
"""Columns that say how a run asked, which further sets do not have."""


def score_values(score: Score, base: Score) -> dict[str, Any]:
    """The adapter's score, the base's (``base_...``), and the change with its interval."""
    summary, base_summary, change = summarize(score), summarize(base), compare(score, base)
    groups = {f"accuracy_{name}": group["accuracy"] for name, group in summary["groups"].items()}
    names_of_shares = [name for name in PREDICTION_SHARES if name in summary]
    columns_of_both = (
        "overall_accuracy", "correct_questions", "overall_stderr", "overall_stderr_clustered", "macro_accuracy",
        "num_unparsed", "balanced_accuracy", *names_of_shares, "correct_probability", "brier",
    )  # fmt: skip
    shares = [summary[name] for name in names_of_shares]
    note = note_on_constant_answers(shares, score.total_questions, score.info.get("scoring", ""))
    return {
        **{name: summary[name] for name in (*columns_of_both, "total_questions", "num_truncated")},
        **{f"base_{name}": base_summary[name] for name in columns_of_both},
        **groups,
        "accuracy_change": change["difference"],
        "accuracy_change_low": change["ci_low"],
        "accuracy_change_high": change["ci_high"],
        **{
            name: change[name]
            for name in (
                "mcnemar_p_value",
                "num_gained",
                "num_lost",
                *BALANCED_CHANGES,
                *PROBABILITY_CHANGES,
                "brier_change",
            )
        },
        "mmlu_note": f"the model {note}" if note else "",
        "thinking": score.info.get("thinking", ""),
        "token_budget": score.info["token_budget"],
        "mmlu_oom_backoffs": score.info["num_oom_backoffs"],
    }


def set_values(name: str, score: Score, base: Score, **others: Any) -> dict[str, Any]:
    """The same of a further set of questions, in columns such as ``accuracy_change[NAME]``.

    Without the four groups, which are MMLU's, and ``ONLY_OF_ALL``.

    Args:
        others: further columns, without the name.
    """
    values = {key: value for key, value in score_values(score, base).items() if key not in ONLY_OF_ALL}
    groups = {f"accuracy_{group}" for group in SUBJECT_GROUP_NAMES}
    return {f"{key}[{name}]": value for key, value in (values | others).items() if key not in groups}
