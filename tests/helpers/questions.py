"""Questions of a few subjects, encoded and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from raylora.mmlu.prompts import encode_questions
from raylora.mmlu.scoring import evaluate
from raylora.model.loading import borrowed
from raylora.records import Question

LOGPROBS = ["logprob_a", "logprob_b", "logprob_c", "logprob_d"]
TEXTS = pa.list_(pa.string())
LABELLED = pa.struct([("text", TEXTS), ("label", TEXTS)])
ARC = [("id", pa.string()), ("question", pa.string()), ("choices", LABELLED), ("answerKey", pa.string())]
"""Columns and types of ARC on the Hugging Face hub."""
SUBJECTS = ("anatomy", "astronomy", "virology")


def make_questions(per_subject: int = 3) -> list[Question]:
    return [
        Question(
            subject, f"Question {i} " + "long " * (7 * i), ("one", "two", "three", "four"), i % 4, f"{subject}/{i}"
        )
        for subject in SUBJECTS
        for i in range(per_subject)
    ]


def questions_of_many_sizes() -> list[Question]:
    """With 2, 3, 4, 5 and 10 choices, the first one with two."""
    texts = ["blue river", "cat", "the cat sat", "mat", "two", "one two three", "six", "on", "sat on the mat", "what"]
    sizes = (2, 4, 10, 3, 5, 2)
    return [
        Question(
            "all", f"What {'really ' * i}of {i}?", tuple(texts[i:] + texts[:i])[:size], i % size, f"all/{i}", f"q{i}"
        )
        for i, size in enumerate(sizes)
    ]


def as_dicts(questions: list[Question]) -> list[dict]:
    return [
        {"question": q.question, "choices": list(q.choices), "answer": q.answer, "subject": q.subject}
        for q in questions
    ]


def ask(model, tokenizer, encoded, *args, **options):
    """The score of a model that is not raylora's."""
    with borrowed(model, tokenizer) as loaded:
        return evaluate(loaded, encoded, *args, **options)


def encode(tokenizer, questions=None, shots=None, style="harness", max_length=2048):
    return encode_questions(tokenizer, questions or make_questions(), shots or {}, style, max_length)


def questions_of_two_subjects(per_subject: int = 6) -> list[Question]:
    return [
        Question(s, f"What of {s} {i}?" + " really" * (3 * i), ("one", "two", "three", "four"), i % 4, f"{s}/{i}")
        for s in ("anatomy", "virology")
        for i in range(per_subject)
    ]


def write_question_file(folder: Path, questions: list[Question]) -> Path:
    """The questions and the first once more, and the same as solved ones beside them."""
    records = as_dicts(questions)
    (folder / "test_q.json").write_text(json.dumps([*records, records[0]]))
    (folder / "dev_q.json").write_text(json.dumps(records))
    return folder / "test_q.json"


def write_hub(path: Path, schema: list, rows: list[dict]) -> None:
    """A Parquet file with the very columns and types of the hub's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(schema)), path)


def write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
