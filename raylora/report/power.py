"""What a run's questions can show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from raylora.mmlu.power import measured_share, power_line
from raylora.report.read_run import FinishedRun


def power_of_run(run: FinishedRun, ranked: dict[str, Any], column: Callable[[str], str] = str) -> str | None:
    """What the run's questions can show, in one line (``mmlu.power.power_line``); None without MMLU.

    Args:
        ranked: from ``ranking``.
        column: gives a column of the set of questions that is meant (default: the first).
    """
    rows, sizes = ranked["rows"], run.numbers(column("total_questions"))
    if not rows or not sizes[rows[0]] >= 1:
        return None
    # Rows of an older raylora lack the counts.
    counts = [column(name) for name in ("num_gained", "num_lost", "total_questions")]
    share = measured_share(*(run.numbers(name)[run.ok] for name in counts))
    hashes, names = run.texts("data_hash"), run.texts("dataset")
    datasets = {(names[row], hashes[row]) for row in rows}
    return power_line(int(sizes[rows[0]]), len(datasets), share, len(rows))
