"""Files read piece by piece say what the whole text says, also of their mistakes."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raylora.data import json_window
from raylora.data.columns import ColumnNames
from raylora.data.dataset_files import open_records
from raylora.data.datasets import read_dataset
from raylora.errors import UserError
from tests.helpers.formats import conversation


def read(path, salvage=False):
    stream = open_records(path, ColumnNames(), salvage)
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
        patched.setattr(json_window, "PIECE", piece)
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
    monkeypatch.setattr(json_window, "PIECE", 2)
    path = tmp_path / "data.json"
    path.write_text("\n" + text)
    with pytest.raises(json.JSONDecodeError) as raised:
        json.loads("\n" + text)
    found = str(read(path)[0])
    assert f"line {raised.value.lineno}, column {raised.value.colno}: " in found
    assert raised.value.msg in found or "breaks off" in found


HUGE = '{"question": "Q", "answer": "A", "id": ' + "9" * 5000 + "}"
GOOD = '{"question": "Q2", "answer": "A"}'


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize(
    "content",
    [f"{HUGE}\n{GOOD}\n", f"{GOOD}\n{HUGE}\n", f"[{HUGE}, {GOOD}]", f'{{"n": {"9" * 5000}, "rows": [{GOOD}, {HUGE}]}}'],
)
def test_an_integer_that_python_cannot_read_costs_its_record_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    dataset = read_dataset(tmp_path / name)
    assert [e.question for e in dataset.examples] == ["Q2"]
    assert ["4300 digits" in bad.reason for bad in dataset.bad_records] == [True]


def test_a_line_nested_too_deeply_costs_itself_alone(tmp_path):
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    for lines in ([GOOD, deep], [deep, GOOD]):
        (tmp_path / "data.jsonl").write_text("\n".join(lines))
        assert [bad.reason for bad in read_dataset(tmp_path / "data.jsonl").bad_records] == ["nested too deeply"]


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
@pytest.mark.parametrize("before", ["", "\ufeff", "\n\n"])
def test_lines_may_be_lists_of_turns(tmp_path, name, before):
    lines = [json.dumps(conversation([f"Q{i}", "A"])["messages"]) for i in range(3)]
    (tmp_path / name).write_text(before + "\n".join([*lines, "[{", ""]), encoding="utf-8")
    dataset = read_dataset(tmp_path / name)
    assert [e.question for e in dataset.examples] == ["Q0", "Q1", "Q2"]
    assert (dataset.num_bad_records, dataset.record_form) == (1, "list of turns")
    (tmp_path / name).write_text(f"[{', '.join(lines)}]\n")
    assert read_dataset(tmp_path / name).examples == dataset.examples
    (tmp_path / name).write_text(f"[{GOOD}]\n]")
    assert len(read_dataset(tmp_path / name, salvage=True).examples) == 1, "a list of records is no line"
