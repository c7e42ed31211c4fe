"""The plan as a table, for ``--dry-run``."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable

import numpy as np
from rich.console import Console
from rich.table import Table

from raylora.mmlu.power import measured_share, power_line
from raylora.planning.hardware import gigabytes
from raylora.planning.plan import Plan
from raylora.records import Experiment, ResultRow, digest

MAX_SHOWN_NAMES = 5
"""Datasets that a line names; of more it says how many."""


def print_plan(plan: Plan, console: Console) -> None:
    """Print what would run and why, how large it is, what memory and time it takes, and what is done already."""
    done = plan.done()
    table = Table(title=f"{plan.chunk}: {len(plan.experiments)} experiments, {len(done)} done")
    for name in ("dataset", "experiment", "examples", "tokens", "memory", "time", "done", "would run, because"):
        table.add_column(name, overflow="fold")
    reasons = _reasons(plan, done)
    for e in plan.experiments:
        of_stages = reasons.get(e.experiment_id, {})
        finished = "row" if e.experiment_id in done else ", ".join(s for s, why in of_stages.items() if not why)
        todo = "; ".join(f"{s}: {why}" for s, why in of_stages.items() if why)
        size = (f"{e.num_examples:,}", f"{e.num_tokens:,}", _memory_text(e), _duration_text(e.estimated_seconds))
        cells = (e.dataset, e.experiment_id, *size, finished, e.error or todo)
        table.add_row(*cells)
    console.print(table)
    for line in (*lines_on_forms(plan.experiments), *lines_on_template(plan.experiments)):
        console.print(line, soft_wrap=True, markup=False, highlight=False)
    for adapted in plan.adapted:
        console.print(f"Of the model {adapted.summary}.", soft_wrap=True)
    if repository := plan.config.hub_repository:
        kind = "public" if plan.config.push_public else "private"
        console.print(f"Good adapters go to {repository}-<dataset> on the hub; new ones are {kind}.", soft_wrap=True)
    if plan.misfit:
        console.print(f"Nothing can be run here: {plan.misfit}", soft_wrap=True)
    if plan.num_questions and plan.experiments:
        console.print(power_of(plan, done.values()), soft_wrap=True)
        for name in plan.num_further:
            console.print(f"{name}: {power_of(plan, done.values(), name)}", soft_wrap=True)
    remaining = [e for e in plan.experiments if e.experiment_id not in done]
    if remaining and any(e.estimated_seconds for e in remaining):
        seconds = sum(e.estimated_seconds or 0.0 for e in remaining)
        console.print(
            f"About {_duration_text(seconds)} for one worker, stages that are done not taken off; what is done once, "
            "loading the model and its own evaluation, not added. Tokens, memory and time are estimates, from a sample "
            "of each dataset and the model's shape (raylora/planning/estimate.py).",
            soft_wrap=True,
        )


def _reasons(plan: Plan, done: Collection[str]) -> dict[str, dict[str, str]]:
    """Why each stage of the experiments without a row would run, by experiment id; empty for one that is done."""
    # Of those with a row nothing is read: their adapters have 170 MB each.
    pending = [e for e in plan.experiments if e.experiment_id not in done]
    stages = {e.experiment_id: [s for s in plan.config.all_stages if s in e.origins] for e in pending}
    if plan.config.fresh:
        return {name: dict.fromkeys(of_one, "--fresh") for name, of_one in stages.items()}
    with plan.store.read_ahead(stages):
        return {e.experiment_id: {s: plan.store.why_not_done(e, s) for s in stages[e.experiment_id]} for e in pending}


def lines_on_forms(experiments: Iterable[Experiment]) -> list[str]:
    """What the records of the datasets are, and which of their keys are not used: a line for all that are alike."""
    datasets: dict[tuple[str, str], dict[str, None]] = {}
    for e in experiments:
        if e.record_form:
            datasets.setdefault((e.record_form, e.ignored_keys), {})[e.dataset] = None
    return [
        f"{_some(names)}: records of the form {form}" + (f"; keys left aside: {ignored}" if ignored else "")
        for (form, ignored), names in datasets.items()
    ]


def lines_on_template(experiments: Iterable[Experiment]) -> list[str]:
    """What the chat template does to the datasets' first examples: a line for all that are alike."""
    datasets: dict[str, dict[str, None]] = {}
    for e in experiments:
        if e.template_note:
            datasets.setdefault(e.template_note, {})[e.dataset] = None
    return [f"{_some(names)}, first examples: {note}" for note, names in datasets.items()]


def _some(names: Collection[str]) -> str:
    shown = ", ".join(itertools.islice(names, MAX_SHOWN_NAMES))
    return f"{shown} and {len(names) - MAX_SHOWN_NAMES} more" if len(names) > MAX_SHOWN_NAMES else shown


def power_of(plan: Plan, done: Iterable[ResultRow], question_set: str = "") -> str:
    """What a set of the plan's questions can show, in one line (``mmlu.power.power_line``).

    Args:
        question_set: its name; the first one's is empty.
        done: rows that are there already: how many answers differ is taken from them, if there are any with MMLU.
    """
    suffix, num = (f"[{question_set}]", plan.num_further[question_set]) if question_set else ("", plan.num_questions)
    names = [f"{name}{suffix}" for name in ("num_gained", "num_lost", "total_questions")]
    counts = [[row.values.get(name) for name in names] for row in done]
    share = measured_share(*np.array(counts, dtype=float).reshape(-1, 3).T)
    # Trainings that differ in their seed alone are tested together.
    tests = {(e.path, digest({k: v for k, v in e.settings.items() if k != "seed"})) for e in plan.experiments}
    return power_line(num, len({e.path for e in plan.experiments}), share, len(tests))


def _memory_text(experiment: Experiment) -> str:
    peak = experiment.estimated_peak_memory_bytes
    return gigabytes(peak) if peak else "?"


def _duration_text(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
