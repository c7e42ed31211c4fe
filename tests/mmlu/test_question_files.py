"""Which files of a folder are the questions, and which ones the solved ones."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from raylora.errors import UserError
from raylora.mmlu.question_files import files_of, paths_beside, split_of
from raylora.mmlu.questions import load_dev_questions, load_questions, read_questions
from tests.helpers.dataset_files import arrow_file, arrow_stream, json_lines, json_list, parquet, zst
from tests.helpers.questions import ARC, write_hub, write_lines


def write(path, num, answer="A", subject=None):
    """A file of so many questions, in the form of its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        choices = {"text": ["a", "b"], "label": ["A", "B"]}
        rows = [
            {"id": f"{path.name}/{i}", "question": "x", "choices": choices, "answerKey": answer} for i in range(num)
        ]
        write_hub(path, ARC, rows)
    else:
        row = {"question": "x", "choices": ["a", "b"], "answer": answer, **({"subject": subject} if subject else {})}
        write_lines(path, [row] * num) if path.suffix == ".jsonl" else path.write_text(json.dumps([row] * num))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("test-00000-of-00001.parquet", "test"), ("ARC-Challenge-Test.jsonl", "test"), ("valid.jsonl", "validation"),
        ("test_all_subjects.json", "test"), ("dev_rand_split.jsonl", "dev"), ("hellaswag_val.jsonl", "validation"),
        ("validation-00000-of-00002.parquet", "validation"),
        ("auxiliary_train-00000-of-00001.parquet", None), ("contest.json", None), ("dataset_infos.json", None),
        ("train_rand_split.jsonl", "train"), ("anatomy_dev.csv", "dev"),
    ],
)  # fmt: skip
def test_a_file_is_named_after_its_split(tmp_path, name, expected):
    assert split_of(tmp_path / name) == expected


def sizes(path):
    """Number of questions, their split, number of solved ones."""
    found, dev = read_questions(path), load_dev_questions(path)
    return len(found.questions), found.split, len(dev) if dev is not None else None


SHARD = "{}-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # MMLU-Pro; MMLU with all its splits; ARC, OpenBookQA
        ({"data/test-S": 5, "data/validation-S": 2}, (5, "test", 2)),
        ({"all/test-S": 5, "all/validation-S": 4, "all/dev-S": 2, "all/auxiliary_train-S": 9}, (5, "test", 2)),
        ({"test-S": 5, "validation-S": 4, "train-S": 3}, (5, "test", 3)),
        ({"ARC-Easy-Test.jsonl": 5, "ARC-Easy-Dev.jsonl": 2, "ARC-Easy-Train.jsonl": 3}, (5, "test", 2)),
        # CommonsenseQA, HellaSwag, BoolQ: the test split is withheld, or there is none
        ({"data/test-S": -5, "data/validation-S": 4, "data/train-S": 3}, (4, "validation", 3)),
        ({"test_rand_no_answers.jsonl": -5, "dev_rand.jsonl": 4, "train_rand.jsonl": 3}, (4, "dev", 3)),
        ({"hellaswag_test.jsonl": -5, "hellaswag_val.jsonl": 4, "hellaswag_train.jsonl": 3}, (4, "validation", 3)),
        ({"data/validation-S": 4, "data/train-S": 3}, (4, "validation", 3)),
        ({"train.jsonl": 3, "dev.jsonl": 4}, (4, "dev", 3)),
        # the hub's own conversions
        ({"test/0000.parquet": -5, "validation/0000.parquet": 4, "train/0000.parquet": 3}, (4, "validation", 3)),
        # what is asked is never shown; Parquet counts where it lies beside its original; no split at all
        ({"validation-S": 4}, (4, "validation", None)),
        ({"test-S": 5, "test.jsonl": 7}, (5, "test", None)),
        ({"first.jsonl": 2, "second.jsonl": 1}, (3, None, None)),
    ],
)  # fmt: skip
def test_the_splits_of_a_folder(tmp_path, files, expected):
    for name, num in files.items():
        write(tmp_path / name.replace("-S", SHARD.format("")), abs(num), "" if num < 0 else "B")
    assert sizes(tmp_path) == expected


def test_questions_are_read_from_compressed_and_arrow_files(tmp_path):
    questions = [
        {"subject": "anatomy", "question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4}
        for i in range(5)
    ]
    makers = {"a.json.gz": lambda r: gzip.compress(json_list(r)), "a.JSONL.zst": lambda r: zst(json_lines(r))}
    for name, make in {**makers, "a.arrow": arrow_stream, "a.FEATHER": arrow_file, "a.Parquet": parquet}.items():
        (tmp_path / name).write_bytes(make(questions))
        assert [q.answer for q in load_questions(tmp_path / name)] == [0, 1, 2, 3, 0]
    (tmp_path / "a.json.gz").write_bytes(makers["a.json.gz"](questions)[:-20])
    with pytest.raises(UserError, match=r"a\.json\.gz: its gzip data breaks off; get the file again"):
        load_questions(tmp_path / "a.json.gz")


def test_it_is_said_which_split_is_asked_where_that_is_not_test(tmp_path):
    for split, answer in {"test": "", "validation": "A"}.items():
        write(tmp_path / "data" / SHARD.format(split), 2, answer)
    assert read_questions(tmp_path).notes == [
        f"{tmp_path}: the test split has no answers: these are the validation questions"
    ]
    (tmp_path / "data" / SHARD.format("test")).unlink()
    assert read_questions(tmp_path).notes == [f"{tmp_path}: there is no test split: these are the validation questions"]
    write(tmp_path / "data" / SHARD.format("test"), 2)
    assert read_questions(tmp_path).notes == []


def test_a_test_split_without_answers_alone_is_one_line(tmp_path):
    write(tmp_path / "data" / SHARD.format("test"), 2, "")
    with pytest.raises(UserError, match=r"data/test-.*: question 1: has no answer: use the validation split"):
        load_questions(tmp_path)


def test_a_single_missing_answer_is_no_withheld_split(tmp_path):
    row = {"question": "x", "choices": ["a", "b"], "answer": "A"}
    write_lines(tmp_path / "test.jsonl", [row, {**row, "answer": ""}])
    write_lines(tmp_path / "dev.jsonl", [row])
    with pytest.raises(UserError, match=r"test\.jsonl: question 2: has no answer; expected 0 to 1 or A to B"):
        load_questions(tmp_path)


def test_several_sets_in_one_folder_are_not_mixed(tmp_path):
    for name in ("ARC-Challenge", "ARC-Easy"):
        write(tmp_path / name / SHARD.format("test"), 2)
    with pytest.raises(
        UserError, match=re.escape("holds several sets, ARC-Challenge, ARC-Easy: name the folder of one")
    ):
        load_questions(tmp_path)
    assert len(load_questions(tmp_path / "ARC-Easy")) == 2


def test_solved_questions_of_another_set_are_not_taken(tmp_path):
    for name, num in {
        "one_test.json": 5,
        "one_dev.json": 2,
        "two_test.json": 4,
        "own1-test.json": 1,
        "own2-dev.json": 1,
    }.items():
        write(tmp_path / name, num)  # fmt: skip
    assert sizes(tmp_path / "one_test.json") == (5, None, 2)
    assert sizes(tmp_path / "two_test.json") == (4, None, None)
    assert sizes(tmp_path / "own1-test.json") == (1, None, None)


@pytest.mark.parametrize(
    ("asked", "solved"),
    [
        ("test-00000-of-00001.parquet", "validation-00000-of-00001.parquet"),
        ("validation-00000-of-00001.parquet", "train-00000-of-00003.parquet"),
        ("ARC-Easy-Test.jsonl", "ARC-Easy-Train.jsonl"), ("dev_rand_split.jsonl", "train_rand_split.jsonl"),
        ("mytest.json", "mydev.json"), ("questions.json", "train_questions.json"),
    ],
)  # fmt: skip
def test_solved_questions_beside_a_file(tmp_path, asked, solved):
    write(tmp_path / asked, 3)
    assert load_dev_questions(tmp_path / asked) is None
    write(tmp_path / solved, 2)
    assert len(load_dev_questions(tmp_path / asked)) == 2
    assert files_of(tmp_path, split_of(tmp_path / solved) or "dev") in ([tmp_path / solved], [])
    assert paths_beside(tmp_path / asked, split_of(tmp_path / solved) or "dev") == [tmp_path / solved]


def test_csv_files_may_have_any_number_of_choices_but_one_each(tmp_path):
    (tmp_path / "law_test.csv").write_text("What?,a,b,B\nWhich?,c,d,A\n")
    assert [(q.subject, q.choices, q.answer) for q in load_questions(tmp_path / "law_test.csv")] == [
        ("law", ("a", "b"), 1), ("law", ("c", "d"), 0),
    ]  # fmt: skip
    (tmp_path / "cut.csv").write_text("What?,a,b,B\nWhich?,c,d, or e,A\n")
    with pytest.raises(UserError, match=r"cut\.csv: question 2: has 5 columns, the first has 4"):
        load_questions(tmp_path / "cut.csv")


def test_suffixes_may_be_capitals(tmp_path):
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "anatomy_TEST.CSV").write_text("What?,a,b,c,d,B\n")
    assert [q.subject for q in load_questions(tmp_path / "csv")] == ["anatomy"]
    assert [q.answer for q in load_questions(tmp_path / "csv" / "anatomy_TEST.CSV")] == [1]
    write(tmp_path / "hub" / "test.parquet", 3)
    (tmp_path / "hub" / "test.parquet").rename(tmp_path / "hub" / "test.PARQUET")
    assert len(load_questions(tmp_path / "hub")) == 3
    write(tmp_path / "own_test.jsonl", 2)
    (tmp_path / "own_test.jsonl").rename(tmp_path / "own_test.JSONL")
    write(tmp_path / "own_dev.jsonl", 1)
    (tmp_path / "own_dev.jsonl").rename(tmp_path / "own_dev.JSONL")
    assert len(load_questions(tmp_path / "own_test.JSONL")) == 2
    assert len(load_dev_questions(tmp_path / "own_test.JSONL")) == 1
