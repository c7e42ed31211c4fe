"""Can the outcome of a training be known before it? Fit a predictor to finished runs, use it, ask it why.

    python -m raylora.predict fit TABLE [--target accuracy_change] [--leave-out dynamic] [--output results/predictor]
    python -m raylora.predict predict PREDICTOR TABLE [--output predictions.csv]
    python -m raylora.predict explain PREDICTOR

TABLE is the folder of a run, its results.csv or results.parquet, or any table with columns of these names. PREDICTOR is
what ``fit`` writes: a folder with the model (predictor.skops), its figures as JSON, its errors on held-out rows as CSV
and a calibration figure. ``fit --help`` and so on show all options.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, field_validator
from pydantic_settings import NoDecode
from rich import box
from rich.console import Console
from rich.table import Table

from raylora.config_sources import Settings, load_settings, split_commas
from raylora.console import make_console
from raylora.errors import UserError
from raylora.predict.predictor import load_predictor
from raylora.predict.tables import NAME_COLUMNS, Target, TrainingTable, known_from_table, names_of, numbers_of
from raylora.predict.validation import fit_predictor, scores
from raylora.rows import read_table
from raylora.storage.atomic import to_json, write_atomically, write_text
from raylora.storage.places import writing

PROG = "python -m raylora.predict"


class FitConfig(Settings):
    """Fit a predictor to a table of finished runs, and measure it on rows it has not seen."""

    target: Target = Field("overall_accuracy", description="what is predicted")
    group: str | None = Field(
        None, description="column whose rows stay together in validation (none: no such; default: the dataset's)"
    )
    leave_out: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="groups (text, semantic, perplexity, dynamic, static, hyperparameters) or columns not to use",
    )
    coverage: float = Field(0.9, gt=0, lt=1, description="share of outcomes that intervals are to hold")
    folds: int = Field(5, ge=3, le=50, description="outer folds of the cross-validation")
    seed: int = Field(0, ge=0, le=2**32 - 2, description="of folds and forests")
    threads: int | None = Field(None, ge=1, description="processes that fit folds (default: one a core)")
    output: Path = Field(Path("results/predictor"), description="folder for the predictor")

    _split = field_validator("leave_out", mode="before")(split_commas)
    not_from_environment = frozenset({"output"})


class PredictConfig(Settings):
    """Predict the outcome for every row of a table, with intervals."""

    coverage: float | None = Field(None, gt=0, lt=1, description="of the intervals (default: what it was fitted with)")
    output: Path | None = Field(None, description="CSV file for the predictions")

    not_from_environment = frozenset({"output"})


class ExplainConfig(Settings):
    """What a predictor uses, how good it is on rows it has not seen, and what each feature is worth."""


def fit(argv: list[str], console: Console) -> None:
    (path,), argv = _take_paths(argv, "fit", "TABLE")
    config = load_settings(FitConfig, argv, f"{PROG} fit TABLE")
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
    console.print(f"Next: {PROG} predict {config.output} TABLE", soft_wrap=True)


def _note_few_groups(known: TrainingTable, coverage: float, console: Console) -> None:
    """Rows of one group err together: the correction for finite samples would have to count groups."""
    if known.groups is not None and (num := len(np.unique(known.groups))) < 1 / (1 - coverage) - 1:
        console.print(
            f"Note: {num} groups are few for --coverage {coverage:g}: intervals may hold less than that of new ones",
            soft_wrap=True,
        )


def predict(argv: list[str], console: Console) -> None:
    (path, table_path), argv = _take_paths(argv, "predict", "PREDICTOR", "TABLE")
    config = load_settings(PredictConfig, argv, f"{PROG} predict PREDICTOR TABLE")
    predictor, table = load_predictor(path), read_table(table_path)
    for note in predictor.notes:
        console.print(f"Note: {note}", soft_wrap=True)
    found = predictor.predict(table, config.coverage, str(table_path))
    target = predictor.card["target"]
    measured = numbers_of(table, [target], str(table_path))[target] if target in table else None
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


def explain(argv: list[str], console: Console) -> None:
    (path,), argv = _take_paths(argv, "explain", "PREDICTOR")
    load_settings(ExplainConfig, argv, f"{PROG} explain PREDICTOR")
    print_card(load_predictor(path).card, console, num_features=None)


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


def _take_paths(argv: list[str], command: str, *names: str) -> tuple[list[Path], list[str]]:
    """The files a command is about stand before its options."""
    if argv[:1] in (["-h"], ["--help"]):
        return [Path()] * len(names), argv
    paths = argv[: len(names)]
    if len(paths) < len(names) or any(word.startswith("-") for word in paths):
        raise UserError(f"name the files first: {PROG} {command} {' '.join(names)} [options]")
    if far := [word for word in paths if "://" in word]:
        raise UserError(f"{far[0]}: only what lies on this machine is read here: copy it first")
    return [Path(word) for word in paths], argv[len(names) :]


COMMANDS: dict[str, Callable[[list[str], Console], None]] = {"fit": fit, "predict": predict, "explain": explain}


def main(argv: list[str]) -> int:
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"{argv[0]}: no such command; there are {', '.join(COMMANDS)} (see --help)")
    COMMANDS[argv[0]](argv[1:], make_console())
    return 0
