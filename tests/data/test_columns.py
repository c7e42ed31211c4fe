"""``--columns``: other names for keys, in every kind of file."""

from __future__ import annotations

import pytest

from raylora.config.run import load_config
from raylora.data.columns import check_columns
from raylora.data.datasets import read_dataset
from raylora.errors import UserError
from tests.helpers.dataset_files import KINDS

RECORDS = [{"q": f"Q{i}", "a": f"A{i}", "question": "a heading"} for i in range(3)]


@pytest.mark.parametrize("name", KINDS)
def test_names_are_mapped_before_forms_are_recognised(tmp_path, name):
    (tmp_path / name).write_bytes(KINDS[name](RECORDS))
    dataset = read_dataset(tmp_path / name, columns={"question": "q", "answer": "a"})
    assert [(e.question, e.answer) for e in dataset.examples] == [("Q0", "A0"), ("Q1", "A1"), ("Q2", "A2")]
    assert (dataset.record_form, dataset.ignored_keys) == ("question/answer", "question (its own)")


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("question=q,answer=a", {"question": "q", "answer": "a"}),
        ({"question": "q", "answer": "a"}, {"question": "q", "answer": "a"}),
        (["question=q"], {"question": "q"}),
        (
            "question = what, exactly,answer=x=y",
            {"question": "what, exactly", "answer": "x=y"},
        ),
        ("", {}),
    ],
)
def test_ways_to_write_them(given, names):
    assert load_config(columns=given).column_names == names


@pytest.mark.parametrize("given", ["question", "=q", "question=", "question=q,question=r", "question=q,answer=q"])
def test_what_is_no_mapping_is_one_line(given):
    with pytest.raises(UserError, match=r"^--columns: "):
        load_config(columns=given)


def test_a_key_that_no_form_knows_is_one_line():
    check_columns({"question": "q"})
    with pytest.raises(UserError, match=r"--columns frage=q: frage is no key of a record: messages, "):
        check_columns({"frage": "q"})
    with pytest.raises(UserError, match="the other way round"):
        check_columns({"q": "question"})
