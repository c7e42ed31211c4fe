"""Tables read back with tidy types, whatever rows failed."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest

from raylora import load_results
from raylora.errors import UserError
from raylora.records import ResultRow
from raylora.rows import ROW_COLUMNS, read_table
from raylora.storage.store import Store


def write_run(folder, with_good: bool = True):
    """A run's tables, written as a run writes them: an error row, and good ones that lack what was not measured."""
    bad = dict.fromkeys(ROW_COLUMNS) | {"dataset": "broken", "experiment_id": "b", "status": "error", "error": "line 1"}
    bad["error_kind"] = "data"
    good = dict.fromkeys(ROW_COLUMNS) | {
        "dataset": "007", "experiment_id": "g", "status": "ok", "error": "", "overall_accuracy": 0.5, "lora_r": 8,
        "total_questions": 100, "num_epochs": 1.5, "batch_size": 4, "num_train_steps": 12, "model": "demo",
        "feature_notes": "io_similarity: none", "dataset_num_items": 30, "num_oom_backoffs": 0, "train_loss": 1.0,
    }  # fmt: skip
    rows = [ResultRow(bad), *([ResultRow(good), ResultRow(good | {"experiment_id": "h"})] if with_good else [])]
    Store(folder).root.mkdir(parents=True, exist_ok=True)
    Store(folder).write_tables(rows, ROW_COLUMNS)


def test_types_are_the_same_for_csv_and_parquet_and_know_null(tmp_path):
    write_run(tmp_path)
    table = load_results(tmp_path)
    for name in ("total_questions", "lora_r", "batch_size", "num_train_steps", "dataset_num_items", "num_oom_backoffs"):
        assert str(table[name].dtype) == "Int64", name
        assert table[name].isna().tolist() == [True, False, False]
    assert str(table["num_epochs"].dtype) == "float64"
    assert str(table["train_loss"].dtype) == "float64"
    assert str(table["io_similarity"].dtype) == "float64", "a feature that is null in every row is a number still"
    assert table["status"].dtype == "category"
    assert table["dataset"].tolist()[0] == "broken"
    assert table["error"].tolist() == ["line 1", "", ""]
    assert table["train_notes"].tolist() == ["", "", ""]
    assert table["error_kind"].dtype == "category"
    assert table["error_kind"].isna().tolist() == [False, True, True]
    assert table.groupby("status", observed=True)["overall_accuracy"].mean()["ok"] == 0.5
    csv, parquet = load_results(tmp_path / "results.csv"), load_results(tmp_path / "results.parquet")
    pd.testing.assert_frame_equal(parquet, table)
    assert csv.dtypes.astype(str).to_dict() == table.dtypes.astype(str).to_dict()
    assert csv["dataset"].tolist() == table["dataset"].tolist()


def test_a_run_in_which_everything_failed_has_the_same_types(tmp_path):
    write_run(tmp_path / "all")
    write_run(tmp_path / "none", with_good=False)
    good, bad = load_results(tmp_path / "all"), load_results(tmp_path / "none")
    assert good.dtypes.astype(str).to_dict() == bad.dtypes.astype(str).to_dict()


def test_flags_and_columns_of_others(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("dataset,is_good,comment,score\na,True,fine,1\nb,,,2.5\n")
    table = load_results(path)
    assert str(table["is_good"].dtype) == "boolean"
    assert table["is_good"].isna().tolist() == [False, True]
    assert str(table["comment"].dtype) == "string"
    assert str(table["score"].dtype) == "float64"


def test_names_that_look_like_numbers_stay_names(tmp_path):
    (tmp_path / "t.csv").write_text("dataset,score\n007,1\n010,2\n")
    assert load_results(tmp_path / "t.csv")["dataset"].tolist() == ["007", "010"]


def test_no_table_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no such table"):
        load_results(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no results.csv or results.parquet"):
        load_results(tmp_path)


def test_cells_beyond_the_header_shift_nothing(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("dataset,overall_accuracy\nfoo, bar,0.5\n")
    with pytest.raises(UserError, match="more cells than the header"):
        read_table(path)
    path.write_text("dataset,overall_accuracy\nnull,0.5\n007,0.6\n")
    assert read_table(path)["dataset"].tolist() == ["null", "007"]


@pytest.mark.parametrize("module", ["raylora.report.page", "raylora.predict.predictor", "raylora.rows"])
def test_who_reads_tables_waits_for_no_torch(module):
    heavy = {"torch", "transformers", "ray"}
    code = f"import sys, {module}, raylora\nraylora.load_results\nprint({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
