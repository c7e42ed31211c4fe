"""Files of questions: every format, every mistake, and samples of them."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raylora.errors import UserError
from raylora.mmlu.questions import (
    LETTERS,
    NO_SUBJECT,
    SUBJECT_GROUPS,
    known_subject,
    load_dev_questions,
    load_questions,
    questions_hash,
    select_questions,
    subject_group,
)
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
        ({"choices": ["a"]}, "needs 2 to 10 choices, found 1"),
        ({"choices": list("abcdefghijk")}, "needs 2 to 10 choices, found 11"),
        ({"choices": "abcd"}, "needs 2 to 10 choices, found none"),
        ({"choices": ["a", "b", "c"], "answer": 3}, "expected 0 to 2 or A to C"),
        ({"choices": ["a", "b", "c"], "answer": "D"}, "expected 0 to 2 or A to C"),
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


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8).filter(str.strip)


@st.composite
def question_lists(draw):
    """Lists of questions with 2 to 10 choices, all with subjects or none."""
    drawn = draw(st.lists(st.tuples(NAMES, st.lists(NAMES, min_size=2, max_size=10)), min_size=1, max_size=6))
    has_subjects = draw(st.booleans())
    counts: Counter[str] = Counter()
    questions = []
    for text, choices in drawn:
        subject = draw(st.sampled_from(["law", "high_school_biology", "Planets"])) if has_subjects else NO_SUBJECT
        answer = draw(st.integers(0, len(choices) - 1))
        questions.append(Question(subject, text, tuple(choices), answer, f"{subject}/{counts[subject]}"))
        counts[subject] += 1
    return questions


@given(question_lists(), st.booleans())
def test_any_questions_read_back_the_same(tmp_path_factory, questions, as_letters):
    folder = tmp_path_factory.mktemp("any")
    rows = as_dicts(questions)
    for row in rows:
        if row["subject"] == NO_SUBJECT:
            del row["subject"]
        if as_letters:
            row["answer"] = LETTERS[row["answer"]].lower()
    (folder / "q.json").write_text(json.dumps(rows))
    (folder / "q.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    pq.write_table(pa.Table.from_pylist(rows), folder / "q.parquet")
    for name in ("q.json", "q.jsonl", "q.parquet"):
        assert load_questions(folder / name) == questions, name


@pytest.mark.parametrize(
    ("written", "subject"),
    [
        ("High School Biology", "high_school_biology"), ("high-school biology", "high_school_biology"),
        ("HIGH_SCHOOL_BIOLOGY", "high_school_biology"), ("HighSchoolBiology", "high_school_biology"),
        ("U.S. foreign policy", "us_foreign_policy"), ("computer science", "computer_science"), (" Law ", "law"),
        ("  Invented  Country ", "Invented  Country"), ("biologie", "biologie"), ("生物", "生物"),
    ],
)  # fmt: skip
def test_subjects_are_known_by_their_words(tmp_path, written, subject):
    assert known_subject(written) == subject
    rows = [{"question": "x", "choices": ["a", "b"], "answer": 0, "subject": written}]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    assert load_questions(tmp_path / "q.json")[0].question_id == f"{subject}/0"


def test_each_subject_has_a_group():
    assert {subject_group(known_subject(s.replace("_", " ").title())) for s in SUBJECT_GROUPS} == {
        "stem", "humanities", "social_sciences", "other",
    }  # fmt: skip
    pro = "biology business chemistry economics engineering health history law math other philosophy physics psychology"
    groups = {name: subject_group(name) for name in [*pro.split(), "computer_science"]}
    assert (groups["math"], groups["law"], groups["economics"], groups["business"]) == (
        "stem", "humanities", "social_sciences", "other",
    )  # fmt: skip
    assert Counter(groups.values()) == {"stem": 6, "humanities": 3, "social_sciences": 2, "other": 3}
    assert subject_group(NO_SUBJECT) == subject_group("planets") == "other"


def write_questions(path, rows):
    path.write_text(json.dumps([{"question": "x", "choices": list("wxyz"), "answer": 0, **row} for row in rows]))
    return path


def test_a_set_has_subjects_or_none(tmp_path):
    path = tmp_path / "q.json"
    assert {q.subject for q in load_questions(write_questions(path, [{}, {"subject": None}, {"subject": " "}]))} == {
        "all"
    }
    with pytest.raises(UserError, match="question 2: has no subject"):
        load_questions(write_questions(path, [{"subject": "law"}, {}]))


def test_answers_may_be_texts_where_that_is_unambiguous(tmp_path):
    path = tmp_path / "q.json"
    texts = [{"answer": "y"}, {"answer": "w", "choices": ["v", "w"]}, {"answer": "A", "choices": ["B", "A"]}]
    assert [q.answer for q in load_questions(write_questions(path, texts))] == [2, 1, 1], "A is a text here, as y is"
    numbers = [{"answer": "2", "choices": list("3210")}]
    assert load_questions(write_questions(path, numbers))[0].answer == 2, "an index where it can be one"
    with pytest.raises(UserError, match="question 1: answer 'y'; expected 0 to 3 or A to D"):
        load_questions(write_questions(path, [{"answer": "y", "choices": ["y", "y", "a", "b"]}]))
    with pytest.raises(UserError, match="question 2: answer 'nothing'"):
        load_questions(write_questions(path, [{"answer": "A"}, {"answer": "nothing"}]))


def test_a_question_keeps_the_id_of_its_file(tmp_path):
    rows = [{"id": "q-1"}, {"question_id": 17}, {"idx": 0}, {"idx": {"paragraph": 1}}, {}]
    found = load_questions(write_questions(tmp_path / "q.json", rows))
    assert [q.own_id for q in found] == ["q-1", "17", "0", "", ""]
    assert [q.question_id for q in found] == [f"all/{i}" for i in range(5)]


def test_the_identity_of_questions_is_what_it_was(shared_data):
    """Stored scores are found by it: these are the values from before questions had 2 to 10 choices."""
    assert questions_hash(make_questions()) == "d58655a11928780438146c9499383894f7b0e661e724469266d0975926e9e465"
    for name, expected in {
        "test": "31b8996ea16280ff6d7fff6610b2a3a433634c543715c74c583b8ea5a0c06414",
        "dev": "cc9a8bd6623609af20747f95ff3701626b0593616ab5414c2dbd5560341013f1",
    }.items():
        assert questions_hash(load_questions(shared_data / "mmlu" / f"{name}_all_subjects.json")) == expected
    renamed = [dataclasses.replace(q, own_id="x") for q in make_questions()]
    assert questions_hash(renamed) == questions_hash(make_questions())


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
