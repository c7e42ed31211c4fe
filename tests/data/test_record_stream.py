"""A record that is longer than it may be is a bad one, in every kind of file, and costs no other."""

from __future__ import annotations

import gzip
import json

import pandas as pd
import pyarrow as pa
import pyarrow.feather as feather
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.data.datasets import read_dataset, survey
from raylora.data.json_window import Unreadable, Window
from raylora.errors import UserError
from raylora.mmlu import question_files
from raylora.mmlu.questions import load_questions

LONG = 'say "[{}]" \\ 猫\n' * 300
RECORDS = [{"question": "a", "answer": "b"}, {"question": "q", "answer": LONG}, {"question": "c", "answer": "d"}]


def write(path, name: str) -> None:
    texts = [json.dumps(r, ensure_ascii=i == 1) for i, r in enumerate(RECORDS)]
    if name.startswith("list"):
        text = f"[{', '.join(texts)}]"
    elif name.startswith("wrapped"):
        text = f'{{"note": "x", "data": [{", ".join(texts)}], "more": {json.dumps(LONG)}}}'
    elif name.startswith("columns"):
        text = json.dumps({key: [r[key] for r in RECORDS] for key in ("question", "answer")})
    elif name.startswith("objects"):
        text = "\n".join(json.dumps(r, indent=1) for r in RECORDS)
    elif name.endswith((".csv", ".tsv")):
        text = pd.DataFrame(RECORDS).to_csv(index=False, sep="\t" if name.endswith("tsv") else ",")
    elif name.endswith("parquet"):
        return pd.DataFrame(RECORDS).to_parquet(path)
    elif name.endswith("arrow"):
        return feather.write_feather(pa.Table.from_pylist(RECORDS), path)
    else:
        text = "\n".join(texts)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    return None


NAMES = [
    "list.json", "wrapped.json", "columns.json", "objects.json", "a.jsonl", "b.jsonl.gz", "list.json.gz", "a.csv",
    "a.tsv", "a.parquet", "a.arrow",
]  # fmt: skip


@pytest.mark.parametrize("piece", [64, 1 << 20])
@pytest.mark.parametrize("name", NAMES)
def test_the_others_are_read(tmp_path, monkeypatch, name, piece):
    monkeypatch.setattr("raylora.data.json_window.PIECE", piece)
    write(tmp_path / name, name)
    dataset = read_dataset(tmp_path / name, max_chars=1000)
    assert [e.answer for e in dataset.examples] == ["b", "d"]
    assert dataset.num_bad_records == 1
    (bad,) = dataset.bad_records
    assert bad.reason == "longer than 1,000 characters; cut it, or give a larger --max-record-chars"
    assert bad.place.split()[1] in {"2", "3"}
    assert len(read_dataset(tmp_path / name, max_chars=100_000).examples) == 3
    assert survey(tmp_path / name, max_chars=1000).num_examples == 2


def test_a_long_line_of_csv(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a","b"\n"' + "x" * 5000 + '\n""y"" z","w"\nplain,' + "y" * 5000 + "\nc,d\n")
    dataset = read_dataset(path, max_chars=1000)
    assert [e.answer for e in dataset.examples] == ["b", "d"]
    assert dataset.num_bad_records == 2


VALUES = st.recursive(
    st.text(max_size=30) | st.integers() | st.booleans(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=6), st.integers(5, 60), st.booleans(), st.sampled_from([7, 64]))
def test_values_are_found_behind_long_ones(tmp_path_factory, values, most, is_ascii, piece):
    path = tmp_path_factory.mktemp("window") / "a.json"
    texts = [json.dumps(value, ensure_ascii=is_ascii) for value in values]
    path.write_text(f"[{', '.join(texts)}]", encoding="utf-8", errors="surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raylora.data.json_window.PIECE", piece)
        with Window(path, most) as window:
            window.skip()
            found = list(window.array())
    assert [isinstance(f, Unreadable) for f in found] == [len(text) > most for text in texts]
    assert [f for f in found if not isinstance(f, Unreadable)] == [
        v for v, text in zip(values, texts, strict=True) if len(text) <= most
    ]


@pytest.mark.parametrize("name", ["q.json", "q.jsonl.gz", "q.parquet"])
def test_questions_are_no_books(tmp_path, monkeypatch, name):
    rows = [{"question": "x" * 900, "subject": "s", "choices": ["a", "b"], "answer": 0}] * 20
    if name.endswith("parquet"):
        pd.DataFrame(rows).to_parquet(tmp_path / name)
    else:
        text = json.dumps(rows) if name == "q.json" else "\n".join(map(json.dumps, rows))
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert len(load_questions(tmp_path / name)) == 20
    monkeypatch.setattr(question_files, "MOST_QUESTION_CHARS", 500)
    with pytest.raises(UserError, match="question 1: longer than 500 characters"):
        load_questions(tmp_path / name)
    monkeypatch.setattr(question_files, "MOST_QUESTION_CHARS", 10_000)
    monkeypatch.setattr(question_files, "MOST_CHARS", 9_000)
    with pytest.raises(UserError, match=r"too large to be read at once|more than 9,000 characters up to here"):
        load_questions(tmp_path / name)


def test_row_groups_that_each_stay_below_the_limit_swell_together(tmp_path, monkeypatch):
    monkeypatch.setattr("raylora.data.table_records.LARGEST_TOTAL", 1_000_000)
    rows = pa.table({"question": [f"{i}" + "a" * 100_000 for i in range(30)], "answer": ["b"] * 30})
    import pyarrow.parquet as pq

    pq.write_table(rows, tmp_path / "a.parquet", compression="zstd", row_group_size=1, use_dictionary=False)
    assert "unpacked it takes 3.0 MB" in survey(tmp_path / "a.parquet").error
    feather.write_feather(rows, tmp_path / "a.arrow", compression="zstd", chunksize=1)
    assert "unpacked it takes 3.0 MB" in survey(tmp_path / "a.arrow").error
