"""Can the outcome of a training be known before it? See PREDICT of ``raylora.commands.run_command`` for its use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from raylora.commands.options import ExplainConfig, FitConfig, PredictConfig
from raylora.console import make_console, print_notes
from raylora.errors import UserError
from raylora.predict.conformal import is_too_few
from raylora.predict.predictor import Predictor, load_predictor
from raylora.predict.sentences import summary_of, why_unmeasured
from raylora.predict.tables import NAME_COLUMNS, TrainingTable, known_from_table, names_of, numbers_of
from raylora.predict.uncertainty import LEVEL, scores
from raylora.predict.validation import Told, fit_predictor
from raylora.rows import read_table
from raylora.storage.atomic import to_json, write_atomically, write_text
from raylora.storage.csv_files import write_csv
from raylora.storage.places import writing

SCORE_NAMES = {"rmse": "RMSE", "mae": "mean error", "r2": "R2", "rank_correlation": "rank correlation"}


def fit(config: FitConfig) -> int:
    console, path = make_console(), config.table
    training = known_from_table(read_table(path), config.target, config.group, config.leave_out, str(path))
    for note in training.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    if is_too_few(len(training.target), config.coverage):
        raise UserError(f"{path}: {len(training.target)} good rows are too few for --coverage {config.coverage:g}")
    _note_few_groups(training, config.coverage, console)
    with writing("--output", config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    with _progress(console) as told:
        predictor, held_out = fit_predictor(
            training, config.target, config.coverage, config.folds, config.seed, config.threads, told=told
        )
    from raylora.predict.figures import write_calibration  # imports matplotlib: the errors above need no second

    with writing("--output", config.output):
        predictor.save(config.output)
        write_text(config.output / "predictor.json", to_json(predictor.card))
        write_atomically(config.output / "held_out.csv", lambda p: write_csv(held_out, p))
        write_calibration(config.output / "calibration.png", predictor, held_out)
    print_head(predictor, console)
    print_card(predictor.card, console)
    console.print(f"Files: {config.output}", soft_wrap=True)
    console.print(f"Next: python -m raylora.predict predict {config.output} TABLE", soft_wrap=True)
    return 0


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Told]:
    """What a fit is doing: a bar at a terminal, a line for each kind of work elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def told(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)
            if not console.is_terminal and done == 0:
                console.print(f"{what} ({total})" if total > 1 else what, soft_wrap=True)

        yield told


def print_head(predictor: Predictor, console: Console) -> None:
    """Print the sentence that answers the question, the verdict behind it, and warnings."""
    console.print(summary_of(predictor.card), soft_wrap=True)
    console.print(predictor.verdict, soft_wrap=True)
    print_notes(console, predictor.notes)


def _note_few_groups(training: TrainingTable, coverage: float, console: Console) -> None:
    """Warn if there are fewer groups than the coverage needs rows: errors within a group are alike, as of one row."""
    if training.groups is not None and is_too_few(num := len(np.unique(training.groups)), coverage):
        console.print(
            f"Note: {num} groups are few for --coverage {coverage:g}: intervals may hold less than that of new ones",
            soft_wrap=True,
        )


def predict(config: PredictConfig) -> int:
    console, predictor, table = make_console(), load_predictor(config.predictor), read_table(config.table)
    print_head(predictor, console)
    predictions = predictor.predict(table, config.coverage, str(config.table))
    target = predictor.card["target"]
    measured = numbers_of(table, [target], str(config.table))[target] if target in table else None
    named = [name for name in NAME_COLUMNS if name in table]
    full = pd.concat([table[named], predictions], axis=1) if named else predictions
    if config.output is not None:
        with writing("--output", config.output):
            write_atomically(config.output, lambda partial: write_csv(full, partial))
    print_predictions(names_of(table), predictions, target, console)
    if any(unmeasured := predictor.unmeasured(table, str(config.table))):
        print_notes(console, [why_unmeasured(table, unmeasured)])
    if measured is not None:
        _print_check(target, measured, predictions, console)
    if config.output is not None:
        console.print(f"Files: {config.output}", soft_wrap=True)
    return 0


def _print_check(target: str, measured: pd.Series, predictions: pd.DataFrame, console: Console) -> None:
    """Print how far off the predictions are, over the rows whose outcome was measured."""
    if (has_both := measured.notna() & predictions["prediction"].notna()).any():
        truth, predicted = measured[has_both], predictions[has_both]
        inside = truth.between(predicted["low"], predicted["high"]).mean()
        rmse = scores(truth.to_numpy(), predicted["prediction"].to_numpy())["rmse"]
        console.print(
            f"Of {has_both.sum()} rows with a measured {target}: RMSE {rmse:.4f}, {inside:.1%} inside their intervals "
            "(too good where the predictor was fitted on them).",
            soft_wrap=True,
        )


def print_predictions(names: list[str], predictions: pd.DataFrame, target: str, console: Console) -> None:
    """Print the rows from the highest prediction to the lowest; those without one last."""
    table = Table(title=f"predicted {target}", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("dataset", "prediction", "interval", "unlike any seen in"):
        table.add_column(name, justify="left" if name in {"dataset", "unlike any seen in"} else "right")
    order = (-predictions["prediction"]).fillna(np.inf).to_numpy().argsort(kind="stable")
    for i in order:
        row = predictions.iloc[i]
        outside = row["outside"].split(", ") if row["outside"] else []
        shown = ", ".join(outside[:2]) + (f" and {len(outside) - 2} more" if len(outside) > 2 else "")
        numbers = ("", "")
        if pd.notna(row["prediction"]):
            numbers = (f"{row['prediction']:z.4f}", f"{row['low']:z.4f} {row['high']:z.4f}")
        table.add_row(names[i], *numbers, shown)
    console.print(table)


def explain(config: ExplainConfig) -> int:
    predictor, console = load_predictor(config.predictor), make_console()
    print_head(predictor, console)
    print_card(predictor.card, console, num_features=None)
    return 0


def print_card(card: dict[str, Any], console: Console, num_features: int | None = 10) -> None:
    """Print a predictor's card: its errors beside those of baselines, coverage, feature groups, importances.

    Under each figure, or behind it, stand both ends of its interval.

    Args:
        num_features: features in the table of importances, at most; None: all.
    """
    grouped = f", grouped by {card['group_column']} ({card['num_groups']})" if card["group_column"] else ""
    console.print(
        f"{card['target']} from {len(card['columns'])} features, {card['num_rows']} rows; "
        f"{card['num_folds']} folds{grouped}; model: {card['kind']} (in folds: {', '.join(card['kinds_of_folds'])})",
        soft_wrap=True,
    )
    first = "predictor" if card["verdict"]["better"] else "regression, not used"
    table = _table(f"on held-out rows (below: {LEVEL:.0%} intervals)", "", *SCORE_NAMES.values())
    for name, figures in {first: card, **card["baselines"]}.items():
        digits = {"rmse": 5, "mae": 5, "r2": 3, "rank_correlation": 3}
        table.add_row(name, *(f"{figures[score]:z.{digits[score]}f}" for score in SCORE_NAMES))
        table.add_row("", *(_ends(figures["intervals"][score], digits[score] - 1) for score in SCORE_NAMES))
    console.print(table)
    levels = (
        f"{float(level):.0%}: {share:.1%} ({card['coverage_intervals'][level][0]:.0%} to "
        f"{card['coverage_intervals'][level][1]:.0%})"
        for level, share in card["coverage_by_level"].items()
    )
    console.print(f"Held-out rows inside intervals of level {', '.join(levels)}", soft_wrap=True)
    if "feature_groups" in card:
        console.print(_group_table(card["feature_groups"]))
        console.print(
            "(semantic and perplexity cost their seconds together, those of text among them: one pass makes them)",
        )
        console.print(_importance_table(card["importance"], card.get("effects", {}), num_features))


def _group_table(groups: dict[str, dict[str, Any]]) -> Table:
    table = _table("feature groups", "", "columns", "s a dataset", "RMSE without", "gain", "RMSE alone")
    for name, g in groups.items():
        figures = ("rmse_without", "gain", "rmse_alone")
        seconds = "unknown" if g["seconds"] is None else f"{g['seconds']:.1f}"
        table.add_row(
            name, str(g["num_columns"]), seconds, *("" if g[key] is None else f"{g[key]:z.5f}" for key in figures)
        )
        ends = g["intervals"]
        table.add_row("", "", "", *(_ends(ends[key], 4) if key in ends else "" for key in figures))
    return table


def _ends(interval: list[float], digits: int) -> str:
    return f"{interval[0]:z.{digits}f} {interval[1]:z.{digits}f}"


def _importance_table(importance: dict[str, list[float]], effects: dict[str, float], num_features: int | None) -> Table:
    """The features that matter most; with which sign, where the card says so (those of older versions do not)."""
    title = "rise of the RMSE when a feature is shuffled (those that go together share it)"
    if effects:
        title += "; effect: of the prediction, from the feature's lower quartile to its upper one"
    table = _table(title, "", "mean", "std", *(["effect"] if effects else []))
    for name, (mean, std) in list(importance.items())[:num_features]:
        effect = [f"{effects[name]:+z.5f}"] if name in effects else []
        table.add_row(name, f"{mean:z.5f}", f"{std:z.5f}", *effect)
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table
