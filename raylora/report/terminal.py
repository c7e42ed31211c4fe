"""The results of a run, printed at its end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from raylora.console import make_console
from raylora.mmlu.paired import LETTER_MOVED
from raylora.mmlu.questions import LETTERS
from raylora.mmlu.statistics import PREDICTION_SHARES
from raylora.records import ResultRow
from raylora.report.findings import favourite_letters, notes_on_constant_answers, ranking
from raylora.report.outcomes import outcomes
from raylora.report.read_run import FinishedRun, load_run
from raylora.report.transfer import transfer
from raylora.storage.store import Store


def print_results(rows: Sequence[ResultRow], store: Store, console: Console | None = None) -> None:
    """Print the datasets from the best change in accuracy to the worst, the failures with causes, and the files.

    Args:
        rows: all rows of the run, good or not.
        console: where to (default: standard output).
    """
    console = console or make_console()
    good = sorted((r for r in rows if r.ok), key=lambda r: -(r.values.get("accuracy_change") or 0))
    failed = [r for r in rows if not r.ok]
    if good:
        console.print(_ranking(good, console.width))
        run = load_run(store.root)
        ranked = ranking(run)
        notes = [letter_notes(run, ranked), seed_notes(ranked), discovery_notes(run, ranked), set_notes(run, ranked)]
        if found := transfer(run):
            notes.append([f"Other datasets' held-out examples: {found['sentence']}"])
        for note in itertools.chain(*notes):
            console.print(note, soft_wrap=True)
    for row in good:
        for name in ("template_note", "train_notes"):
            if row.values.get(name):
                console.print(f"Note: {row.values['dataset']}: {row.values[name]}", soft_wrap=True)
    for row in failed:
        console.print(f"FAILED {row.values['dataset']}: {row.values['error']}", soft_wrap=True)
    num_failed = f", {len(failed)} failed" if failed else ""
    console.print(f"{len(good)} of {len(rows)} succeeded{num_failed}. Files: {store.place}", soft_wrap=True)
    console.print("  results.csv, results.parquet   one row a dataset")
    if (store.root / "transfer_table.csv").is_file():
        console.print("  transfer_table.csv             what each adapter does to every dataset's held-out loss")
    if (store.root / "report.html").is_file():
        console.print("  report.html                    figures, for a browser")
    if (store.root / "run.json").is_file():
        console.print("  run.json                       settings, versions, hashes")
    console.print("  experiments/                   adapter, scores, loss curve and log of each")


def letter_notes(run: FinishedRun, ranked: dict[str, Any]) -> list[str]:
    """Lines about models that prefer a letter: the base, and adapters that changed no more than that."""
    if not ranked["rows"]:
        return []
    of_letters = [run.numbers(f"base_{name}")[ranked["rows"][0]] for name in PREDICTION_SHARES]
    shares = [share for share in of_letters if not math.isnan(share)]
    most = max(shares, default=0.0)
    notes = notes_on_constant_answers(run, ranked)
    if most > 0.5 and not any(note.startswith("The base") for note in notes):
        notes = [f"The base answers {LETTERS[shares.index(most)]} to {most:.0%} of the questions.", *notes]
    return [*notes, *(f"{run.labels[row]}: {text}" for row, text in favourite_letters(run, ranked).items())]


ONE_SEED = "One seed each: the intervals know the noise of the questions, not that of other seeds (--repeats 5)."


def seed_notes(ranked: dict[str, Any]) -> list[str]:
    """A line for each dataset that was trained with several seeds; where none was, what one seed cannot say."""
    if ranked["seeds"] is None:
        return [ONE_SEED] if ranked["rows"] else []
    lines = []
    for row in sorted(ranked["rows"], key=lambda row: -ranked["seeds"]["lines"][row]["change"]):
        line, verdict = ranked["seeds"]["lines"][row], ranked["verdicts"][row]
        num = len(line["rows"])
        interval = "unknown" if line["low"] is None else f"{line['low']:+.3f} to {line['high']:+.3f}"
        called = (
            LETTER_MOVED if verdict == "letter" else f"a significant {verdict}" if verdict != "undecided" else verdict
        )
        over = f"over {num} seeds, a fresh one {interval}" if num > 1 else f"with its one seed, {interval}"
        lines.append(f"{line['label']}: {line['change']:+.3f} {over}: {called}")
    return lines


def discovery_notes(run: FinishedRun, ranked: dict[str, Any]) -> list[str]:
    """Of three changes or more: how many are significant, by Holm and by false-discovery rate, and the best shrunk."""
    rows, estimates = ranked["rows"], ranked["accuracy_change_shrunk"]
    if not rows or all(math.isnan(estimates[row]) for row in rows):
        return []
    lines = (ranked["seeds"] or {}).get("lines")
    changes = {row: lines[row]["change"] if lines else run.numbers("accuracy_change")[row] for row in rows}
    best = max(rows, key=changes.__getitem__)
    label = lines[best]["label"] if lines else run.labels[best]
    num = ranked["num_gains"] + ranked["num_losses"]
    by_rate = f"{ranked['num_fdr']} at a false-discovery rate of 5%"
    notes = [f"Significant: {num} of {len(rows)} by Holm at 5%; {by_rate}."]
    raw, moved = f"{changes[best]:+.3f}", f"{estimates[best]:+.3f}"
    if not math.isnan(estimates[best]) and raw != moved:
        about = f"{label} {raw}, shrunk towards the mean of all {moved}"
        notes.append(f"The best of {len(rows)} noisy changes is partly luck: {about}.")
    return notes


def set_notes(run: FinishedRun, ranked: dict[str, Any]) -> list[str]:
    """A line for each further set of questions: how many changes of accuracy are significant, the best, the worst."""
    notes = []
    for outcome in outcomes(run, ranked):
        if outcome["kind"] != "accuracy":
            continue
        lines = {row: line["change"] for row, line in outcome["lines"].items() if not math.isnan(line["change"])}
        verdicts = [outcome["verdicts"][row] for row in lines]
        best, worst = max(lines, key=lines.__getitem__), min(lines, key=lines.__getitem__)
        counts = f"{verdicts.count('gain')} better, {verdicts.count('loss')} worse, by Holm at 5%, of {len(lines)}"
        ends = [f"{run.labels[row]} {lines[row]:+.3f}" for row in dict.fromkeys([best, worst])]
        notes.append(f"{outcome['set']}: {counts}; {' to '.join(ends)}.")
    return notes


MIN_WIDTH = 95
"""Characters in a line from which the table has room for the probability of the right choice beside accuracy."""


def _ranking(rows: Sequence[ResultRow], width: int) -> Table:
    """A line for each row; hyperparameters have columns where a grid varies them."""
    table = Table(title="MMLU accuracy against the base model", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    columns: dict[str, Any] = {
        "dataset": lambda v: v["dataset"],
        "base": lambda v: _number(v["base_overall_accuracy"], ".3f"),
        "adapter": lambda v: _number(v["overall_accuracy"], ".3f"),
        "change": lambda v: _number(v["accuracy_change"], "+.3f"),
        "95% interval": lambda v: (
            f"{_number(v['accuracy_change_low'], '+.3f')} {_number(v['accuracy_change_high'], '+.3f')}"
        ),
        "loss": lambda v: _pair(v["train_initial_loss"], v["train_final_loss"], ".2f"),
        "dup.": lambda v: _number(v["approximate_duplicates"], ".0%"),
        "ppl": lambda v: _number(v["base_model_perplexity"], ".1f"),
    }
    if width >= MIN_WIDTH and any(row.values.get("correct_probability_change") is not None for row in rows):
        columns["p(right)"] = lambda v: _number(v.get("correct_probability_change"), "+.4f")
    varied = [
        name
        for name in ("lora_r", "learning_rate", "num_epochs", "batch_size", "seed")
        if len({row.values[name] for row in rows}) > 1
    ]
    for name in [*columns, *varied]:
        table.add_column(name, justify="left" if name == "dataset" else "right", no_wrap=name != "dataset")
    for row in rows:
        cells = [str(cell(row.values)) for cell in columns.values()]
        cells += [str(row.values[k]) for k in varied]
        table.add_row(*cells)
    return table


def _pair(first: float | None, second: float | None, form: str) -> str:
    return "" if first is None or second is None else f"{first:{form}} {second:{form}}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
