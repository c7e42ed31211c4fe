"""Every format, and every kind of bad record."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data.datasets import read_dataset
from tests.helpers.formats import FORMATS, TEXT, conversation, write_data


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("lines", [False, True])
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4), bom=st.booleans())
def test_every_format_comes_back_as_it_was(tmp_path, form, lines, pairs, bom):
    records = [FORMATS[form](q, a) for q, a in pairs]
    text = "\n".join(json.dumps(r) for r in records) if lines else json.dumps(records)
    path = tmp_path / ("data.jsonl" if lines else "data.json")
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")
    dataset = read_dataset(path)
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
    dataset = read_dataset(write_data(tmp_path, records))
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
    examples = read_dataset(write_data(tmp_path, [record])).examples
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
    dataset = read_dataset(path)
    assert (len(dataset.examples), dataset.num_items, dataset.num_bad_records) == (2, 2 + len(bad), len(bad))
    for number, (expected, found) in enumerate(zip(bad, dataset.bad_records, strict=True), 2):
        assert found.place == f"record {number}"
        assert expected in found.reason


def test_a_bad_pair_costs_only_itself(tmp_path):
    record = {"context_text": "c", "qa_pairs": [{"question": "Q", "output": "A"}, {"question": "Q"}]}
    dataset = read_dataset(write_data(tmp_path, [record]))
    assert len(dataset.examples) == 1
    assert dataset.bad_records[0].place == "record 1, qa_pairs[2]"


@pytest.mark.parametrize("text", ["\n" * 500_000 + "x", "Context:" + " " * 500_000, "Context: a\n\n" * 50_000])
def test_long_questions_take_no_longer_than_they_are(tmp_path, text):
    started = time.thread_time()
    read_dataset(write_data(tmp_path, [FORMATS["messages"](text, "A")]))
    assert time.thread_time() - started < 20  # quadratic: minutes


def test_examples_of_a_conversation_know_it_and_what_earlier_ones_hold(tmp_path):
    contents = ["Q1", "A1", "Q2", "A2", "Q3", "A3", "bye"]
    other = [*contents[:4], "Q4", "A4"]
    records = [conversation(contents), conversation(other), conversation(contents), conversation(["Q1", "A1"])]
    records += [FORMATS["question/answer"]("Q1", "A1")]
    examples = read_dataset(write_data(tmp_path, records)).examples
    assert [e.num_repeated for e in examples] == [0, 2, 4, 0, 2, 4, 0, 2, 4, 0, 0]
    identities = [e.conversation for e in examples]
    assert len(set(identities[:3])) == len(set(identities[3:6])) == 1
    assert identities[:3] == identities[6:9] != identities[3:6]
    assert identities[9:] == ["", ""], "a record of one answer is a conversation of its own"
    assert examples[9].digest == examples[10].digest != examples[0].digest
    assert examples[0].digest == examples[6].digest != examples[3].digest, "two that begin alike are not the same"
