"""What is read of a file: regular files only, up to where they ended when they were opened."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from raylora.config.run import load_config
from raylora.data.byte_stream import ByteStream, hash_of, unpacked
from raylora.data.datasets import survey
from raylora.errors import UserError
from raylora.mmlu.questions import load_questions
from raylora.planning.plan import read_order
from raylora.rows import read_table

LINE = b'{"question": "a", "answer": "b"}\n'
READERS = {
    "a.json": survey, "a.jsonl.gz": survey, "a.csv": survey, "a.parquet": survey, "a.arrow": survey,
    "q.json": load_questions, "q.parquet": load_questions, "t.csv": read_table, "order.csv": read_order,
    "c.yaml": lambda path: load_config(["--config", str(path)]),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_pipe_or_a_device_is_one_line(tmp_path, name, kind):
    path = tmp_path / name
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    if READERS[name] is survey:
        assert "a pipe or a device" in survey(path).error
        return
    with pytest.raises(UserError, match="a pipe or a device"):
        READERS[name](path)


def test_a_pipe_among_shards(tmp_path):
    (tmp_path / "0.jsonl").write_bytes(LINE)
    os.mkfifo(tmp_path / "1.jsonl")
    assert "a pipe or a device" in survey(tmp_path).error


def test_a_pipe_in_place_of_env(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo(".env")
    with pytest.raises(UserError, match=r"^\.env: a pipe"):
        load_config([])


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_grows_ends_where_it_ended(tmp_path, packed):
    path = tmp_path / ("a.jsonl.gz" if packed else "a.jsonl")
    content = LINE * 100_000
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    before = hash_of(path)
    with ByteStream(path) as stream:
        found = stream.read(100)
        for _ in range(3):
            with path.open("ab") as file:
                file.write(gzip.compress(LINE * 1000) if packed else LINE * 1000)
        while data := stream.read(1 << 20):
            found += data
        assert found == content
        assert stream.hash == before


def test_what_is_too_large_to_be_read_at_once(tmp_path):
    path = tmp_path / "a.json.gz"
    path.write_bytes(gzip.compress(b" " * 5_000_000))
    assert len(unpacked(path, 5_000_000)) == 5_000_000
    with pytest.raises(UserError, match=r"more than 4\.0 MB: too large"):
        unpacked(path, 4_000_000)


def test_a_bomb_is_not_unpacked_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("raylora.data.byte_stream.LARGEST_TOTAL", 1_000_000)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINE * 200_000))
    found = survey(path)
    assert "unpack it first" in found.error
    assert found.data_hash == hash_of(Path(path))
