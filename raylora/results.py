"""Tables of finished runs, read back: ``results.csv``, ``results.parquet``, or the folder that holds them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import IO, Any

import pandas as pd

from raylora.config import Config, Method
from raylora.experiment import ROW_COLUMNS
from raylora.files import location, one_line, reading, reason
from raylora.records import UserError
from raylora.train import TrainingMetrics

COUNTS = frozenset(
    {
        *(name for name, field in (Config.model_fields | Method.model_fields).items() if field.annotation is int),
        *(name for name, field in TrainingMetrics.__dataclass_fields__.items() if field.type == "int"),
        *(name for name in ROW_COLUMNS if name.endswith(("_questions", "_count", "_unparsed", "_backoffs"))),
        *(name for name in ROW_COLUMNS if name.startswith("num_")),
        "dataset_num_items", "max_samples", "token_budget",
    } - {"num_epochs"}
)  # fmt: skip
CATEGORIES = frozenset(
    {"status", "model", "quantization", "prompt_style", "scoring", "target_modules", "lr_scheduler", "train_on"}
)
TEXTS = frozenset({"dataset", "experiment_id", "error", "data_hash", "bad_records", "feature_notes", "dataset_name"})


def load_results(place: str | Path) -> pd.DataFrame:
    """The table of a run, tidy: give its folder, such as ``results/chunk_001``, or a table's file.

    Counts are ``Int64`` and flags ``boolean`` (both know null), other numbers ``float64``, what repeats from row to row
    (status, model, ...) is ``category``, names and notes ``string``: the same for
    CSV and Parquet, whatever rows failed.

    Raises:
        UserError: there is no table, or none that can be read.
    """
    path = location(place)
    if not path.exists():
        raise UserError(f"{path}: no such table; give the folder of a run, such as results/chunk_001")
    table = read_table(path)
    return pd.DataFrame({str(name): tidy_column(str(name), table[name]) for name in table.columns}, index=table.index)


def read_csv(stream: IO[bytes] | Path) -> pd.DataFrame:
    """Names stay what they are: a dataset called 007 keeps its zeros, and one called null its name."""
    data = stream.read_bytes() if isinstance(stream, Path) else stream.read()
    options: dict[str, Any] = {"encoding": "utf-8-sig", "low_memory": False}
    table = pd.read_csv(io.BytesIO(data), **options)
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError("rows have more cells than the header; names that hold commas must be quoted")
    own = [name for name in table.columns if name in TEXTS]
    names = pd.read_csv(io.BytesIO(data), **options, usecols=own, dtype="string", keep_default_na=False)
    for name in own:
        table[name] = names[name].where(names[name] != "")
    return table


def _first_strange(file: Path) -> int:
    """Where a file's first byte stands that is no UTF-8: pandas counts from the last piece that it took."""
    try:
        file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start
    return 0


def tidy_column(name: str, column: pd.Series) -> pd.Series:
    """A column of a run's table with the type that ``load_results`` promises."""
    if name in CATEGORIES:
        return column.astype("string").astype("category")
    if name in TEXTS:
        return column.astype("string").fillna("")
    there = column.dropna()
    if len(there) and there.astype(str).isin(["True", "False"]).all():
        return column.map(lambda v: str(v) == "True", na_action="ignore").astype("boolean")
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() < len(there):  # words: a column of another raylora's
        return column.astype("string")
    numbers = numbers.astype("float64")
    return numbers.astype("Int64") if name in COUNTS and numbers.dropna().mod(1).eq(0).all() else numbers


def read_table(path: Path) -> pd.DataFrame:
    """A table from a CSV or Parquet file, or from the folder of a run.

    Raises:
        UserError: it is not there, cannot be read, or has no row.
    """
    file = path
    if path.is_dir():
        found = [path / name for name in ("results.parquet", "results.csv") if (path / name).is_file()]
        if not found:
            raise UserError(f"{path}: no results.csv or results.parquet here; give a table or the folder of a run")
        file = found[0]
    try:
        # Parquet is known by its first bytes: the ending of a user's file says little.
        with reading(file), file.open("rb") as stream:
            is_parquet = stream.read(4) == b"PAR1"
            stream.seek(0)
            table = pd.read_parquet(stream) if is_parquet else read_csv(stream)
    except OSError as error:
        raise UserError(f"{file}: {reason(error)}; give a table or the folder of a run") from None
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 at byte {_first_strange(file)}; save it as UTF-8 CSV or Parquet") from None
    except (ValueError, pd.errors.ParserError) as error:  # pyarrow's errors are ValueErrors
        raise UserError(f"{file}: no table can be read from it: {one_line(error)}") from None
    if table.empty:
        raise UserError(f"{file}: the table has no rows")
    return table
