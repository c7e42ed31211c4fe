"""Any bit that is not what was written is found, or says nothing."""

from __future__ import annotations

import json
import math

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from raylora.errors import DamagedError
from raylora.records import digest
from raylora.storage.digests import (
    check_parquet,
    damaged_files,
    file_digest,
    file_digests,
    is_readable,
    is_whole,
    missing_files,
    open_parquet,
    seal,
    unseal,
    write_parquet,
)
from tests.helpers.damages import CONTENT

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(max_size=8).filter(lambda key: key != "digest"), VALUES, max_size=5)


def is_utf8(value: object) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


@given(OBJECTS.filter(is_utf8))
@settings(max_examples=30, deadline=None)
def test_what_is_sealed_is_read_as_it_was(value):
    assert unseal(seal(value).encode()) == value


@given(OBJECTS.filter(is_utf8), st.data())
@settings(max_examples=80, deadline=None)
def test_a_flipped_bit_of_json_is_found_or_says_nothing(value, data):
    """In the key ``digest`` itself it makes a value more; all others are what they were."""
    whole = bytearray(seal(value).encode())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    found = unseal(bytes(whole))
    assert found is None or {k: v for k, v in found.items() if k in value} == value


def test_what_json_has_not_is_sealed_as_it_is_read():
    assert unseal(seal({"loss": math.nan, "shape": (1, 2), "by": {1: math.inf}}).encode()) == {
        "loss": None,
        "shape": [1, 2],
        "by": {"1": None},
    }


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000, b'{"a": 1, "digest": 7}'])
def test_what_is_no_sealed_object_is_none(data):
    assert unseal(data) is None


def test_an_older_version_s_json_has_no_digest():
    assert unseal(b'{"origin": {}}') == {"origin": {}}


@pytest.fixture(scope="module")
def sealed(tmp_path_factory):
    path = tmp_path_factory.mktemp("parquet") / "scores.parquet"
    table = pd.DataFrame({"question": ["Why?", "raylora-sha256:" + "0" * 64], "ids": [[1, 2], [3]], "p": [0.5, 0.25]})
    write_parquet(table, path)
    return path, table


def test_any_reader_reads_a_sealed_parquet_file(sealed):
    path, table = sealed
    for found in (pd.read_parquet(path), pd.read_parquet(open_parquet(path)), pq.read_table(path).to_pandas()):
        assert found["question"].tolist() == table["question"].tolist()
        assert [list(ids) for ids in found["ids"]] == table["ids"].tolist()
    assert pq.read_metadata(path).metadata[b"raylora_digest"] == b"SHA-256"
    check_parquet(path.read_bytes()[:8])  # no Parquet: whoever reads it will say so
    path.with_name("cut.parquet").write_bytes(path.read_bytes()[:-9] + path.read_bytes()[-8:])
    with pytest.raises(DamagedError):
        open_parquet(path.with_name("cut.parquet"))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_of_parquet_is_found(sealed, data):
    whole = bytearray(sealed[0].read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert not is_whole("scores.parquet", bytes(whole))


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_a_block_of_zeros_in_parquet_is_found(sealed, data):
    whole = sealed[0].read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    end = data.draw(st.integers(start + 1, len(whole)))
    zeroed = whole[:start] + bytes(end - start) + whole[end:]
    assert zeroed == whole or not is_whole("scores.parquet", zeroed)


def test_equal_tables_are_equal_files(sealed, tmp_path):
    path, table = sealed
    write_parquet(table, tmp_path / "again.parquet")
    assert (tmp_path / "again.parquet").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", [name for name in CONTENT if name not in {"flip_bit", "change_digit", "not_utf8"}])
def test_what_an_older_version_wrote_is_read_if_it_can_be(tmp_path, damage):
    """Its digits may have changed; what is cut off, torn or empty is found."""
    files = {
        "marker.json": json.dumps({"values": {"loss": 1.5}, "more": ["x"] * 50}).encode(),
        "adapter_model.safetensors": save({"a.lora_A": np.ones((8, 64), np.float32)}),
    }
    pd.DataFrame({"a": range(1000), "b": [str(i) for i in range(1000)]}).to_parquet(tmp_path / "old.parquet")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "old.parquet"]:
        path = tmp_path / name
        assert is_readable(path)
        CONTENT[damage](path)
        if damage == "zeros" and name.endswith(".safetensors"):
            continue  # zeros among the weights are weights
        assert not is_readable(path), name


def test_files_beside_a_marker(tmp_path):
    names = ["a.csv", "b.json", "c.parquet"]
    (tmp_path / "a.csv").write_text("step,loss\n")
    (tmp_path / "b.json").write_text(seal({"x": 1}))
    digests = file_digests(tmp_path, names)
    assert sorted(digests) == names[:2]
    assert missing_files(tmp_path, names) == ["c.parquet"]
    assert damaged_files(tmp_path, names, digests) == []
    assert damaged_files(tmp_path, names, None) == []
    (tmp_path / "a.csv").write_text("step,lost\n")
    assert damaged_files(tmp_path, names, digests) == ["a.csv"]
    assert damaged_files(tmp_path, names, "no digests") == []
    assert digest({"x": 1}) in (tmp_path / "b.json").read_text()


def test_a_digest_is_of_what_is_there_now(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"one")
    first = file_digest(path)
    path.write_bytes(b"others")
    assert file_digest(path) != first


@pytest.mark.parametrize(("name", "data"), [("a.csv", b""), ("a.csv", bytes(9)), ("a.csv", b"\xff"), ("a.x", b"")])
def test_what_is_empty_is_not_whole(name, data):
    assert not is_whole(name, data)
