"""Files of questions: every format, every mistake, and samples of them."""

from __future__ import annotations

import csv
import json
from collections import Counter

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError
from raylora.mmlu.questions import SUBJECT_GROUPS, load_dev_questions, load_questions, select_questions
from raylora.records import Question
from tests.helpers.questions import SUBJECTS, as_dicts, make_questions


def test_every_format_reads_the_same(tmp_path):
    questions = make_questions()
    records = as_dicts(questions)
    letters = [{**r, "answer": "ABCD"[r["answer"]]} for r in records]
    (tmp_path / "list.json").write_text(json.dumps(records))
    (tmp_path / "bom.json").write_text(json.dumps(letters), encoding="utf-8-sig")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, records)))
    pd.DataFrame(records).to_parquet(tmp_path / "hub.parquet")
    (tmp_path / "csv" / "test").mkdir(parents=True)
    for subject in SUBJECTS:
        with (tmp_path / "csv" / "test" / f"{subject}_test.csv").open("w", newline="") as file:
            for r in letters:
                if r["subject"] == subject:
                    csv.writer(file).writerow([r["question"], *r["choices"], r["answer"]])
    for name in ("list.json", "bom.json", "lines.jsonl", "hub.parquet", "csv"):
        assert load_questions(tmp_path / name) == questions, name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"choices": ["a", "b", "c"]}, "needs 4 choices, found 3"),
        ({"choices": "abcd"}, "needs 4 choices"),
        ({"choices": ["a", "b", "c", 4]}, "must be text"),
        ({"answer": 4}, "expected 0 to 3 or A to D"),
        ({"answer": "E"}, "expected 0 to 3 or A to D"),
        ({"answer": True}, "expected 0 to 3 or A to D"),
        ({"answer": None}, "expected 0 to 3 or A to D"),
        ({"subject": None}, "has no subject"),
        ({"question": " "}, "has no question text"),
    ],
)
def test_bad_questions_are_one_line_with_file_and_place(tmp_path, change, expected):
    records = as_dicts(make_questions())
    records[4] |= change
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(records))
    with pytest.raises(UserError) as raised:
        load_questions(path)
    assert expected in str(raised.value)
    assert "bad.json: question 5" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.json", b""),
        ("cut.json", b'[{"question": "a'),
        ("list.json", b"[]"),
        ("number.json", b"3"),
        ("bytes.json", b"\xff\xfe"),
        ("a.parquet", b"PAR1"),
        ("a.csv", b"a,b\n"),
        ("a.jsonl", b'{"a": 1}\n{'),
        ("deep.json", b"[" * 100_000),
    ],
)
def test_bad_question_files_are_one_line(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError) as raised:
        load_questions(path)
    assert name in str(raised.value)
    assert "\n" not in str(raised.value)


def test_solved_questions_are_found_beside_the_others(tmp_path):
    def write(name, num):
        (tmp_path / name).write_text(json.dumps(as_dicts(make_questions(num))))

    for name, num in {"test_q.json": 3, "dev_q.json": 2, "questions.json": 3, "dev_questions.json": 1}.items():
        write(name, num)
    write("x.json", 3)
    find = load_dev_questions
    assert len(find(tmp_path / "test_q.json")) == 2 * len(SUBJECTS)
    assert len(find(tmp_path / "questions.json")) == len(SUBJECTS)
    assert find(tmp_path / "x.json") is None


def write_parquet(path, num):
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(as_dicts(make_questions(num))).to_parquet(path)


@pytest.mark.parametrize("layout", ["all/{}-00000-of-00001.parquet", "{}-00000-of-00001.parquet", "{}/x.parquet"])
def test_folders_as_they_are_on_the_hub(tmp_path, layout):
    """With the other splits beside it, which are not asked."""
    for split, num in {"test": 3, "dev": 2, "validation": 1, "auxiliary_train": 4}.items():
        write_parquet(tmp_path / layout.format(split), num)
    assert load_questions(tmp_path) == make_questions(3)
    assert load_dev_questions(tmp_path) == make_questions(2)


def test_a_folder_for_each_subject_and_the_original_archive(tmp_path):
    for split, num in {"test": 3, "dev": 2, "val": 1}.items():
        for subject in SUBJECTS:
            records = [r for r in as_dicts(make_questions(num)) if r["subject"] == subject]
            for root in ("hub", "archive"):
                (tmp_path / root / (subject if root == "hub" else split)).mkdir(parents=True, exist_ok=True)
            pd.DataFrame(records).to_parquet(tmp_path / "hub" / subject / f"{split}-00000-of-00001.parquet")
            with (tmp_path / "archive" / split / f"{subject}_{split}.csv").open("w", newline="") as file:
                csv.writer(file).writerows([r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in records)
    for folder in (tmp_path / "hub", tmp_path / "archive"):
        assert load_questions(folder) == make_questions(3)
        assert load_dev_questions(folder) == make_questions(2)
    assert load_dev_questions(tmp_path / "archive" / "test") == make_questions(2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no test questions in it"):
        load_questions(tmp_path / "empty")


def test_the_real_questions_load_whole(shared_data):
    questions = load_questions(shared_data / "mmlu" / "test_all_subjects.json")
    assert len(questions) == 14042
    assert {q.subject for q in questions} == set(SUBJECT_GROUPS)
    assert [q.answer for q in questions].count(0) == 3222
    drawn = select_questions(questions, 114, 0)
    assert len(drawn) == 114
    assert len({q.subject for q in drawn}) == 57


@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), data=st.data(), seed=st.integers(0, 99))
def test_samples_are_stratified_and_repeatable(sizes, data, seed):
    questions = [
        Question(f"s{s}", f"{s}/{i}", ("a", "b", "c", "d"), 0, f"s{s}/{i}")
        for s, n in enumerate(sizes)
        for i in range(n)
    ]
    total = data.draw(st.integers(1, len(questions)))
    drawn = select_questions(questions, total, seed)
    assert len(drawn) == total
    assert drawn == select_questions(questions, total, seed)
    assert drawn == [q for q in questions if q in drawn]
    counts = Counter(q.subject for q in drawn)
    if total >= len(sizes):
        assert len(counts) == len(sizes)
    for s, size in enumerate(sizes):
        assert counts[f"s{s}"] <= max(1, total * size / len(questions) + 1)
