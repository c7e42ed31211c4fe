"""Objects of columns, objects in a row, and which object is what."""

from __future__ import annotations

import json

import pytest

from raylora.data.datasets import read_dataset
from raylora.errors import UserError
from tests.helpers.formats import conversation

TURNS = conversation(["Q", "A"])["messages"]


def read(tmp_path, text, name="data.json", **options):
    (tmp_path / name).write_text(text if isinstance(text, str) else json.dumps(text), encoding="utf-8")
    return read_dataset(tmp_path / name, **options)


@pytest.mark.parametrize(
    ("value", "num_examples"),
    [
        ({"question": ["Q", "R"], "answer": ["A", "B"], "id": [1, 2]}, 2),
        ({"messages": [TURNS] * 3}, 3),
        ({"messages": TURNS}, 1),
        ({"prompt": [TURNS[:1]] * 2, "completion": [TURNS[1:]] * 2}, 2),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, 1),
        ({"text": ["T", "U"]}, 2),
        ({"text": [{"question": "Q", "answer": "A"}]}, 1),
        ({"chosen": TURNS, "rejected": TURNS}, 1),
        ({"answer": ["A", None, 3], "question": ["Q", "R", "S"]}, 2),
    ],
)
def test_which_object_is_a_table(tmp_path, value, num_examples):
    assert len(read(tmp_path, value).examples) == num_examples


def test_columns_of_different_lengths_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"data\.json: line 1: columns of different lengths \(question 1, answer 2\)"):
        read(tmp_path, {"question": ["Q"], "answer": ["A", "B"]})
    with pytest.raises(UserError, match="an empty list"):
        read(tmp_path, {"question": [], "answer": []})
    with pytest.raises(UserError, match="two columns of one name"):
        read(tmp_path, '{"question": ["Q"], "answer": ["A"], "question": ["R"]}')


def test_columns_longer_than_a_piece(tmp_path):
    many = [f"{i:0100d}" for i in range(30_000)]
    dataset = read(tmp_path, {"question": many, "answer": many[::-1]})
    assert [(e.question, e.answer) for e in dataset.examples] == list(zip(many, many[::-1], strict=True))


def test_an_integer_that_python_cannot_read_costs_its_row_of_columns(tmp_path):
    dataset = read(tmp_path, f'{{"question": ["Q", "R"], "answer": ["A", "B"], "n": [{"9" * 5000}, 1]}}')
    assert [e.question for e in dataset.examples] == ["R"]
    assert "4300 digits" in dataset.bad_records[0].reason


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("between", ["", " ", "\n", ",\n"])
@pytest.mark.parametrize("indent", [None, 2])
def test_objects_in_a_row(tmp_path, name, between, indent):
    records = [{"question": f"Q{i}", "answer": "A"} for i in range(3)]
    text = between.join(json.dumps(r, indent=indent) for r in records)
    assert [e.question for e in read(tmp_path, text, name).examples] == ["Q0", "Q1", "Q2"]


def test_of_objects_in_a_row_a_bad_one_costs_itself_and_one_that_breaks_off_is_salvaged(tmp_path):
    text = "\n".join(json.dumps({"question": f"Q{i}", "answer": "A"}, indent=2) for i in range(4))
    dataset = read(tmp_path, text.replace('"Q2",', '"Q2"'))
    assert [(bad.place, bad.reason) for bad in dataset.bad_records] == [
        ("record 3", "line 11, column 3: not JSON: Expecting ',' delimiter")
    ]
    assert len(dataset.examples) == 3
    with pytest.raises(UserError, match=r"line 15, column 13: the file breaks off here; --salvage keeps the 3"):
        read(tmp_path, text[:-4])
    saved = read(tmp_path, text[:-4], salvage=True)
    assert (len(saved.examples), saved.num_lost_records) == (3, 1)
