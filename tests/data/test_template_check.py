"""A file whose records the chat template refuses, or cuts: what is left of it, and how it is said."""

from __future__ import annotations

import copy
import json

import pytest

from raylora.data.datasets import places_of, read_dataset
from raylora.data.rendered import TemplateCounts, count_in_template
from raylora.data.template_check import held_to_template, hold_to_counts
from raylora.errors import ErrorKind, UserError
from tests.helpers.templates import TEMPLATES
from tests.helpers.tiny import CHAT_TEMPLATE

NO_RED = "{% for m in messages %}{% if 'red' in m['content'] %}{{ raise_exception('no red') }}{% endif %}{% endfor %}"


@pytest.fixture
def picky(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = NO_RED + CHAT_TEMPLATE
    return own


def held(tokenizer, path):
    dataset, counts = read_dataset(path), TemplateCounts()
    count_in_template(tokenizer, dataset.examples, counts)
    return hold_to_counts(dataset, counts, path)


def test_a_refused_record_is_a_bad_one_with_its_place(picky, tmp_path, on_disk):
    turns = [{"role": role, "content": text} for text in ("Hello", "red") for role in ("user", "assistant")]
    records = [
        {"question": "blue?", "answer": "Yes."},
        {"foo": 1},
        {"messages": [{"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "Blue."}, *turns]},
        {"question": "red?", "answer": "No."},
        {"messages": [*turns[2:], *turns[2:]]},
        {"question": "green?", "answer": "Yes."},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    dataset = held(picky, path)
    assert [(e.asked, e.answer) for e in dataset.examples] == [
        ("blue?", "Yes."), ("A colour?", "Blue."), ("Hello", "Hello"), ("green?", "Yes."),
    ]  # fmt: skip
    assert dataset.num_bad_records == 4
    assert [bad.place for bad in dataset.bad_records] == ["line 2", "line 3", "line 4", "line 5"]
    assert all(bad.reason.endswith("no red; fix or remove it") for bad in dataset.bad_records[1:])
    assert dataset.num_answers_cut == 0
    assert [e.digest for e in held_to_template(picky, read_dataset(path)).examples] == [
        e.digest for e in dataset.examples
    ]
    assert held_to_template(picky, read_dataset(path)).bad_records[-1].place == "example 7"


def test_places_are_those_of_the_file(tmp_path):
    path = tmp_path / "data.json"
    pairs = [{"question": "c", "output": "d"}, {"question": "e", "output": "f"}]
    path.write_text(json.dumps([{"question": "a", "answer": "b"}, {}, {"qa_pairs": pairs}]))
    assert places_of(path, {0, 2}) == {0: "record 1", 2: "record 3"}


def test_a_file_of_which_all_is_refused_is_one_line(picky, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": "red?", "answer": "No."}] * 3))
    with pytest.raises(
        UserError, match=r"data\.json: none of its 3 examples can be used; the first: record 1: .*no red"
    ) as raised:
        held(picky, path)
    assert raised.value.kind is ErrorKind.CHAT_TEMPLATE
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("num_cut", "is_refused"), [(0, False), (1, False), (2, False), (3, True), (4, True)])
def test_a_file_of_which_most_answers_are_cut_is_refused(tokenizer, tmp_path, num_cut, is_refused):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATES["reasoning"]
    answers = ["Plain."] * (4 - num_cut) + ["<think>So</think>Plain."] * num_cut
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"question": f"What is {i}?", "answer": a} for i, a in enumerate(answers)]))
    if not is_refused:
        dataset = held(own, path)
        assert dataset.num_answers_cut == num_cut
        assert (f"a part of the answer of {num_cut} of 4 examples" in dataset.template_note) is (num_cut > 0)
        return
    with pytest.raises(
        UserError, match=rf"{num_cut} of 4 answers \(the first: record {5 - num_cut}\).*: remove that"
    ) as raised:
        held(own, path)
    assert raised.value.kind is ErrorKind.CHAT_TEMPLATE
