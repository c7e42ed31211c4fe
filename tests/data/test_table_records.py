"""Parquet and Arrow: nested columns, types that JSON does not have, damage, and small files of much."""

from __future__ import annotations

import datetime
import decimal
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raylora.data.datasets import read_dataset, survey
from raylora.errors import UserError
from tests.helpers.dataset_files import arrow_file, arrow_stream, parquet

PAIR = {"question": "Q", "answer": "A"}


def refused(path, **options):
    with pytest.raises(UserError) as raised:
        read_dataset(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_nested_columns_with_nulls_in_them(tmp_path):
    turns = [
        {"role": "user", "content": "Q", "tool_calls": None, "weight": None},
        {"role": "assistant", "content": "A", "tool_calls": None, "weight": 0.0},
        {"role": "user", "content": "R", "tool_calls": None, "weight": None},
        {"role": "assistant", "content": "B", "tool_calls": None, "weight": 1.0},
    ]
    records = [{"messages": turns, "source": "web"}, {"messages": None, "source": None}]
    for name, data in (("a.parquet", parquet(records)), ("a.arrow", arrow_stream(records))):
        (tmp_path / name).write_bytes(data)
        dataset = read_dataset(tmp_path / name)
        assert [e.answer for e in dataset.examples] == ["B"]
        assert [bad.place for bad in dataset.bad_records] == ["row 2"]
        assert dataset.ignored_keys == "source"


def test_values_that_json_does_not_have(tmp_path):
    odd = {
        "date": datetime.date(2020, 1, 2),
        "when": datetime.datetime(2020, 1, 2, 3),
        "price": decimal.Decimal("1.50"),
        "image": {"bytes": b"\xff", "path": None},
        "answer": decimal.Decimal("2.5"),
    }
    (tmp_path / "a.parquet").write_bytes(parquet([{"question": "Q", **odd}]))
    dataset = read_dataset(tmp_path / "a.parquet")
    assert dataset.examples[0].answer == "2.5"
    assert dataset.ignored_keys == "date, image, price, when"


def test_a_value_that_is_no_utf8_costs_its_row(tmp_path):
    answers = pa.array([b"A", b"\xff", b"C"]).view(pa.string())
    for name in ("a.parquet", "a.arrow"):
        write(tmp_path / name, pa.table({"question": ["Q1", "Q2", "Q3"], "answer": answers}))
        dataset = read_dataset(tmp_path / name)
        assert [e.question for e in dataset.examples] == ["Q1", "Q3"]
        assert [(bad.place, bad.reason) for bad in dataset.bad_records] == [("row 2", "not UTF-8")]


def test_columns_that_are_none_of_a_record_are_one_line_with_the_fix(tmp_path):
    (tmp_path / "a.parquet").write_bytes(parquet([{"q": "Q", "a": "A"}]))
    line = refused(tmp_path / "a.parquet")
    assert "its columns are q, a; known are messages" in line
    assert "--columns question=NAME,answer=NAME" in line
    assert len(read_dataset(tmp_path / "a.parquet", columns={"question": "q", "answer": "a"}).examples) == 1


def test_a_damaged_row_group_is_one_line_and_salvage_keeps_those_before_it(tmp_path):
    records = [{"question": f"Q{i}", "answer": f"A{i}" * 20} for i in range(90)]
    path = tmp_path / "a.parquet"
    path.write_bytes(parquet(records, row_group_size=30, use_dictionary=False))
    column = pq.ParquetFile(path).metadata.row_group(2).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    assert "after row 60: no Parquet file, or a damaged one: " in refused(path)
    assert "or --salvage the 60 rows before it" in refused(path)
    saved = read_dataset(path, salvage=True)
    assert (len(saved.examples), saved.num_lost_records) == (60, 30)


@pytest.mark.parametrize("make", [arrow_file, arrow_stream])
def test_an_arrow_file_that_breaks_off(tmp_path, make):
    records = [{"question": f"Q{i}", "answer": f"A{i}"} for i in range(10)]
    data = make(records)
    (tmp_path / "a.arrow").write_bytes(data[: len(data) * 6 // 10])
    line = refused(tmp_path / "a.arrow")
    assert "a damaged one: it breaks off; get the file again, or --salvage the " in line
    saved = read_dataset(tmp_path / "a.arrow", salvage=True)
    assert 0 < len(saved.examples) < 10
    assert f"--salvage the {len(saved.examples)} rows" in line
    assert saved.num_lost_records == -1
    (tmp_path / "a.feather").write_bytes(b"FEA1" + bytes(100))
    assert "Feather of version 1" in refused(tmp_path / "a.feather")


def repeated(value: str, number: int) -> pa.DictionaryArray:
    """A value that stands once in a file, and in each of many rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(number, np.int32)), pa.array([value]))


def write(path, table, **options):
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30, **options)
    else:
        with pa.ipc.new_file(str(path), table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_value_that_each_row_repeats_is_not_there_many_times(tmp_path, name):
    table = pa.table({"question": [f"Q{i}" for i in range(2000)], "answer": repeated("x" * 1_000_000, 2000)})
    write(tmp_path / name, table)
    assert (tmp_path / name).stat().st_size < 50_000
    before = pa.default_memory_pool().max_memory()
    tracemalloc.start()
    assert survey(tmp_path / name).num_examples == 2000
    assert tracemalloc.get_traced_memory()[1] < 400e6, "of 2 GB"
    tracemalloc.stop()
    assert pa.default_memory_pool().max_memory() - before < 400e6


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_row_that_repeats_a_value_too_often_is_a_bad_record(tmp_path, name):
    turns = pa.StructArray.from_arrays([repeated("user", 2002), repeated("x" * 1_000_000, 2002)], ["role", "content"])
    write(
        tmp_path / name, pa.table({"messages": pa.ListArray.from_arrays(pa.array([0, 2000, 2002], pa.int32()), turns)})
    )
    assert "the first: row 1: takes 2.0 GB, out of" in refused(tmp_path / name)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_a_value_far_larger_than_its_file_is_one_line_before_it_is_read(tmp_path, name):
    write(tmp_path / name, pa.table({"question": ["Q"], "answer": ["y" * 100_000_000]}))
    before = pa.default_memory_pool().bytes_allocated()
    assert "takes 100.0 MB, out of" in refused(tmp_path / name)
    assert pa.default_memory_pool().bytes_allocated() - before < 1e6


def test_nulls_that_take_no_room_in_a_file(tmp_path):
    number = 20_000_000
    nulls = pa.ListArray.from_arrays(pa.array([0, number], pa.int32()), pa.nulls(number, pa.int8()))
    write(tmp_path / "a.parquet", pa.table({"question": ["Q"], "answer": ["A"], "x": nulls}))
    assert "has 20,000,000 values, out of" in refused(tmp_path / "a.parquet")
