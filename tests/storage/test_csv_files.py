"""A spreadsheet runs nothing of a table, and raylora reads what it wrote."""

from __future__ import annotations

import csv
import io

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.planning.plan import read_order
from raylora.records import ResultRow
from raylora.rows import load_results, read_table
from raylora.storage.csv_files import guarded, read_csv, unguarded, write_csv
from raylora.storage.store import Store

FORMULAS = ["=1+1", "+x", "-x", "@sum", "\tx", "\rx", "-5", "='"]
HEADS = st.sampled_from(["", "'", "''", "=", "'=", "''=", "+", "-", "@", "\t", "\r", "'\t"])
TEXTS = st.builds(
    str.__add__, HEADS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
)


@given(TEXTS)
def test_a_cell_comes_back_as_it_was(text):
    assert unguarded(guarded(text)) == text
    assert guarded(text)[:1] not in {"=", "+", "-", "@", "\t", "\r"}


@given(st.lists(TEXTS.filter(lambda text: "\r" not in text[1:]), min_size=1, max_size=5))
def test_a_file_comes_back_as_it_was(texts):
    out = io.StringIO()
    write_csv(pd.DataFrame({"name": texts, "number": [-1.5] * len(texts)}), out)
    again = read_csv(io.StringIO(out.getvalue()), dtype={"name": "string"}, keep_default_na=False)
    assert again["name"].tolist() == texts
    assert (again["number"] == -1.5).all()


def test_numbers_are_numbers_and_names_of_columns_are_guarded(tmp_path):
    table = pd.DataFrame({"=a": ["=1", None], "n": [-1, 2], "x": [-0.5, None], "cat": pd.Categorical(["-a", "b"])})
    write_csv(table, tmp_path / "t.csv")
    rows = list(csv.reader((tmp_path / "t.csv").open(newline="")))
    assert rows == [["'=a", "n", "x", "cat"], ["'=1", "-1", "-0.5", "'-a"], ["", "2", "", "b"]]
    again = read_csv(tmp_path / "t.csv")
    assert list(again) == ["=a", "n", "x", "cat"]
    assert again["cat"].tolist() == ["-a", "b"]


def test_an_index_is_guarded_too(tmp_path):
    table = pd.DataFrame({"@x": [1.0]}, index=pd.Index(["=a"], name="dataset"))
    write_csv(table, tmp_path / "t.csv", index=True)
    assert (tmp_path / "t.csv").read_text() == "dataset,'@x\n'=a,1.0\n"


def test_other_peoples_apostrophes_stay():
    assert [unguarded(text) for text in ("'tis", "''", "it's", "'")] == ["'tis", "''", "it's", "'"]


@pytest.mark.parametrize("name", FORMULAS)
def test_a_runs_tables(tmp_path, name):
    row = ResultRow({"dataset": name, "experiment_id": "x-1", "status": "ok", "error": "=cmd", "model": "+m", "n": -1})
    Store(tmp_path).write_tables([row], ["dataset", "experiment_id", "status", "error", "model", "n"])
    cells = list(csv.reader((tmp_path / "results.csv").open(newline="")))[1]
    assert cells == [f"'{name}", "x-1", "ok", "'=cmd", "'+m", "-1"]
    assert pd.read_parquet(tmp_path / "results.parquet")["dataset"].tolist() == [name]
    for read in (read_table, load_results):
        values = read(tmp_path / "results.csv").iloc[0]
        assert [values["dataset"], values["error"], values["model"], values["n"]] == [name, "=cmd", "+m", -1]
    assert read_order(tmp_path / "results.csv") == {name: 0, "x-1": 0}
