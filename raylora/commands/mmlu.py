"""Evaluate any model, and any number of its adapters, without training.

    python -m raylora.mmlu --model demo --questions demo --adapter results/chunk_demo/experiments/.../adapter

Writes ``results/mmlu/<model>/``: ``summary.csv`` (a row a model), ``subjects.csv`` (a row a model and subject) and the
answer to every question as Parquet. What was evaluated before is not evaluated again.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from raylora.commands.options import MmluConfig
from raylora.console import make_console
from raylora.errors import ErrorKind, UserError, one_line
from raylora.mmlu.evaluator import Evaluator, check_prompt_style, note_on_thinking
from raylora.mmlu.question_set import load_question_set, model_key, questions_key, score_key
from raylora.mmlu.questions import SHORT_GROUPS
from raylora.mmlu.scoring import load_score
from raylora.mmlu.statistics import compare, compare_subjects, summarize
from raylora.model.adapter_files import adapter_hash, check_adapter, note_on_base
from raylora.model.sources import quiet_libraries, resolve_model
from raylora.records import Score
from raylora.storage.remote_store import store_at
from raylora.storage.store import Store, safe_name

SIGNIFICANT = 0.05
"""A subject with a Holm-adjusted p-value below this is shown as changed."""


@dataclass(frozen=True)
class Evaluated:
    """One model's score, and the file that holds it. ``name`` is ``base`` or the adapter's."""

    name: str
    score: Score
    path: Path


def evaluate_all(config: MmluConfig, console: Console) -> tuple[list[Evaluated], list[str]]:
    """Evaluate the base and every adapter, and write the tables. The base comes first, then adapters as given.

    Returns:
        The scores, and a line for each adapter that cannot be asked: it costs no other's score.

    Raises:
        UserError: the questions or the model cannot be used, or none of the adapters. Most such errors are raised
            before any model is loaded.
    """
    quiet_libraries()
    failures = dict(filter(None, map(_check, config.adapter)))
    if failures and len(failures) == len(set(config.adapter)):
        raise UserError("; ".join(failures.values()), kind=ErrorKind.ADAPTER)
    question_set = load_question_set(config)
    for note in question_set.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    source = resolve_model(config.model)
    thinking = check_prompt_style(config, source)
    if note := note_on_thinking(thinking):
        console.print(f"Note: {note}", soft_wrap=True)
    model_values, question_values = model_key(config, source), questions_key(config, question_set, thinking)
    store = store_at(config.output / "mmlu" / safe_name(str(config.model), model_values))
    with store.held(config.fresh), Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        evaluated = _evaluate_all(config, source, store, model_values, question_values, failures, bar)
        write_tables(store, evaluated)
    return evaluated, [failures[folder] for folder in dict.fromkeys(config.adapter) if folder in failures]


def _check(folder: Path) -> tuple[Path, str] | None:
    """The folder, and what is wrong with the adapter in it; None where that is nothing."""
    try:
        check_adapter(folder)
    except UserError as error:
        return folder, str(error)
    return None


def _evaluate_all(
    config: MmluConfig,
    source: str,
    store: Store,
    model_values: dict[str, Any],
    question_values: dict[str, Any],
    failures: dict[Path, str],
    bar: Bar,
) -> list[Evaluated]:
    """Evaluate the base, and the adapters without a failure; those that fail now are added to ``failures``."""

    def progress(name: str) -> Any:
        task = bar.add_task(name, total=None)
        return lambda _, done, total: bar.update(task, completed=done, total=total)

    evaluator = Evaluator(config, store)
    base_key = score_key(model_values, question_values)
    base = evaluator.base_score(base_key, wait=True, progress=progress("base"))
    assert base is not None
    evaluated = [Evaluated("base", base, store.shown(store.base_file(base_key, "scores.parquet")))]
    for folder in config.adapter:
        if folder in failures:
            continue
        key = score_key(model_values, question_values, adapter_hash(folder))
        name = _adapter_name(folder)
        path = store.base_file(base_key, f"adapter-{key[:16]}.parquet")
        store.fetch(path)
        if note := note_on_base(folder, source):
            bar.console.print(f"Note: {name}: {note}", soft_wrap=True)
        if not path.is_file():
            try:
                with evaluator.adapter(folder):
                    evaluator.score(base_key, key, path, progress(name))
            except (UserError, RuntimeError, MemoryError) as error:
                failures[folder] = str(error) if isinstance(error, UserError) else f"{folder}: {one_line(error)}"
                continue
            store.share(path)
        evaluated.append(Evaluated(name, load_score(path), store.shown(path)))
    return evaluated


def _adapter_name(folder: Path) -> str:
    """The name of an adapter's folder; of the folder around it, an experiment's, if its own name is ``adapter``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def summary_row(evaluated: Evaluated, base: Score) -> dict[str, Any]:
    """A model's row of ``summary.csv``: accuracies and standard errors from 0 to 1, and the change from the base."""
    summary = summarize(evaluated.score)
    groups: dict[str, Any] = {}
    for name, group in summary["groups"].items():
        groups |= {f"accuracy_{name}": group["accuracy"], f"stderr_{name}": group["stderr"]}
    change = compare(evaluated.score, base)
    info = evaluated.score.info
    return {
        "model": evaluated.name,
        **{key: value for key, value in summary.items() if key not in {"groups", "subjects"}},
        **groups,
        **{f"change_{key}" if key == "difference" else key: value for key, value in change.items()},
        "thinking": info.get("thinking"),
        **{key: info.get(key) for key in ("token_budget", "num_shared_prefixes", "no_prefix_because", "mmlu_seconds")},
        "scores": str(evaluated.path),
    }


def write_tables(store: Store, evaluated: list[Evaluated]) -> None:
    """Write ``summary.csv`` and ``subjects.csv`` of all evaluated models, the base first."""
    base = evaluated[0].score
    summary = pd.DataFrame([summary_row(e, base) for e in evaluated])
    subjects = []
    for e in evaluated:
        accuracy = pd.DataFrame.from_dict(summarize(e.score)["subjects"], orient="index")
        change = compare_subjects(e.score, base).set_index("subject").drop(columns="num_questions")
        subjects.append(accuracy.join(change).rename_axis("subject").reset_index().assign(model=e.name))
    table = pd.concat(subjects, ignore_index=True)
    table = table[["model", *table.columns.drop("model")]]
    store.write_file("summary.csv", lambda p: summary.to_csv(p, index=False))
    store.write_file("subjects.csv", lambda p: table.to_csv(p, index=False))


def print_tables(evaluated: list[Evaluated], console: Console) -> None:
    """Print a row for each evaluated model, the base first; then notes, and the subjects that adapters changed."""
    base = evaluated[0].score
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("model", "accuracy", "stderr", "macro", *SHORT_GROUPS.values(), "change", "95% interval", "p")
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True, overflow="ellipsis")
    for e in evaluated:
        v = summary_row(e, base)
        cells = [v["overall_accuracy"], v["overall_stderr"], v["macro_accuracy"]]
        cells += [v[f"accuracy_{group}"] for group in SHORT_GROUPS]
        change = [f"{v['change_difference']:+.3f}", f"{v['ci_low']:+.3f} {v['ci_high']:+.3f}"]
        change.append(f"{v['mcnemar_p_value']:.2g}")
        table.add_row(
            e.name, *("" if c is None else f"{c:.3f}" for c in cells), *(change if e is not evaluated[0] else [])
        )
    console.print(table)
    for e in evaluated:
        info, summary = e.score.info, summarize(e.score)
        counts = {"unparsed": summary["num_unparsed"], "with a cut prompt": summary["num_truncated"]}
        for what, count in counts.items():
            if count:
                console.print(f"{e.name}: {count} of {summary['total_questions']} {what}")
        if info.get("no_prefix_because") and info["scoring"] == "logits":
            console.print(f"{e.name}: no shared prefix: {info['no_prefix_because']}", soft_wrap=True)
    for e in evaluated[1:]:
        print_changed_subjects(e, base, console)


def print_changed_subjects(evaluated: Evaluated, base: Score, console: Console) -> None:
    """Print the subjects whose accuracy an adapter changed, from the largest loss to the largest gain.

    A subject counts as changed if its p-value, Holm-adjusted over all subjects, is below ``SIGNIFICANT``.
    """
    table = compare_subjects(evaluated.score, base)
    changed = table[table["holm_p_value"] < SIGNIFICANT].sort_values("difference")
    for row in changed.itertuples():
        text = f"{evaluated.name}: {row.subject} {row.difference:+.3f} (Holm-adjusted p {row.holm_p_value:.2g})"
        console.print(text, soft_wrap=True)
    if changed.empty:
        text = f"{evaluated.name}: none of {len(table)} subjects changed (Holm-adjusted p < {SIGNIFICANT})"
        console.print(text, soft_wrap=True)


def run(config: MmluConfig) -> int:
    if config.threads:
        torch.set_num_threads(config.threads)
    console = make_console()
    evaluated, failures = evaluate_all(config, console)
    print_tables(evaluated, console)
    console.print(f"Files: {evaluated[0].path.parents[2]}", soft_wrap=True)
    for failure in failures:
        print(f"raylora: {failure}", file=sys.stderr)
    return 1 if failures else 0
