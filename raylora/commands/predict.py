"""Can the outcome of a training be known before it? See PREDICT of ``raylora.commands.run_command`` for its use."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from raylora.commands.options import ExplainConfig, FitConfig, PredictConfig
from raylora.console import make_console
from raylora.errors import UserError
from raylora.predict.predictor import load_predictor
from raylora.predict.tables import NAME_COLUMNS, TrainingTable, known_from_table, names_of, numbers_of
from raylora.predict.validation import fit_predictor, scores
from raylora.rows import read_table
from raylora.storage.atomic import to_json, write_atomically, write_text
from raylora.storage.places import writing


def fit(config: FitConfig) -> int:
    console, path = make_console(), config.table
    known = known_from_table(read_table(path), config.target, config.group, config.leave_out, str(path))
    for note in known.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    if len(known.target) < 1 / (1 - config.coverage) - 1:
        raise UserError(f"{path}: {len(known.target)} good rows are too few for --coverage {config.coverage:g}")
    _note_few_groups(known, config.coverage, console)
    with writing("--output", config.output):
        config.output.mkdir(parents=True, exist_ok=True)
    predictor, held_out = fit_predictor(
        known, config.target, config.coverage, config.folds, config.seed, config.threads
    )
    from raylora.predict.figures import write_calibration  # a second that a mistake need not wait for

    with writing("--output", config.output):
        predictor.save(config.output)
        write_text(config.output / "predictor.json", to_json(predictor.card))
        write_atomically(config.output / "held_out.csv", lambda p: held_out.to_csv(p, index=False))
        write_calibration(config.output / "calibration.png", predictor, held_out)
    print_card(predictor.card, console)
    console.print(f"Files: {config.output}", soft_wrap=True)
    console.print(f"Next: python -m raylora.predict predict {config.output} TABLE", soft_wrap=True)
    return 0


def _note_few_groups(known: TrainingTable, coverage: float, console: Console) -> None:
    """Rows of one group err together: the correction for finite samples would have to count groups."""
    if known.groups is not None and (num := len(np.unique(known.groups))) < 1 / (1 - coverage) - 1:
        console.print(
            f"Note: {num} groups are few for --coverage {coverage:g}: intervals may hold less than that of new ones",
            soft_wrap=True,
        )


def predict(config: PredictConfig) -> int:
    console, predictor, table = make_console(), load_predictor(config.predictor), read_table(config.table)
    for note in predictor.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    found = predictor.predict(table, config.coverage, str(config.table))
    target = predictor.card["target"]
    measured = numbers_of(table, [target], str(config.table))[target] if target in table else None
    named = [name for name in NAME_COLUMNS if name in table]
    full = pd.concat([table[named], found], axis=1) if named else found
    if config.output is not None:
        with writing("--output", config.output):
            write_atomically(config.output, lambda partial: full.to_csv(partial, index=False))
    print_predictions(names_of(table), found, target, console)
    if measured is not None:
        _print_check(target, measured, found, console)
    if config.output is not None:
        console.print(f"Files: {config.output}", soft_wrap=True)
    return 0


def _print_check(target: str, measured: pd.Series, found: pd.DataFrame, console: Console) -> None:
    """Where the table knows the outcome: how far off the predictions are."""
    if (there := measured.notna() & found["prediction"].notna()).any():
        truth, shown = measured[there], found[there]
        inside = truth.between(shown["low"], shown["high"]).mean()
        rmse = scores(truth.to_numpy(), shown["prediction"].to_numpy())["rmse"]
        console.print(
            f"Of {there.sum()} rows with a measured {target}: RMSE {rmse:.4f}, {inside:.1%} inside their intervals "
            "(too good where the predictor was fitted on them).",
            soft_wrap=True,
        )


def print_predictions(names: list[str], found: pd.DataFrame, target: str, console: Console) -> None:
    """Rows from the best prediction to the worst."""
    table = Table(title=f"predicted {target}", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("dataset", "prediction", "interval", "unlike any seen in"):
        table.add_column(name, justify="left" if name in {"dataset", "unlike any seen in"} else "right")
    order = found["prediction"].fillna(-np.inf).to_numpy().argsort(kind="stable")[::-1]
    for i in order:
        row = found.iloc[i]
        outside = row["outside"].split(", ") if row["outside"] else []
        shown = ", ".join(outside[:2]) + (f" and {len(outside) - 2} more" if len(outside) > 2 else "")
        numbers = ("", "")
        if pd.notna(row["prediction"]):
            numbers = (f"{row['prediction']:.4f}", f"{row['low']:.4f} {row['high']:.4f}")
        table.add_row(names[i], *numbers, shown)
    console.print(table)


def explain(config: ExplainConfig) -> int:
    print_card(load_predictor(config.predictor).card, make_console(), num_features=None)
    return 0


def print_card(card: dict[str, Any], console: Console, num_features: int | None = 10) -> None:
    """What was fitted on what, beside its baselines; groups with costs and gains; features by importance."""
    grouped = f", grouped by {card['group_column']} ({card['num_groups']})" if card["group_column"] else ""
    console.print(
        f"{card['target']} from {len(card['columns'])} features, {card['num_rows']} rows; "
        f"{card['num_folds']} folds{grouped}; model: {card['kind']} (in folds: {', '.join(card['kinds_of_folds'])})",
        soft_wrap=True,
    )
    models = {"predictor": card, **card["baselines"]}
    table = _table("on held-out rows", "", "RMSE", "mean error", "R2", "rank correlation")
    for name, s in models.items():
        table.add_row(name, f"{s['rmse']:.5f}", f"{s['mae']:.5f}", f"{s['r2']:.3f}", f"{s['rank_correlation']:.3f}")
    console.print(table)
    levels = ", ".join(f"{float(k):.0%}: {v:.1%}" for k, v in card["coverage_by_level"].items())
    console.print(f"Held-out rows inside intervals of level {levels}", soft_wrap=True)
    if "feature_groups" in card:
        console.print(_group_table(card["feature_groups"]))
        console.print(
            "(semantic and perplexity cost their seconds together, those of text among them: one pass makes them)",
        )
        console.print(_importance_table(card["importance"], num_features))


def _group_table(groups: dict[str, dict[str, Any]]) -> Table:
    table = _table("feature groups", "", "columns", "s a dataset", "RMSE without", "gain", "RMSE alone")
    for name, g in groups.items():
        cells = [g["rmse_without"], g["gain"], g["rmse_alone"]]
        seconds = "unknown" if g["seconds"] is None else f"{g['seconds']:.1f}"
        table.add_row(name, str(g["num_columns"]), seconds, *("" if c is None else f"{c:.5f}" for c in cells))
    return table


def _importance_table(importance: dict[str, list[float]], num_features: int | None) -> Table:
    table = _table("rise of the RMSE when a feature is shuffled (those that go together share it)", "", "mean", "std")
    for name, (mean, std) in list(importance.items())[:num_features]:
        table.add_row(name, f"{mean:.5f}", f"{std:.5f}")
    return table


def _table(title: str, *names: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(names):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    return table
