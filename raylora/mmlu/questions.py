"""Read MMLU questions: JSON, JSON lines, Parquet as on the Hugging Face hub, and the original archive's CSV files."""

from __future__ import annotations

import csv
import io
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from raylora.errors import UserError, reason
from raylora.records import Question, digest

LETTERS = "ABCDEFGHIJ"
"""Of the choices of a question, which has 2 to 10 of them."""
# The four groups of lm-evaluation-harness.
SUBJECT_GROUP_NAMES = {
    "stem": """
        abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science
        college_mathematics college_physics computer_security conceptual_physics electrical_engineering
        elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science
        high_school_mathematics high_school_physics high_school_statistics machine_learning
    """,
    "humanities": """
        formal_logic high_school_european_history high_school_us_history high_school_world_history
        international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory
        professional_law world_religions
    """,
    "social_sciences": """
        econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics
        high_school_microeconomics high_school_psychology human_sexuality professional_psychology
        public_relations security_studies sociology us_foreign_policy
    """,
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing
        medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology
    """,
}
SHORT_GROUPS = {"stem": "STEM", "humanities": "hum.", "social_sciences": "social", "other": "other"}
SUBJECT_GROUPS = {subject: group for group, subjects in SUBJECT_GROUP_NAMES.items() for subject in subjects.split()}
"""The group of each of the 57 subjects."""

NO_SUBJECT = "all"
"""The subject of questions whose file names none: prompts leave it out."""

Split = Literal["test", "dev"]
RawQuestion = tuple[str, dict[str, Any]]
"""The place of a question in its file ("question 7"), and its fields, not checked yet."""


def load_questions(path: Path, split: Split = "test") -> list[Question]:
    """Read the questions of a file or folder, in its order.

    Args:
        split: which questions of a folder that holds several splits.

    Returns:
        Questions whose ids are ``subject/N``, N counting from 0 within the subject.

    Raises:
        UserError: a question is bad, or there is none; the message names the file, the question and what is wrong.
    """
    num_of_subject: Counter[str] = Counter()
    questions = []
    for place, fields in _read_raw(path, split):
        question = _parse(f"{path}: {place}", fields, num_of_subject)
        num_of_subject[question.subject] += 1
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no question in it; expected a list of {{question, choices, answer, subject}}")
    return questions


def _parse(place: str, fields: dict[str, Any], num_of_subject: Counter[str]) -> Question:
    subject, text, choices = fields.get("subject"), fields.get("question"), fields.get("choices")
    if not isinstance(subject, str) or not subject.strip():
        raise UserError(f"{place}: has no subject")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: has no question text")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        num_choices = len(choices) if isinstance(choices, list | tuple) else "none"
        raise UserError(f"{place}: needs 4 choices, found {num_choices}")
    if not all(isinstance(c, str) for c in choices):
        raise UserError(f"{place}: its choices must be text")
    subject = subject.strip()
    a, b, c, d = choices
    question_id = f"{subject}/{num_of_subject[subject]}"
    return Question(subject, text, (a, b, c, d), _parse_letter(place, fields.get("answer")), question_id)


def _parse_letter(place: str, answer: Any) -> int:
    """The index of the right choice, 0 to 3; files give it as a letter, a number or a number's text."""
    if isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS):
        return LETTERS.index(answer.strip().upper())
    if isinstance(answer, str) and answer.strip() in {"0", "1", "2", "3"}:
        return int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= 3:
        return answer
    raise UserError(f"{place}: answer {str(answer)[:40]!r}; expected 0 to 3 or A to D")


def _read_raw(path: Path, split: Split) -> Iterator[RawQuestion]:
    try:
        if path.is_dir():
            yield from _read_folder(path, split)
        elif path.suffix == ".parquet":
            yield from _read_parquet(path)
        elif path.suffix == ".csv":
            yield from _read_csv(path)
        else:
            yield from _read_json(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def _read_folder(folder: Path, split: Split) -> Iterator[RawQuestion]:
    files = _files_of(folder, split)
    if split == "test" and not files:  # no file is named after a split: then all files are questions to ask
        files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: no {split} questions in it ({split}/*, all/{split}-*.parquet, *_{split}.csv)")
    for file in files:
        for place, fields in _read_parquet(file) if file.suffix == ".parquet" else _read_csv(file):
            yield f"{file.relative_to(folder)}: {place}", fields


def _files_of(folder: Path, split: Split) -> list[Path]:
    """A split's files: as on the hub (all subjects together, or a folder each), or as in the original archive."""
    for any_file in ("*.parquet", "*.csv"):
        suffix = any_file[1:]
        for pattern in (f"{split}/{any_file}", f"all/{split}-{any_file}", f"{split}-{any_file}", f"*_{split}{suffix}"):
            if files := sorted(folder.glob(pattern)):
                return files
    return sorted(folder.glob(f"*/{split}-*.parquet"))


def _read_parquet(path: Path) -> Iterator[RawQuestion]:
    data = _bytes_of(path)
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, ValueError, OSError) as error:  # a damaged file may hold text that is not UTF-8
        raise UserError(f"{path}: no Parquet file: {' '.join(str(error).split())[:200]}") from None
    for i, fields in enumerate(rows, 1):
        yield f"question {i}", fields


def _read_csv(path: Path) -> Iterator[RawQuestion]:
    """Lines without a header: question, four choices, letter. The subject is the file's name without its split."""
    subject = path.stem
    for split in ("_test", "_dev", "_val"):
        subject = subject.removesuffix(split)
    try:
        rows = list(csv.reader(io.StringIO(_decode(path), newline="")))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV: {error}") from None
    for i, row in enumerate(rows, 1):
        if row:
            if len(row) != 6:
                raise UserError(
                    f"{path}: question {i}: needs 6 columns (question, 4 choices, letter), found {len(row)}"
                )
            yield f"question {i}", {"subject": subject, "question": row[0], "choices": row[1:5], "answer": row[5]}


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None


def _decode(path: Path) -> str:
    data = _bytes_of(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _read_json(path: Path) -> Iterator[RawQuestion]:
    """A JSON list; or JSON lines, by the suffix ``.jsonl`` or a first line that is an object by itself."""
    text = _decode(path)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        first_line = text.lstrip().partition("\n")[0]
        if path.suffix != ".jsonl" and not (first_line.startswith("{") and first_line.rstrip().endswith("}")):
            raise UserError(f"{path}: line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
        values = list(_json_lines(path, text))
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not JSON: {str(error)[:200]}") from None
    if not isinstance(values, list):
        raise UserError(f"{path}: expected a list of questions, found {type(values).__name__}")
    for i, fields in enumerate(values, 1):
        if not isinstance(fields, dict):
            raise UserError(f"{path}: question {i}: expected an object, found {type(fields).__name__}")
        yield f"question {i}", fields


def _json_lines(path: Path, text: str) -> Iterator[Any]:
    # Not splitlines(): it would cut at U+2028 as well, which may stand within a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{path}: line {number}: not JSON: {str(error)[:200]}") from None


def load_dev_questions(path: Path) -> list[Question] | None:
    """The solved few-shot questions that belong to the questions of ``path``.

    They are the ``dev`` split of the same folder, or a file or folder beside it: its name with ``dev`` in place of
    ``test``, its name after ``dev_``, or, beside a folder, ``dev``.

    Returns:
        None where there are none.

    Raises:
        UserError: they cannot be read, or one of them is bad.
    """
    if path.is_dir() and _files_of(path, "dev"):
        return load_questions(path, "dev")
    names = [path.name.replace("test", "dev"), f"dev_{path.name}", *(["dev"] if path.is_dir() else [])]
    existing = [path.with_name(name) for name in names if name != path.name and path.with_name(name).exists()]
    return load_questions(existing[0]) if existing else None


def select_questions(questions: Sequence[Question], max_samples: int | None, seed: int) -> list[Question]:
    """A seeded sample, stratified by subject and in the file's order; all questions if ``max_samples`` is None.

    Each subject gets a number of questions in proportion to its size, rounded by the method of largest remainders, and
    at least one where ``max_samples`` is no less than the number of subjects.
    """
    if max_samples is None or max_samples >= len(questions):
        return list(questions)
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_subject[question.subject].append(question)
    num_taken = _apportion({subject: len(group) for subject, group in by_subject.items()}, max_samples)
    chosen_ids: set[str] = set()
    for subject, group in by_subject.items():
        # A seed for each subject: which of its questions are drawn does not depend on the order of subjects.
        drawn = random.Random(f"{seed}/{subject}").sample(group, num_taken[subject])
        chosen_ids |= {q.question_id for q in drawn}
    return [q for q in questions if q.question_id in chosen_ids]


def _apportion(sizes: dict[str, int], total: int) -> dict[str, int]:
    """How many of ``total`` each subject gets: in proportion to its size, by largest remainders."""
    num_questions = sum(sizes.values())
    floor = 1 if total >= len(sizes) else 0
    exact = {s: total * n / num_questions for s, n in sizes.items()}
    seats = {s: max(floor, int(x)) for s, x in exact.items()}
    while sum(seats.values()) < total:  # rounded down: the largest remainders get one more
        not_exhausted = [s for s in seats if seats[s] < sizes[s]]
        seats[max(not_exhausted, key=lambda s: (exact[s] - seats[s], s))] += 1
    while sum(seats.values()) > total:  # the floor of one gave too many: those furthest above their share give one back
        above_floor = [s for s in seats if seats[s] > floor]
        seats[max(above_floor, key=lambda s: (seats[s] - exact[s], s))] -= 1
    return seats


def questions_hash(questions: Iterable[Question]) -> str:
    """Identity of a set of questions: texts, choices, answers and order."""
    return digest([[q.subject, q.question, *q.choices, q.answer] for q in questions])
