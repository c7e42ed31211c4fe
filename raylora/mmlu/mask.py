"""``--mask``: questions that a second set of numbers leaves out, as their labels are wrong or their texts unclear.

A mask is a list of question ids, or a table in MMLU-Redux's form (Gema et al. 2024, "Are We Done with MMLU?",
arXiv:2406.04127), which has the questions that people have read again, with an ``error_type`` that is ``ok`` or not.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from raylora.data.dataset_files import table_rows
from raylora.errors import UserError
from raylora.mmlu.question_files import json_values, suffix_of, text_of
from raylora.records import Question
from raylora.storage.places import location, reading

ID_COLUMNS = ("question_id", "id")
ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".arrow", ".feather", ".txt")
RIGHT = "ok"
"""The ``error_type`` of a question of MMLU-Redux with which nothing is wrong."""


def find_masked(file: str, questions: Sequence[Question]) -> frozenset[str]:
    """The ids of the questions that a mask leaves out.

    Args:
        file: ids, one a line, in a JSON list, or in a column ``question_id`` (or ``id``) of a CSV, JSON, JSON lines,
            Parquet or Arrow file; or a table with the columns ``question``, ``choices`` and ``error_type``; or a folder
            of such files. An id is ``subject/N``, N counting from 0 within the subject, or that of the questions' file.
        questions: all of the set.

    Raises:
        UserError: it cannot be read, is no mask, or lists none of the questions.
    """
    path = location(file).expanduser()
    with reading(path):
        wrong = [_key_of(place, value) for place, value in _entries(path)]
    listed = {key for key in wrong if key is not None}
    masked = frozenset(q.question_id for q in questions if listed.intersection(_keys_of(q)))
    if not masked:
        raise UserError(f"--mask {path}: it lists {len(listed)} questions, and none of the set's {len(questions)}")
    return masked


def _keys_of(question: Question) -> set[str]:
    """What a mask may call a question."""
    return {question.question_id, question.own_id, _text_key(question.question, question.choices)} - {""}


def _text_key(question: str, choices: Sequence[str]) -> str:
    """A question without its white space and case, in which copies of MMLU differ; longer than any id."""
    return json.dumps(["".join(text.split()).casefold() for text in (question, *choices)], ensure_ascii=False)


def _key_of(place: str, entry: Any) -> str | None:
    """What an entry of a mask calls the question that is left out; None where it says that nothing is wrong with it.

    Raises:
        UserError: it is no entry of a mask.
    """
    if isinstance(entry, str) and entry.strip():
        return entry.strip()
    if isinstance(entry, int) and not isinstance(entry, bool):
        return str(entry)
    if not isinstance(entry, dict):
        raise UserError(f"{place}: expected a question's id, or an object with question_id; found {str(entry)[:40]!r}")
    if "error_type" in entry and str(entry["error_type"]).strip() == RIGHT:
        return None
    for name in ID_COLUMNS:
        if entry.get(name) not in (None, ""):
            return str(entry[name]).strip()
    question, choices = entry.get("question"), entry.get("choices")
    is_known = "error_type" in entry and isinstance(question, str)
    if is_known and isinstance(choices, list) and all(isinstance(c, str) for c in choices):
        return _text_key(str(question), choices)
    raise UserError(f"{place}: has neither question_id nor question, choices and error_type (MMLU-Redux)")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Each entry of a mask with its place."""
    files = sorted(p for p in path.rglob("*") if suffix_of(p) in ENDINGS) if path.is_dir() else [path]
    if not files:
        raise UserError(f"--mask {path}: no {', '.join(ENDINGS)} file in it")
    for file in files:
        try:
            entries = _read(file)
        except UserError as error:
            raise UserError(f"--mask {error}") from None
        yield from ((f"--mask {file}: entry {number}", entry) for number, entry in enumerate(entries, 1))


def _read(file: Path) -> list[Any]:
    if rows := table_rows(file):
        return [row.value for row in rows]
    if suffix_of(file) == ".csv":
        return list(csv.DictReader(io.StringIO(text_of(file))))
    text = text_of(file)
    if text.lstrip().startswith(("[", "{", '"')):
        found = json_values(file)
        return found if isinstance(found, list) else [found]
    return [line for line in text.split("\n") if line.strip()]
