"""Features of every dataset of a folder, without training an adapter or asking MMLU.

    python -m raylora.features --data_folder D --model_path M --output_csv F --sample_size 100 --probe_steps 20
    python -m raylora.features --describe

It is the batch command with one stage: the same workers, store and rows. Run again, it resumes where it stopped.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from raylora.commands.options import FeaturesConfig
from raylora.config.method import Method
from raylora.console import clock, make_console, print_notes
from raylora.data.datasets import list_dataset_files
from raylora.errors import UserError
from raylora.features.columns import RUN_COLUMNS, describe_columns
from raylora.planning.plan import find_files, make_plan
from raylora.planning.show_plan import print_plan
from raylora.records import ResultRow
from raylora.rows import FEATURE_COLUMNS, FeatureColumn
from raylora.run.execute import run_plan
from raylora.storage.hub_names import DatasetPlace, HubDataset
from raylora.storage.places import reading, writing
from raylora.storage.tables import CsvTable

HYPERPARAMETER_COLUMNS = tuple(
    FeatureColumn(name, "hyperparameters", "", -math.inf, math.inf, str(option.description))
    for name, option in Method.model_fields.items()
)
DESCRIBED = (*RUN_COLUMNS[:3], *FEATURE_COLUMNS, *HYPERPARAMETER_COLUMNS, *RUN_COLUMNS[3:])
CSV_COLUMNS = [column.name for column in DESCRIBED]


def find_datasets(config: FeaturesConfig) -> tuple[str, list[DatasetPlace]]:
    """A name for the run, and its dataset files.

    Raises:
        UserError: no folder, file or chunk is named, or it does not exist.
    """
    if isinstance(config.data_folder, HubDataset):
        return "single", [config.data_folder]
    if config.single_dataset is not None:
        return "single", [config.single_dataset]
    if config.data_folder is None:
        return find_files(config)
    with reading(config.data_folder):
        if not config.data_folder.is_dir():
            raise UserError(f"--data-folder {config.data_folder}: no such folder")
        files = [*list_dataset_files(config.data_folder), *config.dataset]
        return config.data_folder.resolve().name, files[: config.limit]


def print_summary(rows: Sequence[ResultRow], console: Console) -> None:
    """Print each dataset's time and what could not be measured, then how many were measured and their time."""
    all_seconds = [row.values.get("features_seconds") or 0.0 for row in rows]
    for row, seconds in zip(rows, all_seconds, strict=True):
        v = row.values
        text = f"{v['dataset']}: {clock(seconds)}" if row.ok else f"FAILED {v['dataset']}: {v['error']}"
        notes = f" ({v['feature_notes']})" if row.ok and v.get("feature_notes") else ""
        console.print(text + notes, soft_wrap=True)
    num_good, total = sum(row.ok for row in rows), sum(all_seconds)
    each = f", {clock(total / num_good)} each" if num_good else ""
    console.print(f"{num_good} of {len(rows)} datasets measured in {clock(total)}{each}.")


def _check_writable(path: Path | None) -> None:
    """Check that ``--output-csv`` can be written, before anything is measured.

    Raises:
        UserError: it cannot.
    """
    if path is None:
        return
    with writing("--output-csv", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"--output-csv {path}: {'is a folder' if path.is_dir() else 'cannot be written to'}")


def run(config: FeaturesConfig) -> int:
    console = make_console()
    config = config.model_copy(update={"stages": ("features",)})
    if config.describe:
        print(describe_columns(DESCRIBED))
        return 0
    name, files = find_datasets(config)
    plan = make_plan(config, files, name)
    print_notes(console, plan.notes)
    if config.dry_run:
        print_plan(plan, console)
        return 0
    _check_writable(config.output_csv)

    table = CsvTable("--output-csv", config.output_csv.absolute(), CSV_COLUMNS) if config.output_csv else None
    rows = run_plan(plan, console, table)
    print_summary(rows, console)
    console.print(f"Files: {config.output_csv or plan.store.place}", soft_wrap=True)
    return 0 if all(row.ok for row in rows) else 1
