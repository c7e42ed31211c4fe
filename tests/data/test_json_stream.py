"""Large datasets: read piece by piece, kept on disk, and the same in everything as small ones."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora import records
from raylora.data import disk_list, encoding, examples, json_stream, parse_record
from raylora.data.datasets import load_dataset, sample_examples, survey
from raylora.data.encoding import StoredEncoded, encode_each, encode_example, labels_of, supervised_counts
from raylora.data.json_stream import RecordStream
from raylora.errors import ErrorKind, MachineError, UserError
from raylora.planning.plan import DEMO_FOLDER
from raylora.records import Example, Message, digest
from raylora.training.loop import train_adapter

PAIRS = [(f"What is {i} and {i % 7}?", f"It is {i + i % 7}, of course.") for i in range(40)]


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """From the first example on."""
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 0)
    monkeypatch.setattr(disk_list, "MEMORY_BYTES", 1)


def read(path, salvage=False):
    stream = RecordStream(path, parse_record.is_record, salvage)
    try:
        found = [(r.place, r.value, r.error) for r in stream]
    except UserError as error:
        found = str(error)
    return found, stream.num_lost, stream.hash


VALUES = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.integers(-(10**9), 10**9) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, min_size=1, max_size=5),
    form=st.sampled_from(["list", "wrapped", "lines"]),
    indent=st.sampled_from([None, 1]),
    piece=st.sampled_from([1, 2, 3, 7, 50]),
    cut=st.integers(0, 20),
    salvage=st.booleans(),
)
def test_the_size_of_the_pieces_changes_nothing(tmp_path, monkeypatch, values, form, indent, piece, cut, salvage):
    if form == "lines":
        values = [{"value": v} for v in values]
        text = "\n".join(json.dumps(v, ensure_ascii=False) for v in values)
    else:
        text = json.dumps({"version": 1, "data": values} if form == "wrapped" else values, indent=indent)
    path = tmp_path / "data.json"
    path.write_text(text[: len(text) - cut], encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(json_stream, "PIECE", piece)
        found = read(path, salvage)
    assert found == read(path, salvage)
    if not cut and not (form == "lines" and len(values) == 1):
        assert [value for _, value, _ in found[0]] == values


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2", '[{"a": tru', '[{"a" 1}]', "[1 2]", "[1]]", '["\\ux"]', '["a\nb"]', '{"a": [1, 2', '{"a": 1,\n "b" 2}',
        "7 8",
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_the_decoders_words_at_its_place(tmp_path, monkeypatch, text):
    monkeypatch.setattr(json_stream, "PIECE", 2)
    path = tmp_path / "data.json"
    path.write_text("\n" + text)
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("\n" + text)
    found = str(read(path)[0])
    assert f"line {raised.value.lineno}, column {raised.value.colno}: " in found
    assert raised.value.msg in found or "breaks off" in found


def test_the_hash_is_that_of_the_bytes_also_where_the_file_is_bad(tmp_path):
    import hashlib

    for content in (b'[{"question": "Q", "answer": "A"}]', b"[1, 2", b'{"a": 1}\n{"b": 2}', b"[\xff] and more", b""):
        path = tmp_path / "data.json"
        path.write_bytes(content)
        assert survey(path).data_hash == hashlib.sha256(content).hexdigest()
    assert survey(tmp_path / "missing.json").data_hash == ""


def test_a_survey_counts_what_loading_finds(tmp_path):
    for path in sorted((DEMO_FOLDER / "chunk_demo").iterdir()):
        dataset, found = load_dataset(path), survey(path)
        num_chars = sum(examples.count_chars(e) for e in dataset.examples)
        assert (found.num_examples, found.num_chars, found.error) == (len(dataset.examples), num_chars, "")


def test_seed_sample_and_order_are_what_they_have_always_been(tmp_path):
    """Pinned: another value would make every earlier result another one."""
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": q, "answer": a} for q, a in PAIRS]))
    dataset = load_dataset(path)
    assert dataset.seed == PINNED_SEED
    drawn = sample_examples(dataset.examples, 0, dataset.seed)
    assert [PAIRS.index((e.question, e.answer)) for e in drawn][:8] == PINNED_ORDER
    by_definition = sorted(dataset.examples, key=lambda e: digest([dataset.seed, e.digest]))
    assert list(drawn) == by_definition
    assert dataset.seed == int(digest(sorted(e.digest for e in dataset.examples), 15), 16)


PINNED_SEED = 113294225206190556
PINNED_ORDER = [21, 22, 12, 14, 23, 3, 39, 29]


def test_examples_on_disk_are_those_in_memory(tmp_path, on_disk, monkeypatch):
    content = [
        *({"question": q, "answer": a} for q, a in PAIRS),
        {"context_text": "Cats purr.", "qa_pairs": [{"question": "Who?", "output": "Cats \u2028 é 😀"}] * 2},
        {"messages": [{"role": r, "content": r} for r in ("system", "user", "assistant", "user", "assistant")]},
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(content))
    stored = load_dataset(path)
    assert not isinstance(stored.examples, tuple)
    assert list((tmp_path / "cache").iterdir()) == []  # the file has no name
    monkeypatch.setattr(examples, "MEMORY_CHARS", 10**9)
    kept = load_dataset(path)
    assert isinstance(kept.examples, tuple)
    assert tuple(stored.examples) == kept.examples
    assert stored.examples[-1] == kept.examples[-1]
    assert tuple(stored.examples[3:30:7]) == kept.examples[3:30:7]
    assert stored.seed == kept.seed
    for size in (0, 1, 7, 1000):
        assert list(sample_examples(stored.examples, size, 5)) == list(sample_examples(kept.examples, size, 5))
    with pytest.raises(IndexError):
        stored.examples[len(stored.examples)]


def test_examples_go_to_disk_where_they_are_too_many(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 40)
    few = [Example((Message("user", "q" * 9),), "a", "q" * 9)] * 4
    assert isinstance(examples.keep_examples(few), tuple)
    stored = examples.keep_examples([*few, *few])
    assert isinstance(stored, examples.StoredExamples)
    assert list(stored) == [*few, *few]


def test_equal_examples_stay_in_the_files_order():
    twins = [Example((Message("user", "q"),), "a", question) for question in ("one", "two", "three")]
    assert [e.question for e in sample_examples(twins, 0, 3)] == ["one", "two", "three"]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(min_size=32, max_size=32) | st.just(bytes(32)), min_size=1, max_size=9))
def test_rows_are_sorted_as_bytes_are(rows):
    order = examples.sorted_rows(np.frombuffer(b"".join(rows), dtype=np.uint8).reshape(-1, 32))
    assert order.tolist() == sorted(range(len(rows)), key=lambda i: rows[i])


def test_a_disk_without_room_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYLORA_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(examples, "MEMORY_CHARS", 0)
    with pytest.raises(MachineError, match="RAYLORA_CACHE") as raised:
        load_dataset(DEMO_FOLDER / "chunk_demo" / "clean_messages.json")
    assert raised.value.kind is ErrorKind.CACHE_FULL


@pytest.mark.parametrize("train_on", ["answer", "all"])
def test_packed_tokens_are_the_same(tokenizer, on_disk, monkeypatch, train_on):
    monkeypatch.setattr(encoding, "ENCODED_TOGETHER", 7)
    told = [Example((Message("user", q),), a, q) for q, a in PAIRS]
    plain = [encode_example(tokenizer, e, 20) for e in told]
    packed = StoredEncoded(encode_each(tokenizer, told, 20))
    assert list(packed) == plain
    assert packed[3:9:2] == plain[3:9:2]
    assert packed[-1] == plain[-1]
    assert list(packed.lengths) == [len(e) for e in plain]
    counts = [sum(t != encoding.IGNORE_INDEX for t in labels_of(e, train_on)) for e in plain]
    assert supervised_counts(packed, train_on) == supervised_counts(plain, train_on) == counts


def test_training_from_disk_is_training_from_memory(loaded, on_disk):
    from raylora.config import Method

    told = [Example((Message("user", q),), a, q) for q, a in PAIRS[:12]]
    method = Method(num_epochs=1, learning_rate=1e-3)
    curves = []
    for encoded in (
        [encode_example(loaded.tokenizer, e, 64) for e in told],
        StoredEncoded(encode_each(loaded.tokenizer, told, 64)),
    ):
        parameters = loaded.attach(method, 1)
        try:
            curves.append(train_adapter(loaded, parameters, encoded, method, 1).loss_curve())
        finally:
            loaded.detach()
    assert curves[0] == curves[1]


def test_digests_of_nothing_have_the_right_shape():
    assert records.digests_of([]).shape == (0, 32)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    """100,000 records against 20,000: as Python objects, 80,000 more take 400 MB; on disk they must not take 60."""
    from benchmarks.load import write_dataset

    script = """
import sys
from pathlib import Path
from raylora.datasets import load_dataset, sample_examples
from raylora.encoding import StoredEncoded, encode_each
from tests.helpers.tiny import make_tokenizer
dataset = load_dataset(Path(sys.argv[1]))
ordered = sample_examples(dataset.examples, 0, dataset.seed)
encoded = StoredEncoded(encode_each(make_tokenizer(), ordered, 1024))
assert len(encoded) == len(dataset.examples) == int(sys.argv[2])
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""
    peaks = []
    for num in (20_000, 100_000):
        path = write_dataset(tmp_path / f"{num}.json", num)
        command = [sys.executable, "-c", script, str(path), str(num)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 60
