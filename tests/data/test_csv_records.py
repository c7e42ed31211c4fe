"""Tables of text as people and their programs write them."""

from __future__ import annotations

import pytest

from raylora.data.datasets import read_dataset
from raylora.errors import UserError


def read(tmp_path, text, name="data.csv", **options):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_dataset(tmp_path / name, **options)


def test_quoted_line_breaks_empty_cells_and_bad_lines(tmp_path):
    text = '\ufeffquestion,input,answer\r\n"Q1, ""x""\nmore",,007\r\n\r\nQ2,I\r\nQ3,I,\n"Q4" x,,A\nQ5,I,A\n'
    dataset = read(tmp_path, text)
    assert [(e.question, e.answer) for e in dataset.examples] == [('Q1, "x"\nmore', "007"), ("Q5", "A")]
    assert dataset.examples[1].messages[-1].content == "Q5\n\nI"
    assert [bad.place for bad in dataset.bad_records] == ["line 5", "line 6", "line 7"]
    assert "has 2 cells, the first line has 3" in dataset.bad_records[0].reason
    assert "its keys are question, input;" in dataset.bad_records[1].reason
    assert "a quote within quotes is written twice" in dataset.bad_records[2].reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: empty"),
        ("question,answer\n", "none of its 0 records"),
        ("What is 2+2?,4\n", "line 1: none of its records is valid: its columns are What is 2+2?, 4; known are"),
        ("question,answer,answer\nQ,A,B\n", "line 1: two columns are named answer"),
        ("question,answer\rQ,A\r", "line 1: a carriage return alone ends a line"),
        (b"question,answer\nQ\xe9,A\n", "line 2, column 2: not UTF-8"),
        ("question,answer\nQ,A\n\"Q2,A\nQ3,A\n", "line 3: a quote in it is never closed; close it, or --salvage"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_file_is_one_line(tmp_path, text, expected):
    with pytest.raises(UserError) as raised:
        read(tmp_path, text)
    assert str(raised.value).startswith(str(tmp_path / "data.csv"))
    assert expected in str(raised.value)


def test_salvage_keeps_the_rows_before_a_quote_that_is_never_closed(tmp_path):
    saved = read(tmp_path, 'question,answer\nQ,A\n"Q2,A\n' + "Q3,A\n" * 100, salvage=True)
    assert (len(saved.examples), saved.num_lost_records) == (1, -1)


@pytest.mark.parametrize("name", ["data.csv", "data.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_first_line_says_what_separates_cells(tmp_path, name, delimiter):
    text = f"question{delimiter}answer\nQ{delimiter}A\n"
    if delimiter == "|":
        text = "sep=|\n" + text
    assert len(read(tmp_path, text, name).examples) == 1


def test_conversations_in_cells_are_json(tmp_path):
    cell = '"[{""role"": ""user"", ""content"": ""Q""}, {""role"": ""assistant"", ""content"": ""A""}]"'
    assert read(tmp_path, f"messages,id\n{cell},1\n").examples[0].answer == "A"
