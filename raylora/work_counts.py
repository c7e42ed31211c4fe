"""How much work this process has done: questions answered, tokens trained on, times that memory ran out.

The counts only rise, and no result depends on them: they become Ray's metrics (``cluster/metrics.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WorkCounts:
    """Counts of work; the difference of two is the work done in between."""

    questions: int = 0
    """Questions of MMLU that were answered, by the base or with an adapter."""
    supervised_tokens: int = 0
    """Supervised tokens of optimizer steps, in trainings and probes."""
    oom_backoffs: int = 0
    """Times that memory ran out and the work was done again in smaller minibatches."""

    def __sub__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(
            self.questions - other.questions,
            self.supervised_tokens - other.supervised_tokens,
            self.oom_backoffs - other.oom_backoffs,
        )


work_counts = WorkCounts()
"""The counts of this process since it started."""
