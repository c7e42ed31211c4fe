"""Masks: ids in any kind of file, and MMLU-Redux's tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError
from raylora.mmlu.mask import find_masked
from raylora.records import Question
from tests.helpers.questions import make_questions, questions_of_many_sizes

QUESTIONS = [replace(q, question=f"{q.subject}: {q.question}") for q in make_questions()]
IDS = ["anatomy/0", "virology/2"]


def redux(questions: list[Question], wrong: set[str]) -> list[dict]:
    """As MMLU-Redux has them: no id, and texts whose white space may differ."""
    return [
        {
            "question": f" {q.question}\n", "choices": list(q.choices), "answer": q.answer, "source": None,
            "error_type": "wrong_groundtruth" if q.question_id in wrong else "ok", "correct_answer": None,
        }
        for q in questions
    ]  # fmt: skip


def write_arrow(path: Path, records: list[dict], stream: bool) -> None:
    table = pa.Table.from_pylist(records)
    make = pa.ipc.new_stream if stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as file, make(file, table.schema) as writer:
        writer.write_table(table)


def write_all(folder: Path) -> list[Path]:
    """The same mask in every form."""
    names = ["a.txt", "a.json", "objects.json", "a.jsonl", "a.csv", "a.parquet", "file.arrow", "stream.arrow"]
    names += ["redux.json", "redux.parquet"]
    paths = [folder / name for name in names]
    texts, listed, objects, lines, table, parquet, arrow, stream, tested, as_parquet = paths
    texts.write_text("\n".join(IDS) + "\n\n")
    listed.write_text(json.dumps(IDS))
    objects.write_text(json.dumps([{"question_id": i, "error_type": "bad_question_clarity"} for i in IDS]))
    lines.write_text("\n".join(json.dumps({"id": i}) for i in IDS))
    pd.DataFrame({"why": ["x", "y"], "question_id": IDS}).to_csv(table, index=False)
    pd.DataFrame({"question_id": IDS}).to_parquet(parquet)
    write_arrow(arrow, [{"question_id": i} for i in IDS], stream=False)
    write_arrow(stream, redux(QUESTIONS, {*IDS}), stream=True)
    tested.write_text(json.dumps(redux(QUESTIONS, {*IDS})))
    pq.write_table(pa.Table.from_pylist(redux(QUESTIONS, {*IDS})), as_parquet)
    return paths


def test_every_form_of_a_mask_leaves_the_same_questions_out(tmp_path):
    for path in write_all(tmp_path):
        assert sorted(find_masked(str(path), QUESTIONS)) == IDS, path


def test_a_folder_holds_a_mask_in_parts(tmp_path):
    for subject in ("anatomy", "virology"):
        (tmp_path / "redux" / subject).mkdir(parents=True)
        part = [q for q in QUESTIONS if q.subject == subject]
        write_arrow(tmp_path / "redux" / subject / "data-00000-of-00001.arrow", redux(part, {*IDS}), stream=True)
    assert find_masked(str(tmp_path / "redux"), QUESTIONS) == {*IDS}


def test_a_question_may_be_named_as_its_own_file_names_it(tmp_path):
    (tmp_path / "ids.txt").write_text("q3\nall/1\n")
    assert find_masked(str(tmp_path / "ids.txt"), questions_of_many_sizes()) == {"all/3", "all/1"}
    (tmp_path / "numbers.json").write_text("[7]")
    numbered = [replace(QUESTIONS[0], question_id=f"anatomy/{i}", own_id=str(6 + i)) for i in (0, 1)]
    assert find_masked(str(tmp_path / "numbers.json"), numbered) == {"anatomy/1"}


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '[{"question": "What?"}]', "entry 1: has neither question_id nor question, choices and error_type"),
        ("a.json", '["anatomy/0", null]', "entry 2: expected a question's id"),
        ("a.json", '["anatomy/99"]', "it lists 1 questions, and none of the set's 9"),
        ("a.csv", "why,what\nx,y\n", "entry 1: has neither question_id"),
        ("a.jsonl", '{"id": 1}\n{"id": \n', "a.jsonl: line 2: not JSON: "),
        ("a.parquet", "PAR1", "a.parquet: no Parquet file, "),
        ("a.arrow", "nothing", "a.arrow: no Arrow IPC file, "),
    ],
)
def test_what_is_no_mask_is_one_line(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as raised:
        find_masked(str(tmp_path / name), QUESTIONS)
    assert expected in str(raised.value)
    assert str(raised.value).startswith(f"--mask {tmp_path / name}: ")
    assert "\n" not in str(raised.value)


def test_no_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        find_masked(str(tmp_path / "none.txt"), QUESTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="file in it"):
        find_masked(str(tmp_path / "empty"), QUESTIONS)


@given(st.sets(st.sampled_from([q.question_id for q in QUESTIONS]), min_size=1, max_size=8))
def test_ids_and_texts_leave_out_the_same(tmp_path_factory, wrong):
    folder = tmp_path_factory.mktemp("mask")
    (folder / "ids.json").write_text(json.dumps(sorted(wrong)))
    (folder / "redux.json").write_text(json.dumps(redux(QUESTIONS, wrong)))
    by_id, by_text = (find_masked(str(folder / name), QUESTIONS) for name in ("ids.json", "redux.json"))
    assert by_id == by_text == wrong
