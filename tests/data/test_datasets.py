"""Every format, every kind of damage, and files nobody thought of."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.datasets import find_chunk, list_chunks, list_dataset_files, load_dataset, sample_examples
from raylora.errors import UserError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(lambda s: s.strip())
FORMATS = {
    "messages": lambda q, a: {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
    "sharegpt": lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]},
    "conversations": lambda q, a: {"conversations": [{"role": "user", "content": q}, {"role": "model", "content": a}]},
    "parts": lambda q, a: {
        "messages": [{"role": "user", "content": [{"type": "text", "text": q}]}, {"role": "assistant", "content": a}]
    },
    "input/output": lambda q, a: {"input": q, "output": a},
    "alpaca": lambda q, a: {"instruction": q, "input": "", "output": a},
    "dolly": lambda q, a: {"instruction": q, "context": "", "response": a, "category": "open_qa"},
    "question/answer": lambda q, a: {"question": q, "answer": a},
    "prompt/completion": lambda q, a: {"prompt": q, "completion": a},
    "prompt/response": lambda q, a: {"prompt": q, "response": a},
    "final": lambda q, a: {"context_text": "", "qa_pairs": [{"question": q, "output": a}]},
}


def write(folder: Path, value: object, name: str = "data.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def error_of(path: Path, **options: object) -> str:
    with pytest.raises(UserError) as raised:
        load_dataset(path, **options)  # type: ignore[arg-type]
    text = str(raised.value)
    assert "\n" not in text
    assert path.name in text
    return text


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lines", [False, True])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), bom=st.booleans())
def test_every_format_comes_back_as_it_was(tmp_path, form, lines, pairs, bom):
    records = [FORMATS[form](q, a) for q, a in pairs]
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    dataset = load_dataset(path)
    assert [(e.messages[-1].content, e.answer) for e in dataset.examples] == pairs
    assert (dataset.num_items, dataset.num_bad_records) == (len(pairs), 0)


def test_contexts_and_inputs_are_known_apart_from_the_question(tmp_path):
    records = [
        {"instruction": "Add", "input": "1 and 2", "output": "3"},
        {"context_text": "Cats purr.", "qa_pairs": [{"question": "Who?", "output": "Cats"}]},
        FORMATS["messages"]("背景: 猫会叫。\n\n问题: 谁会叫?", "猫"),
        FORMATS["messages"]("Context: Dogs bark.\n\nQuestion: Who barks?", "Dogs"),
        FORMATS["messages"]("Sort these\n\n输入: 3, 1, 2", "1, 2, 3"),
        {"question": "Who?", "answer": "Owls", "context": "Owls hoot.", "system": "Be brief."},
    ]
    dataset = load_dataset(write(tmp_path, records))
    assert [(e.context, e.question) for e in dataset.examples] == [
        ("1 and 2", "Add"),
        ("Cats purr.", "Who?"),
        ("猫会叫。", "谁会叫?"),
        ("Dogs bark.", "Who barks?"),
        ("3, 1, 2", "Sort these"),
        ("Owls hoot.", "Who?"),
    ]
    assert dataset.examples[0].messages[-1].content == "Add\n\n1 and 2"
    assert dataset.examples[1].messages[-1].content == "Context: Cats purr.\n\nQuestion: Who?"
    assert dataset.examples[5].messages[0].role == "system"


def test_several_turns_make_an_example_for_each_answer(tmp_path):
    turns = [("system", "S"), ("human", "Q1"), ("gpt", "A1"), ("human", "Q2"), ("gpt", "A2"), ("human", "bye")]
    record = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    examples = load_dataset(write(tmp_path, [record])).examples
    assert [e.answer for e in examples] == ["A1", "A2"]
    assert [m.content for m in examples[1].messages] == ["S", "Q1", "A1", "Q2"]


def test_bad_records_are_counted_with_place_and_reason(tmp_path):
    good = {"question": "Q", "answer": "A"}
    bad = {
        "an object": 7,
        "its keys are foo": {"foo": 1},
        "answer is empty": {"question": "Q", "answer": " "},
        "answer: expected text, found a number": {"question": "Q", "answer": 3},
        "question: expected text, found null": {"question": None, "answer": "A"},
        "half a character": {"question": "Q", "answer": "\ud800"},
        "role tool": {"messages": [{"role": "tool", "content": "x"}]},
        "no user turn": {"messages": [{"role": "assistant", "content": "x"}]},
        "there is no assistant turn": {"messages": [{"role": "user", "content": "x"}]},
        "its conversation is empty": {"messages": []},
        "no text": {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "qa_pairs is empty": {"context_text": "c", "qa_pairs": []},
    }
    path = tmp_path / "data.json"
    path.write_text(json.dumps([good, *bad.values(), good]))
    dataset = load_dataset(path)
    assert (len(dataset.examples), dataset.num_items, dataset.num_bad_records) == (2, 2 + len(bad), len(bad))
    for number, (expected, found) in enumerate(zip(bad, dataset.bad_records, strict=True), 2):
        assert found.place == f"record {number}"
        assert expected in found.reason


def test_a_bad_pair_costs_only_itself(tmp_path):
    record = {"context_text": "c", "qa_pairs": [{"question": "Q", "output": "A"}, {"question": "Q"}]}
    dataset = load_dataset(write(tmp_path, [record]))
    assert len(dataset.examples) == 1
    assert dataset.bad_records[0].place == "record 1, qa_pairs[2]"


def test_a_bad_line_costs_only_itself(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "Q", "answer": "A"}\n\n{"question": "Q", \n{"question": "Q2", "answer": "A"}\n')
    dataset = load_dataset(path)
    assert len(dataset.examples) == 2
    assert dataset.bad_records[0].place == "line 3"
    assert "column" in dataset.bad_records[0].reason


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "line 1: empty"),
        (b" \n\t", "line 1: empty"),
        (b"[]", "an empty list"),
        (b"3", "found a number"),
        (b'"text"', "found a string"),
        (b"null", "found null"),
        (b'{"a": 1}', "none of its 1 records is valid; the first: record 1: its keys are a"),
        (b'[{"foo": 1}]', "none of its 1 records"),
        (b"PK\x03\x04\x00\xff\xfe", "not UTF-8"),
        (b'[\n{"question": "\xff"}]', "line 2, column 15: not UTF-8"),
        (b"question,answer\nQ,A\n", "line 1, column 1: not JSON"),
        (b'[{"question": "Q", "answer": "A"}, {"question": "Q2"', "--salvage keeps the 1 complete records"),
        (b'[{"question": "Q", "answer": "A"},\n{"question": "Q2', "line 2, column 14: the file breaks off here"),
        (b"[" * 100_000, "nested too deeply"),
        (b'[{"question": "Q", "answer": ' + b"9" * 5000 + b"}]", "digits"),
    ],
)
def test_bad_files_are_one_line_with_file_and_place(tmp_path, content, expected):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    assert expected in error_of(path)


def test_unreadable_files_are_one_line(tmp_path):
    assert "No such file" in error_of(tmp_path / "missing.json")
    (tmp_path / "folder.json").mkdir()
    assert "directory" in error_of(tmp_path / "folder.json")
    loop = tmp_path / "loop.json"
    loop.symlink_to(loop)
    assert "cannot be read" in error_of(loop)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_without_permission_is_one_line(tmp_path):
    path = write(tmp_path, [])
    path.chmod(0)
    assert "Permission denied" in error_of(path)


def test_salvage_keeps_the_complete_leading_records(tmp_path):
    text = json.dumps([{"question": f"Q{i}", "answer": "A"} for i in range(5)])
    path = tmp_path / "cut.json"
    for length in range(len(text) - 1, 0, -7):
        path.write_text(text[:length])
        num_whole = text[:length].count("}")
        if num_whole == 0:
            error_of(path, salvage=True)
            continue
        dataset = load_dataset(path, salvage=True)
        assert len(dataset.examples) == num_whole
        assert dataset.num_lost_records == (0 if text[:length].rstrip(", ").endswith("}") else 1)
    path.write_text(text.replace('"Q3"', "Q3"))
    dataset = load_dataset(path, salvage=True)
    assert (len(dataset.examples), dataset.num_lost_records) == (3, -1)


@pytest.mark.parametrize("text", ["\n" * 500_000 + "x", "Context:" + " " * 500_000, "Context: a\n\n" * 50_000])
def test_long_questions_take_no_longer_than_they_are(tmp_path, text):
    started = time.perf_counter()
    load_dataset(write(tmp_path, [FORMATS["messages"](text, "A")]))
    assert time.perf_counter() - started < 5  # quadratic: minutes


def test_limit_looks_at_the_first_records_only(tmp_path):
    path = write(tmp_path, [{"question": f"Q{i}", "answer": "A"} for i in range(9)])
    dataset = load_dataset(path, limit=4)
    assert (dataset.num_items, len(dataset.examples)) == (4, 4)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_and_arbitrary_bytes_end_in_a_dataset_or_one_line(tmp_path, data):
    good = json.dumps([form("Qué?", "A\n") for form in FORMATS.values()]).encode()
    content = bytearray(data.draw(st.one_of(st.binary(max_size=200), st.just(good))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(content)))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path = tmp_path / data.draw(st.sampled_from(["fuzz.json", "fuzz.jsonl"]))
    path.write_bytes(bytes(content))
    try:
        dataset = load_dataset(path, salvage=data.draw(st.booleans()))
    except UserError as error:
        lines, named = [str(error)], path.name in str(error)
    else:
        lines, named = [bad.reason for bad in dataset.bad_records], bool(dataset.examples)
    assert named
    assert all("\n" not in line for line in lines)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=2, max_size=8), random=st.randoms())
def test_the_order_of_the_file_changes_neither_seed_nor_sample(tmp_path, pairs, random):
    one = load_dataset(write(tmp_path, [FORMATS["messages"](q, a) for q, a in pairs]))
    random.shuffle(pairs)
    two = load_dataset(write(tmp_path, [FORMATS["messages"](q, a) for q, a in pairs]))
    assert one.seed == two.seed
    for size in (0, 1, 3):
        drawn = [[e.digest for e in sample_examples(d.examples, size, d.seed)] for d in (one, two)]
        assert drawn[0] == drawn[1]
        assert len(drawn[0]) == (min(size, len(pairs)) or len(pairs))


def test_chunks_are_found_by_name_and_number_and_never_outside(tmp_path):
    for name in ("chunk_2", "chunk_10", "other"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    root = tmp_path / "root"
    assert [c.name for c in list_chunks(root)] == ["chunk_2", "chunk_10"]
    assert find_chunk(root, "chunk_10").name == "chunk_10"
    assert find_chunk(root, "2").name == "chunk_10"
    for name in ("../outside", str(tmp_path / "outside"), "chunk_3", "0", "3", "", ".", "..", "²"):
        with pytest.raises(UserError, match="1 chunk_2, 2 chunk_10"):
            find_chunk(root, name)
    with pytest.raises(UserError, match="no dataset"):
        list_dataset_files(root / "chunk_2")
    with pytest.raises(UserError, match="--data-root"):
        list_chunks(tmp_path / "nowhere")


def test_real_files_load_whole(shared_data):
    files = list_dataset_files(shared_data / "chunk_001")
    assert len(files) == 4
    datasets = [load_dataset(path) for path in files]
    assert all(2207 <= d.num_items <= 3000 and d.num_bad_records == 0 for d in datasets)
    assert all(sum(bool(e.context) for e in d.examples) > 50 for d in datasets)
