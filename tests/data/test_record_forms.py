"""The table of forms: each is read from a file of its own, and what it was before, it still is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raylora.data.datasets import read_dataset
from raylora.data.parse_record import is_record, parse_record
from raylora.data.record_forms import FORMS, MEANINGFUL_KEYS, Shape, find_form
from raylora.records import digest
from tests.helpers.formats import FORMATS, write_data

OLDER = FORMATS | {
    "with input": lambda q, a: {"instruction": "Add", "input": "1 and 2", "output": "3", "id": 7, "text": "Add: 1"},
    "with context and system": lambda q, a: {
        "question": "Who?", "answer": "Owls", "context": "Owls hoot.", "system": "Be brief."
    },
    "pairs with a context": lambda q, a: {
        "context_text": "Cats purr.",
        "qa_pairs": [{"question": "Who?", "output": "Cats"}, {"question": "What?", "output": "Purr."}],
    },
    "context in the question": lambda q, a: FORMATS["messages"]("Context: Dogs bark.\n\nQuestion: Who barks?", "Dogs"),
    "several turns": lambda q, a: {
        "conversations": [
            {"from": who, "value": text}
            for who, text in [
                ("system", "S"), ("human", "Q1"), ("gpt", " A1\n"), ("human", "Q2"), ("gpt", "A2"), ("human", "bye")
            ]
        ]
    },
}  # fmt: skip
PINNED = {
    "messages": "4b9c2b34d3305020",
    "sharegpt": "4b9c2b34d3305020",
    "conversations": "4b9c2b34d3305020",
    "parts": "4b9c2b34d3305020",
    "input/output": "4b9c2b34d3305020",
    "alpaca": "4b9c2b34d3305020",
    "dolly": "4b9c2b34d3305020",
    "question/answer": "4b9c2b34d3305020",
    "prompt/completion": "4b9c2b34d3305020",
    "prompt/response": "4b9c2b34d3305020",
    "final": "4b9c2b34d3305020",
    "with input": "be12353e4ab68995",
    "with context and system": "e655766d0728d815",
    "pairs with a context": "d4e00f73db4f8742",
    "context in the question": "254e328975265870",
    "several turns": "86eb13d9182cccf7",
}


@pytest.mark.parametrize("name", OLDER)
def test_older_forms_give_the_examples_that_they_always_gave(name):
    """Pinned: another value would make every earlier result another one."""
    found = parse_record(OLDER[name]("What is 2 and 3?", "It is 5."))
    assert not found.errors
    values = [[e.digest, e.question, e.context, e.conversation, e.num_repeated] for e in found.examples]
    assert digest(values, 16) == PINNED[name]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_each_form_is_read_from_a_file_of_its_own(tmp_path, form):
    dataset = read_dataset(write_data(tmp_path, [form.example]))
    (example,) = dataset.examples
    assert (dataset.num_bad_records, dataset.record_form) == (0, form.name)
    if form.shape == Shape.TEXT:
        assert (example.messages, example.answer) == ((), form.example["text"])
    else:
        assert (example.asked.split("Question: ")[-1], example.answer) == ("2+2?", "4")
    unused = set(form.example) - {*form.keys, *form.used}
    assert dataset.ignored_keys == ", ".join(sorted(unused)), "what is not used is said"


def test_no_form_hides_another():
    for number, form in enumerate(FORMS):
        assert find_form(form.keys) is form, number
        assert is_record(form.keys) == (form.shape != Shape.TEXT)


# Any record gives examples, or a reason

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\ud800", "user"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
NAMES = sorted({*MEANINGFUL_KEYS, *(key for form in FORMS for key in form.keys), "role", "content", "from", "value"})
NAMES += ["weight", "train", "tool_calls", "function_call", "name", "type", "text", "train_detail", "user", "assistant"]
SPEAKERS = ["user", "human", "assistant", "gpt", "system", "developer", "tool", "function_call", "narrator", None]
TURN_KEYS = [name for name in NAMES if name not in {"role", "from"}]
TURN = st.builds(
    lambda who, content, rest: who | content | rest,
    st.dictionaries(st.sampled_from(["role", "from"]), st.sampled_from(SPEAKERS), min_size=1),
    st.dictionaries(st.sampled_from(["content", "value", "text"]), st.text(max_size=5) | JSON, min_size=1),
    st.dictionaries(st.sampled_from(TURN_KEYS), JSON, max_size=2),
)
RECORDS = JSON | st.lists(TURN, max_size=6) | st.dictionaries(st.sampled_from(NAMES), JSON | st.lists(TURN, max_size=6))


def check(record):
    found = parse_record(record)
    assert found.examples or found.errors
    for error in found.errors:
        assert str(error)
        assert "\n" not in str(error)
        assert len(str(error)) < 700
    for example in found.examples:
        assert len(example.digest) == 64
        assert example.answer.strip()
        assert all(ord(c) not in range(0xD800, 0xE000) for m in example.messages for c in m.content + m.extra)
        assert not example.messages or example.asked.strip()
    assert all(isinstance(key, str) for key in found.ignored_keys)


@settings(max_examples=250, deadline=None)
@given(RECORDS)
def test_any_value_gives_examples_or_a_reason(record):
    check(record)


def parts_of(value):
    """All objects and lists within a value, itself included."""
    found, stack = [], [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict | list):
            found.append(item)
            stack.extend(item.values() if isinstance(item, dict) else item)
    return found


def copied(value):
    if isinstance(value, dict):
        return {key: copied(inner) for key, inner in value.items()}
    return [copied(inner) for inner in value] if isinstance(value, list) else value


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(FORMS), st.integers(0, 2**32), st.lists(JSON, min_size=5, max_size=5))
def test_mutated_records_give_examples_or_a_reason(form, seed, values):
    rng = random.Random(seed)
    record = copied(form.example)
    for value in values[: rng.randint(1, 5)]:
        part = rng.choice(parts_of(record))
        if isinstance(part, dict):
            part[rng.choice([*part, *NAMES])] = value
        else:
            part.insert(rng.randint(0, len(part)), value)
        if part and rng.random() < 0.3:
            part.pop(rng.choice(list(part)) if isinstance(part, dict) else 0)
    check(record)


def test_values_that_only_python_has_are_a_reason():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in (10**5000, {1, 2}, b"bytes", deep, float("inf"), 3j):
        for form in FORMS:
            for key in (*form.keys, "tools", "history", "system", 5):
                check(copied(form.example) | {key: value})
        check(
            {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A", "tool_calls": value}]}
        )
        check({"messages": [{"role": value, "content": "Q"}, {"role": "tool", "content": value}]})
