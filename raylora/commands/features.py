"""Features of every dataset of a folder, without training an adapter or asking MMLU.

    python -m raylora.features --data_folder D --model_path M --output_csv F --sample_size 100 --probe_steps 20
    python -m raylora.features --describe

It is the batch command with one stage: the same workers, store and rows, and the same command goes on where it was.
Dashes and underscores are the same in every option's name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from rich.console import Console

from raylora.config import Config, Method
from raylora.config_sources import load_settings
from raylora.console import clock, make_console
from raylora.data.datasets import list_dataset_files
from raylora.errors import StoppedError, UserError
from raylora.features.columns import RUN_COLUMNS, describe_columns
from raylora.planning.plan import find_files, make_plan
from raylora.planning.show_plan import print_plan
from raylora.records import ResultRow
from raylora.rows import FEATURE_COLUMNS, FeatureColumn
from raylora.run.execute import how_to_go_on, run_plan
from raylora.storage.places import Location, reading, writing
from raylora.storage.tables import CsvTable

HYPERPARAMETER_COLUMNS = tuple(
    FeatureColumn(name, "hyperparameters", "", -math.inf, math.inf, str(option.description))
    for name, option in Method.model_fields.items()
)
DESCRIBED = (*RUN_COLUMNS[:3], *FEATURE_COLUMNS, *HYPERPARAMETER_COLUMNS, *RUN_COLUMNS[3:])
CSV_COLUMNS = [column.name for column in DESCRIBED]
RENAMED = {"--model-path": "--model", "--data-dir": "--data-folder"}


class FeaturesConfig(Config):
    """Measure the features of every dataset of a folder."""

    output: Location = Field(
        Path("results/features"), description="folder for rows, logs and what a rerun goes on with"
    )
    data_folder: Location | None = Field(None, description="folder of dataset files (or name a --chunk)")
    single_dataset: Location | None = Field(None, description="one dataset file in place of a folder")
    output_csv: Path | None = Field(None, description="CSV file that grows with every dataset")
    describe: bool = Field(False, description="print every column with its definition, unit and range, and stop")


def find_datasets(config: FeaturesConfig) -> tuple[str, list[Path]]:
    """A name for the run, and its dataset files.

    Raises:
        UserError: nothing is named, or what is named is not there.
    """
    if config.single_dataset is not None:
        return "single", [config.single_dataset]
    if config.data_folder is None:
        return find_files(config)
    with reading(config.data_folder):
        if not config.data_folder.is_dir():
            raise UserError(f"--data-folder {config.data_folder}: no such folder")
        return config.data_folder.resolve().name, list_dataset_files(config.data_folder)[: config.limit]


def print_summary(rows: Sequence[ResultRow], console: Console) -> None:
    """Seconds of each dataset, what could not be measured, and the sum."""
    seconds = [row.values.get("features_seconds") or 0.0 for row in rows]
    for row, taken in zip(rows, seconds, strict=True):
        v = row.values
        text = f"{v['dataset']}: {clock(taken)}" if row.ok else f"FAILED {v['dataset']}: {v['error']}"
        notes = f" ({v['feature_notes']})" if row.ok and v.get("feature_notes") else ""
        console.print(text + notes, soft_wrap=True)
    good = sum(row.ok for row in rows)
    each = f", {clock(sum(seconds) / good)} each" if good else ""
    console.print(f"{good} of {len(rows)} datasets measured in {clock(sum(seconds))}{each}.")


def _check_place(path: Path | None) -> None:
    """Whether a table can be written there, before there is one.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        return
    with writing("--output-csv", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output-csv {path}: {'is a folder' if path.is_dir() else 'cannot be written to'}")


def main(argv: list[str]) -> int:
    console = make_console()
    words = [word.partition("=") for word in argv]
    names = [word.replace("_", "-") if word.startswith("--") else word for word, _, _ in words]
    argv = [RENAMED.get(name, name) + mark + value for name, (_, mark, value) in zip(names, words, strict=True)]
    config = load_settings(FeaturesConfig, argv, "python -m raylora.features")
    config = config.model_copy(update={"stages": ("features",)})
    if config.describe:
        print(describe_columns(DESCRIBED))
        return 0
    name, files = find_datasets(config)
    plan = make_plan(config, files, name)
    if config.dry_run:
        print_plan(plan, console)
        return 0
    _check_place(config.output_csv)

    table = CsvTable("--output-csv", config.output_csv.absolute(), CSV_COLUMNS) if config.output_csv else None
    try:
        rows = run_plan(plan, console, table)
    except (KeyboardInterrupt, StoppedError) as stop:
        console.print(f"{stop or 'Stopped.'} {how_to_go_on(config)}")
        return 130 if isinstance(stop, KeyboardInterrupt) else 1
    print_summary(rows, console)
    console.print(f"Files: {config.output_csv or plan.store.place}", soft_wrap=True)
    return 0 if all(row.ok for row in rows) else 1
