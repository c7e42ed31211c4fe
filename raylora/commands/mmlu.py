"""Evaluate any model, and any number of its adapters, without training.

    python -m raylora.mmlu --model demo --questions demo --adapter results/chunk_demo/experiments/.../adapter

Writes ``results/mmlu/<model>/``: ``summary.csv`` (a row a model), ``subjects.csv`` (a row a model and subject) and the
answer to every question as Parquet. What was evaluated before is not evaluated again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich import box
from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from raylora.commands.options import MmluConfig
from raylora.config.options import MASKED
from raylora.console import make_console, print_notes
from raylora.errors import ErrorKind, UserError, one_line
from raylora.mmlu.evaluator import Evaluator, Unscored, check_prompt_style, note_on_thinking
from raylora.mmlu.paired import ALPHA, LETTER_MOVED, false_discovery, holm, verdicts
from raylora.mmlu.question_set import load_question_set, model_key, questions_key, score_key
from raylora.mmlu.questions import LETTERS, SHORT_GROUPS
from raylora.mmlu.scoring import load_score
from raylora.mmlu.shrinkage import shrunk, stderr_of_interval
from raylora.mmlu.statistics import (
    BALANCED_CHANGES,
    PREDICTION_SHARES,
    PROBABILITY_CHANGES,
    compare,
    compare_subjects,
    note_on_constant_answers,
    summarize,
)
from raylora.model.adapter_files import adapter_hash, adapter_name, check_adapter, note_on_base
from raylora.model.sources import quiet_libraries, resolve_model
from raylora.records import ProgressCallback, Score
from raylora.storage.csv_files import write_csv
from raylora.storage.remote_store import store_at
from raylora.storage.store import Store, safe_name
from raylora.texts import shown_line

COUNTS_OF_CHANGES = {"num_gained": "Int64", "num_lost": "Int64"}


@dataclass(frozen=True)
class Evaluated:
    """One model's score, and the file that holds it. ``name`` is ``base`` or the adapter's."""

    name: str
    score: Score
    path: Path
    adapter: Path | None = None


Sets = dict[str, list[Evaluated]]
"""By the name of a set of questions, all models, the base first. The first set's name is empty; what ``--mask`` leaves
of it is named ``masked``."""


def evaluate_all(config: MmluConfig, console: Console) -> tuple[Sets, list[str]]:
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
    question_sets = {name: load_question_set(config, name) for name in config.question_sets}
    print_notes(console, (note for question_set in question_sets.values() for note in question_set.notes))
    source = resolve_model(config.model)
    thinking = check_prompt_style(config, source)
    print_notes(console, filter(None, [note_on_thinking(thinking)]))
    adapters = list(dict.fromkeys(config.adapter))
    of_bases = {folder: note_on_base(folder, source) for folder in adapters if folder not in failures}
    print_notes(console, (f"{adapter_name(folder)}: {note}" for folder, note in of_bases.items() if note))
    of_model = model_key(config, source)
    store = store_at(config.output / "mmlu" / safe_name(str(config.model), of_model))
    with store.held(config.fresh), Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        evaluator, evaluated = Evaluator(config, store), Sets()
        for name, question_set in question_sets.items():
            asked = [folder for folder in adapters if folder not in failures]
            of_questions = questions_key(config, question_set, thinking)
            evaluated[name] = _evaluate_set(evaluator, asked, (of_model, of_questions), failures, _tasks(bar, name))
            if config.mask and not name:
                evaluated[MASKED] = [replace(e, score=e.score.without(question_set.masked)) for e in evaluated[name]]
        # One that fails with one set of questions is in no table of another, either.
        evaluated = {name: [e for e in found if e.adapter not in failures] for name, found in evaluated.items()}
        write_tables(store, evaluated)
    return evaluated, [failures[folder] for folder in adapters if folder in failures]


def _tasks(bar: Bar, question_set: str) -> Callable[[str], ProgressCallback]:
    """What shows the progress of a model, by its name, with a set of questions."""

    def of_model(name: str) -> ProgressCallback:
        task = bar.add_task(f"{name}, {question_set}" if question_set else name, total=None)
        return lambda _, done, total: bar.update(task, completed=done, total=total)

    return of_model


def _check(folder: Path) -> tuple[Path, str] | None:
    """The folder, and what is wrong with the adapter in it; None where that is nothing."""
    try:
        check_adapter(folder)
    except UserError as error:
        return folder, str(error)
    return None


def _evaluate_set(
    evaluator: Evaluator,
    adapters: Sequence[Path],
    keys: tuple[dict[str, Any], dict[str, Any]],
    failures: dict[Path, str],
    progress: Callable[[str], ProgressCallback],
) -> list[Evaluated]:
    """Evaluate the base and adapters on one set of questions; those that fail are added to ``failures``.

    Args:
        keys: from ``model_key`` and ``questions_key``.
        progress: shows that of a model, by its name.
    """
    store, base_key = evaluator.store, score_key(*keys)
    of_adapters = {}
    for folder in adapters:
        key = score_key(*keys, adapter_hash(folder))
        of_adapters[folder] = Unscored(key, store.base_file(base_key, f"adapter-{key[:16]}.parquet"), folder)
        store.fetch(of_adapters[folder].path)
    everybody = [Unscored(base_key, store.base_file(base_key, "scores.parquet"), None), *of_adapters.values()]
    if len(unscored := [one for one in everybody if not one.path.is_file()]) > 1:
        evaluator.answer_together(base_key, unscored)
    base = evaluator.base_score(base_key, wait=True, progress=progress("base"))
    assert base is not None
    evaluated = [Evaluated("base", base, store.shown(store.base_file(base_key, "scores.parquet")))]
    for folder, one in of_adapters.items():
        name, path = adapter_name(folder), one.path
        if not path.is_file():
            try:
                with evaluator.adapter(folder):
                    evaluator.score(base_key, one.key, path, progress(name))
            except (UserError, RuntimeError, MemoryError) as error:
                text = str(error) if isinstance(error, UserError) else one_line(error)
                failures[folder] = text if str(folder) in text else f"{folder}: {text}"
                continue
            store.share(path)
        evaluated.append(Evaluated(name, load_score(path), store.shown(path), folder))
    return evaluated


def summary_row(evaluated: Evaluated, base: Score) -> dict[str, Any]:
    """A model's row of ``summary.csv``: accuracies, probabilities, standard errors, and the change from the base.

    In the base's own row there is no change: its values are None. ``mmlu_note`` says so where answers are constant.
    """
    summary = summarize(evaluated.score)
    groups: dict[str, Any] = {}
    for name, group in summary["groups"].items():
        groups |= {f"accuracy_{name}": group["accuracy"], f"stderr_{name}": group["stderr"]}
    change = compare(evaluated.score, base)
    if evaluated.score is base:
        change = dict.fromkeys(change)
    info = evaluated.score.info
    shares = [summary[name] for name in PREDICTION_SHARES if name in summary]
    note = note_on_constant_answers(shares, summary["total_questions"], info.get("scoring", ""))
    return {
        "model": evaluated.name,
        **{key: value for key, value in summary.items() if key not in {"groups", "subjects"}},
        **groups,
        **{f"change_{key}" if key == "difference" else key: value for key, value in change.items()},
        "mmlu_note": f"the model {note}" if note else "",
        "thinking": info.get("thinking"),
        **{key: info.get(key) for key in ("token_budget", "num_shared_prefixes", "no_prefix_because", "mmlu_seconds")},
        "scores": str(evaluated.path),
    }


def summary_of(sets: Sets) -> pd.DataFrame:
    """``summary.csv``, the base first: the first set's columns, then those of the others, ``accuracy[NAME]``."""
    tables = {name: _summary_of_set(evaluated) for name, evaluated in sets.items()}
    first = tables.pop("")
    further = [t.drop(columns=["model", "thinking"]).add_suffix(f"[{name}]") for name, t in tables.items()]
    return pd.concat([first, *further], axis=1)


def _summary_of_set(evaluated: list[Evaluated]) -> pd.DataFrame:
    """The base's row, and one for each adapter.

    ``holm_p_value`` and ``fdr_p_value`` (Benjamini and Hochberg) are adjusted over the adapters; ``verdict`` is made
    with the first. ``accuracy_change_shrunk``: see ``shrinkage.shrunk``; null with fewer than three adapters.
    """
    table = pd.DataFrame([summary_row(e, evaluated[0].score) for e in evaluated])
    found = verdicts(*(table[name] for name in ("mcnemar_p_value", "change_difference", *BALANCED_CHANGES)))
    of_all: dict[str, Any] = {
        "holm_p_value": holm(table["mcnemar_p_value"]),
        "fdr_p_value": false_discovery(table["mcnemar_p_value"]),
        "verdict": ["", *found[1:]],
        "accuracy_change_shrunk": shrunk(
            table["change_difference"], stderr_of_interval(table["ci_low"], table["ci_high"])
        ),
    }
    return table.assign(**of_all).astype(COUNTS_OF_CHANGES)


def write_tables(store: Store, sets: Sets) -> None:
    """Write ``summary.csv`` and ``subjects.csv`` of all evaluated models, the base first."""
    summary = summary_of(sets)
    # Without further sets there is no column that names the set.
    of_sets = [_subjects_of(e).assign(**({"set": name} if len(sets) > 1 else {})) for name, e in sets.items()]
    table = pd.concat(of_sets, ignore_index=True)
    store.write_file("summary.csv", lambda p: write_csv(summary, p))
    store.write_file("subjects.csv", lambda p: write_csv(table, p))


def _subjects_of(evaluated: list[Evaluated]) -> pd.DataFrame:
    """A row for each model and subject of one set of questions."""
    base, subjects = evaluated[0].score, []
    for e in evaluated:
        accuracy = pd.DataFrame.from_dict(summarize(e.score)["subjects"], orient="index")
        change = compare_subjects(e.score, base).set_index("subject").drop(columns="num_questions")
        change = change.astype(COUNTS_OF_CHANGES)
        if e.score is base:
            change = change.iloc[:0]  # nothing to say about the base's change from itself
        subjects.append(accuracy.join(change).rename_axis("subject").reset_index().assign(model=e.name))
    table = pd.concat(subjects, ignore_index=True)
    return table[["model", *table.columns.drop("model")]]


def print_all(sets: Sets, console: Console) -> None:
    """Print the tables of each set of questions."""
    for name, evaluated in sets.items():
        if name:
            console.print(f"{name}: {evaluated[0].score.total_questions} questions", soft_wrap=True)
        print_tables(evaluated, console)


def print_tables(evaluated: list[Evaluated], console: Console) -> None:
    """Print a row for each evaluated model, the base first; then notes, and what adapters changed."""
    base = evaluated[0].score
    table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    names = ("model", "accuracy", "stderr", "macro", *SHORT_GROUPS.values(), "change", "95% interval", "p")
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=True, overflow="ellipsis")
    summary = _summary_of_set(evaluated)
    for number, v in enumerate(summary.to_dict("records")):
        cells = [v[name] for name in ("overall_accuracy", "overall_stderr", "macro_accuracy")]
        cells += [v[f"accuracy_{group}"] for group in SHORT_GROUPS]
        change = [f"{v['change_difference']:+.3f}", f"{v['ci_low']:+.3f} {v['ci_high']:+.3f}"] if number else []
        change += [f"{v['mcnemar_p_value']:.2g}"] if number else []
        table.add_row(v["model"], *("" if pd.isna(c) else f"{c:.3f}" for c in cells), *change)
    console.print(table)
    for e in evaluated:
        info, counts = e.score.info, summarize(e.score)
        for what, key in (("unparsed", "num_unparsed"), ("with a cut prompt", "num_truncated")):
            if counts[key]:
                console.print(f"{e.name}: {counts[key]} of {counts['total_questions']} {what}")
        if info.get("no_prefix_because") and info["scoring"] != "generate":
            console.print(f"{e.name}: no shared prefix: {info['no_prefix_because']}", soft_wrap=True)
    print_letters(summary, console)
    print_probabilities(summary, console)
    for e in evaluated[1:]:
        if is_same(e.score, base):
            console.print(f"{e.name}: it is the base: every log-likelihood is the base's", soft_wrap=True)
            continue
        print_changed_subjects(e, base, console)


def is_same(score: Score, base: Score) -> bool:
    """Whether two scores have the same log-likelihoods, to the last digit, as of an adapter that was never trained.

    Written answers have none: of them nothing is said.
    """
    ours, theirs = (s.questions.filter(like="logprob_").to_numpy() for s in (score, base))
    return np.array_equal(ours, theirs)


def print_letters(summary: pd.DataFrame, console: Console) -> None:
    """Print how often each model answers each letter, and its balanced accuracy, which that does not move."""
    console.print("change, interval and p are of accuracy; balanced accuracy is the mean over right letters:")
    for v in summary.to_dict("records"):
        text = f"{v['model']}: balanced accuracy {v['balanced_accuracy']:.3f}"
        if not pd.isna(v["balanced_accuracy_change"]):
            change, low, high = (v[name] for name in BALANCED_CHANGES)
            text += f", change {change:+.3f} ({low:+.3f} {high:+.3f})"
        pairs = zip(LETTERS, PREDICTION_SHARES, strict=True)
        shares = [f"{letter} {v[name]:.0%}" for letter, name in pairs if not pd.isna(v.get(name))]
        text += f"; answers {', '.join(shares)}"
        console.print(text + (f": {LETTER_MOVED}" if v["verdict"] == "letter" else ""), soft_wrap=True)


def print_probabilities(summary: pd.DataFrame, console: Console) -> None:
    """Print each model's probability of the right choice, where there are log-likelihoods, and constant answers."""
    for v in summary.to_dict("records"):
        if not pd.isna(v["correct_probability"]):
            text = f"{v['model']}: probability of the right choice {v['correct_probability']:.4f}"
            change, low, high, p_value = (v[name] for name in PROBABILITY_CHANGES)
            text += "" if pd.isna(change) else f", change {change:+.4f}"
            text += "" if pd.isna(low) else f" ({low:+.4f} {high:+.4f}), p {p_value:.2g}"
            console.print(f"{text}; Brier score {v['brier']:.4f}", soft_wrap=True)
    for v in summary.to_dict("records"):
        if v["mmlu_note"]:
            console.print(f"{v['model']}: {v['mmlu_note']}", soft_wrap=True)


def print_changed_subjects(evaluated: Evaluated, base: Score, console: Console) -> None:
    """Print the subjects whose accuracy an adapter changed, from the largest loss to the largest gain.

    Those whose verdict (``paired.verdicts``) is not undecided.
    """
    table = compare_subjects(evaluated.score, base)
    changed = table[table["verdict"] != "undecided"].sort_values("difference")
    for row in changed.itertuples():
        text = f"{evaluated.name}: {row.subject} {row.difference:+.3f} (Holm-adjusted p {row.holm_p_value:.2g})"
        console.print(text + (f": {LETTER_MOVED}" if row.verdict == "letter" else ""), soft_wrap=True)
    if changed.empty:
        text = f"{evaluated.name}: none of {len(table)} subjects changed (Holm-adjusted p < {ALPHA})"
        console.print(text, soft_wrap=True)


def run(config: MmluConfig) -> int:
    if config.threads:
        torch.set_num_threads(config.threads)
    console = make_console()
    evaluated, failures = evaluate_all(config, console)
    print_all(evaluated, console)
    console.print(f"Files: {evaluated[''][0].path.parents[2]}", soft_wrap=True)
    for failure in failures:
        print(shown_line(f"raylora: {failure}"), file=sys.stderr)
    if failures and len(evaluated[""]) == 1:  # none of the adapters can be asked: wrong use, as where none is found
        return 2
    return 1 if failures else 0
