"""Questions from files: JSON, JSON lines, Parquet as on the hub, and the original folder of CSV files."""

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

LETTERS = "ABCD"
# As lm-evaluation-harness has them.
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

Split = Literal["test", "dev"]
QuestionPlace = tuple[str, dict[str, Any]]
"""Where a raw question stands, and its fields."""


def load_questions(path: Path, split: Split = "test") -> list[Question]:
    """Read a file or folder of questions, in its order; of a folder that holds several splits, ``split``.

    Raises:
        UserError: one line that names the file, the question and what is wrong with it.
    """
    counts: Counter[str] = Counter()
    questions = []
    for place, fields in _read_raw(path, split):
        question = _parse(f"{path}: {place}", fields, counts)
        counts[question.subject] += 1
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: no question in it; expected a list of {{question, choices, answer, subject}}")
    return questions


def _parse(place: str, fields: dict[str, Any], counts: Counter[str]) -> Question:
    subject, text, choices = fields.get("subject"), fields.get("question"), fields.get("choices")
    if not isinstance(subject, str) or not subject.strip():
        raise UserError(f"{place}: has no subject")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: has no question text")
    if not isinstance(choices, list | tuple) or len(choices) != 4:
        found = len(choices) if isinstance(choices, list | tuple) else "none"
        raise UserError(f"{place}: needs 4 choices, found {found}")
    if not all(isinstance(c, str) for c in choices):
        raise UserError(f"{place}: its choices must be text")
    subject = subject.strip()
    a, b, c, d = choices
    return Question(
        subject, text, (a, b, c, d), _parse_letter(place, fields.get("answer")), f"{subject}/{counts[subject]}"
    )


def _parse_letter(place: str, answer: Any) -> int:
    if isinstance(answer, str) and answer.strip().upper() in tuple(LETTERS):
        return LETTERS.index(answer.strip().upper())
    if isinstance(answer, str) and answer.strip() in {"0", "1", "2", "3"}:
        return int(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer <= 3:
        return answer
    raise UserError(f"{place}: answer {str(answer)[:40]!r}; expected 0 to 3 or A to D")


def _read_raw(path: Path, split: Split) -> Iterator[QuestionPlace]:
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


def _read_folder(folder: Path, split: Split) -> Iterator[QuestionPlace]:
    files = _files_of(folder, split)
    if split == "test" and not files:  # nothing is named for a split: all of it are the questions
        files = sorted(folder.glob("*.parquet")) or sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: no {split} questions in it ({split}/*, all/{split}-*.parquet, *_{split}.csv)")
    for file in files:
        for place, fields in _read_parquet(file) if file.suffix == ".parquet" else _read_csv(file):
            yield f"{file.relative_to(folder)}: {place}", fields


def _files_of(folder: Path, split: Split) -> list[Path]:
    """Where a split lies: as on the hub (all subjects together, or a folder each), or as in the original archive."""
    for pattern in ("*.parquet", "*.csv"):
        for place in (f"{split}/{pattern}", f"all/{split}-{pattern}", f"{split}-{pattern}", f"*_{split}{pattern[1:]}"):
            if files := sorted(folder.glob(place)):
                return files
    return sorted(folder.glob(f"*/{split}-*.parquet"))


def _read_parquet(path: Path) -> Iterator[QuestionPlace]:
    data = _bytes_of(path)
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, ValueError, OSError) as error:  # a damaged one may hold text that is no UTF-8
        raise UserError(f"{path}: no Parquet file: {' '.join(str(error).split())[:200]}") from None
    for i, fields in enumerate(rows, 1):
        yield f"question {i}", fields


def _read_csv(path: Path) -> Iterator[QuestionPlace]:
    """Lines without a header: question, four choices, letter. The subject is the file's name."""
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


def _read_json(path: Path) -> Iterator[QuestionPlace]:
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
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (RecursionError, ValueError) as error:
                raise UserError(f"{path}: line {number}: not JSON: {str(error)[:200]}") from None


def load_dev_questions(path: Path) -> list[Question] | None:
    """The solved questions that belong to ``path``'s: of the same folder, or of what is named alike beside it.

    Returns:
        None where there are none.

    Raises:
        UserError: they are there, and bad.
    """
    if path.is_dir() and _files_of(path, "dev"):
        return load_questions(path, "dev")
    names = [path.name.replace("test", "dev"), f"dev_{path.name}", *(["dev"] if path.is_dir() else [])]
    found = [path.with_name(name) for name in names if name != path.name and path.with_name(name).exists()]
    return load_questions(found[0]) if found else None


def select_questions(questions: Sequence[Question], max_samples: int | None, seed: int) -> list[Question]:
    """A seeded sample stratified by subject, in the file's order; all questions where ``max_samples`` is none.

    Each subject gets its share by largest remainders; one at least, as long as ``max_samples`` allows it.
    """
    if max_samples is None or max_samples >= len(questions):
        return list(questions)
    by_subject: dict[str, list[Question]] = defaultdict(list)
    for question in questions:
        by_subject[question.subject].append(question)
    taken = _shares({subject: len(group) for subject, group in by_subject.items()}, max_samples)
    chosen: set[str] = set()
    for subject, group in by_subject.items():
        drawn = random.Random(f"{seed}/{subject}").sample(group, taken[subject])
        chosen |= {q.question_id for q in drawn}
    return [q for q in questions if q.question_id in chosen]


def _shares(sizes: dict[str, int], total: int) -> dict[str, int]:
    num_all = sum(sizes.values())
    floor = 1 if total >= len(sizes) else 0
    exact = {s: total * n / num_all for s, n in sizes.items()}
    shares = {s: max(floor, int(x)) for s, x in exact.items()}
    # Give what is missing to the largest remainders; take what is too much from those that are most above their share.
    while sum(shares.values()) < total:
        open_subjects = [s for s in shares if shares[s] < sizes[s]]
        shares[max(open_subjects, key=lambda s: (exact[s] - shares[s], s))] += 1
    while sum(shares.values()) > total:
        rich = [s for s in shares if shares[s] > floor]
        shares[max(rich, key=lambda s: (shares[s] - exact[s], s))] -= 1
    return shares


def questions_hash(questions: Iterable[Question]) -> str:
    """Identity of a set of questions: texts, choices, answers and order."""
    return digest([[q.subject, q.question, *q.choices, q.answer] for q in questions])
