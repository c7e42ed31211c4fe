"""Every kind of file gives the records that are in it, and a folder of shards those of all of them."""

from __future__ import annotations

import gzip
import hashlib
import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.dataset_files import list_dataset_files, name_and_ending
from raylora.data.datasets import read_dataset, survey
from raylora.errors import UserError
from raylora.storage.places import location
from tests.helpers.dataset_files import KINDS, json_lines, json_list, parquet
from tests.helpers.objects import BUCKET

RECORDS = [{"question": f'Q{i},\n"{i}"; é', "answer": f"A{i}\t"} for i in range(5)]
PAIRS = [(r["question"], r["answer"]) for r in RECORDS]


def pairs_of(path, **options):
    return [(e.question, e.answer) for e in read_dataset(path, **options).examples]


def refused(path, **options):
    with pytest.raises(UserError) as raised:
        read_dataset(path, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_each_kind_is_read(tmp_path, name):
    (tmp_path / name).write_bytes(data := KINDS[name](RECORDS))
    dataset = read_dataset(tmp_path / name)
    assert [(e.question, e.answer) for e in dataset.examples] == PAIRS
    assert (dataset.num_items, dataset.num_bad_records, dataset.record_form) == (5, 0, "question/answer")
    assert dataset.data_hash == survey(tmp_path / name).data_hash == hashlib.sha256(data).hexdigest()
    assert pairs_of(tmp_path / name, limit=2) == PAIRS[:2]
    assert list_dataset_files(tmp_path) == [tmp_path / name]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(list(KINDS)),
    texts=st.lists(
        st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip), min_size=2, max_size=6
    ),
)
def test_any_text_comes_out_of_any_kind_as_it_went_in(tmp_path, name, texts):
    records = [{"question": text, "answer": text[::-1]} for text in texts]
    (tmp_path / name).write_bytes(KINDS[name](records))
    assert pairs_of(tmp_path / name) == [(r["question"], r["answer"]) for r in records]


@pytest.mark.parametrize("name", KINDS)
def test_a_file_cut_anywhere_is_whole_or_one_line_and_salvage_keeps_what_is_before(tmp_path, name):
    data = KINDS[name](RECORDS)
    for end in range(0, len(data), max(1, len(data) // 40)):
        (tmp_path / name).write_bytes(data[:end])
        found = survey(tmp_path / name)
        assert found.data_hash == hashlib.sha256(data[:end]).hexdigest()
        assert "\n" not in found.error
        assert found.error.startswith(str(tmp_path / name)) or not found.error
        try:
            saved = pairs_of(tmp_path / name, salvage=True)
        except UserError:
            continue
        assert saved[:-1] == PAIRS[: len(saved) - 1]


def test_a_folder_of_shards_is_one_dataset_in_natural_order(tmp_path):
    folder = tmp_path / "chunk_1" / "alpaca"
    for number, records in ((10, RECORDS[3:]), (2, [*RECORDS[:2], {"question": "Q", "answer": None}])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        (folder / "data" / f"train-{number}-of-10.parquet").write_bytes(parquet(records))
    for other in ("README.md", "dataset_info.json", ".cache.json", "data/test-0.parquet"):
        (folder / other).write_bytes(b"no parquet")
    dataset = read_dataset(folder)
    assert [e.question for e in dataset.examples] == [q for q, _ in [*PAIRS[:2], *PAIRS[3:]]]
    assert [bad.place for bad in dataset.bad_records] == ["data/train-2-of-10.parquet, row 3"]
    assert list_dataset_files(tmp_path / "chunk_1") == [folder]
    before = dataset.data_hash
    (folder / "data" / "train-10-of-10.parquet").rename(folder / "data" / "train-1-of-10.parquet")
    assert survey(folder).data_hash != before, "the shards' names and order are part of it"
    (folder / "data" / "train-1-of-10.parquet").write_bytes(b"PAR1 torn")
    assert "train-1-of-10.parquet: no Parquet file" in refused(folder)
    assert survey(folder).data_hash not in {"", before}


def test_a_folder_of_two_kinds_or_of_none_is_one_line(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    assert "no dataset file in this directory (*.json, " in refused(folder)
    (folder / "a.json").write_bytes(json_list(RECORDS))
    (folder / "a.parquet").write_bytes(parquet(RECORDS))
    assert "a.json and a.parquet" in refused(folder)
    (folder / "a.parquet").unlink()
    (folder / "b.json").write_text("[{")
    assert "b.json: line 1, column 3: the file breaks off here" in refused(folder)


def test_pipes_are_refused_whatever_they_are_called(tmp_path):
    for name in ("a.json", "a.csv", "a.parquet", "a.arrow", "a.json.gz"):
        os.mkfifo(tmp_path / name)
        assert "a pipe or a device" in survey(tmp_path / name).error
    assert len(list_dataset_files(tmp_path)) == 5


def test_a_dataset_is_called_after_its_file_without_the_whole_ending(tmp_path):
    (tmp_path / "v1.0").mkdir()
    names = {
        "a.json": ("a", ".json"),
        "a.JSONL.gz": ("a", ".JSONL.gz"),
        "a.b.csv": ("a.b", ".csv"),
        "v1.0": ("v1.0", ""),
    }
    names |= {".json": (".json", ""), "odd.txt": ("odd", ".txt")}
    assert {name: name_and_ending(tmp_path / name) for name in names} == names


def test_compressed_data_is_unpacked_as_far_as_it_goes(tmp_path):
    lines = [{"question": f"{i} {i * 7919 % 10007}", "answer": "A"} for i in range(3000)]
    whole = gzip.compress(json_lines(lines))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    line = refused(tmp_path / "a.jsonl.gz")
    assert "its gzip data breaks off; get the file again, or --salvage the records before it" in line
    saved = read_dataset(tmp_path / "a.jsonl.gz", salvage=True)
    assert saved.num_lost_records == -1
    assert saved.num_bad_records == 0
    assert 1000 < len(saved.examples) < 2000
    assert f"line {len(saved.examples) + 1}: " in line
    (tmp_path / "a.jsonl.gz").write_bytes(whole[:-8] + bytes(8))
    assert "its gzip data is damaged" in refused(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(b'{"question": "Q", "answer": "A"}')
    assert "line 1: its gzip data is damaged" in refused(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.jsonl.gz").write_bytes(whole + whole)
    assert len(read_dataset(tmp_path / "a.jsonl.gz").examples) == 6000, "two files one behind the other are one"


def test_what_swells_beyond_measure_is_one_line(tmp_path):
    for name, begin, end in (("a.jsonl.gz", b'{"question": "Q", "answer": "', b'"}'), ("a.json.gz", b'["', b'"]')):
        with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
            file.write(begin)
            for _ in range(140):
                file.write(b"y" * 1_000_000)
            file.write(end)
        assert "line 1: one value of more than" in refused(tmp_path / name)


def test_every_kind_is_read_from_s3(objects, tmp_path):
    for name, make in KINDS.items():
        objects.put(f"kinds/chunk_1/{name}", make(RECORDS))
    objects.put("kinds/chunk_1/folder/train-0.parquet", parquet(RECORDS))
    files = list_dataset_files(location(f"s3://{BUCKET}/kinds/chunk_1"))
    assert [p.name for p in files] == sorted([*KINDS, "folder"])
    assert all(pairs_of(path) == PAIRS for path in files)


def test_records_as_pandas_writes_them(tmp_path):
    by_row = {key: {str(i): r[key] for i, r in enumerate(RECORDS)} for key in ("question", "answer")}
    (tmp_path / "a.json").write_text(json.dumps(by_row))
    assert pairs_of(tmp_path / "a.json") == PAIRS
