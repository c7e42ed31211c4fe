"""How much work this process has done: questions asked, tokens trained on, batches that memory did not hold.

The numbers only rise, and no result depends on them: they are for whoever watches (``metrics.py``).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class WorkCounts:
    """Counts since some moment; the difference of two is what was done in between."""

    questions: int = 0
    """Questions of MMLU that were answered, with an adapter or without one."""
    supervised_tokens: int = 0
    """Tokens whose loss was learnt from, in trainings and probes."""
    oom_backoffs: int = 0
    """Times that memory ran out and the same work was tried again in smaller pieces."""

    def __sub__(self, other: WorkCounts) -> WorkCounts:
        return WorkCounts(
            self.questions - other.questions,
            self.supervised_tokens - other.supervised_tokens,
            self.oom_backoffs - other.oom_backoffs,
        )


work_counts = WorkCounts()
"""Of this process, since it began."""
