"""Multiple-choice questions of any known form, checked, with ids, subjects and groups; and samples of them."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from raylora.errors import UserError, reason
from raylora.mmlu.question_files import Split, files_of, files_without_split, paths_beside, read_file, split_of
from raylora.mmlu.question_forms import RawQuestion, read_form
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

_MMLU_PRO_GROUP_NAMES = {
    "stem": "biology chemistry computer_science engineering math physics",
    "humanities": "history law philosophy",
    "social_sciences": "economics psychology",
    "other": "business health other",
}
_PRO_GROUPS = {subject: group for group, subjects in _MMLU_PRO_GROUP_NAMES.items() for subject in subjects.split()}
_BY_WORDS = {subject.replace("_", ""): subject for subject in (*SUBJECT_GROUPS, *_PRO_GROUPS)}


@lru_cache
def known_subject(name: str) -> str:
    """A subject of MMLU or MMLU-Pro by its words, whatever case and separators; another one as it is, stripped.

    >>> known_subject("High-School Biology")
    'high_school_biology'
    """
    return _BY_WORDS.get("".join(re.findall(r"[^\W_]+", name.casefold())), name.strip())


def subject_group(subject: str) -> str:
    """The group of a subject of MMLU or MMLU-Pro; ``other`` for all others."""
    return SUBJECT_GROUPS.get(subject) or _PRO_GROUPS.get(subject, "other")


class LoadedQuestions(NamedTuple):
    questions: list[Question]
    split: Split | None
    """The split of a folder that they are; None for a file, and where no file is named after a split."""
    notes: list[str]
    """What the user is to know about the choice of the split."""


def load_questions(path: Path) -> list[Question]:
    """As ``read_questions``, without notes."""
    return read_questions(path).questions


def read_questions(path: Path) -> LoadedQuestions:
    """Read the questions of a file or folder, in its order. ``question_forms.py`` has the forms that are known.

    Of a folder with several splits these are ``test``; where there is none, or it keeps its answers to itself,
    ``validation`` (or ``val``), or else ``dev``.

    Returns:
        Questions whose ids are ``subject/N``, N counting from 0 within the subject. The subject is ``NO_SUBJECT`` where
        no question of the set has one.

    Raises:
        UserError: a question is bad, or there is none; the message names the file, the question and what is wrong.
    """
    try:
        split, raw, notes = _choose_split(path) if path.is_dir() else (None, _read_raw([path], path), [])
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    if not raw:
        raise UserError(f"{path}: no question in it; expected a list of {{question, choices, answer, subject}}")
    return LoadedQuestions(_parse(raw), split, notes)


_Placed = tuple[str, RawQuestion]
"""A question, and its place: file and number."""


def _choose_split(folder: Path) -> tuple[Split | None, list[_Placed], list[str]]:
    splits: tuple[Split, ...] = ("test", "validation", "dev")
    files = {split: found for split in splits if (found := files_of(folder, split))}
    withheld: list[_Placed] = []
    for split, found in files.items():
        raw = _read_raw(found, folder)
        if any(question.answer is not None for _, question in raw):
            why = "the test split has no answers" if withheld else "there is no test split"
            return split, raw, [] if split == "test" else [f"{folder}: {why}: these are the {split} questions"]
        withheld = withheld or raw
    if not files and not (found := files_without_split(folder)):
        raise UserError(f"{folder}: no test questions in it (test/*, data/test-*.parquet, *_test.csv, *-Test.jsonl)")
    return None, withheld or _read_raw(found, folder), []


def _read_raw(files: list[Path], path: Path) -> list[_Placed]:
    """The questions of a file, or of a split's files in the folder ``path``.

    Raises:
        UserError: a record is of no known form; or files in several folders, as sets that are published together lie,
            have no subjects that say which is which.
    """
    raw = []
    for file in files:
        name = f"{path}: " if file == path else f"{path}: {file.relative_to(path)}: "
        for place, fields in read_file(file):
            raw.append((name + place, read_form(name + place, fields)))
    folders = sorted({file.parent.name for file in files})
    if len(folders) > 1 and all(question.subject is None for _, question in raw):
        raise UserError(f"{path}: holds several sets, {', '.join(folders)[:200]}: name the folder of one")
    return raw


def _parse(raw: list[_Placed]) -> list[Question]:
    has_subjects = any(question.subject is not None for _, question in raw)
    by_text = _answers_are_texts([question for _, question in raw])
    has_answers = any(question.answer is not None for _, question in raw)
    num_of_subject: Counter[str] = Counter()
    questions = []
    for place, question in raw:
        subject = question.subject if has_subjects else NO_SUBJECT
        if not isinstance(subject, str):
            raise UserError(f"{place}: has no subject")
        subject = known_subject(subject)
        text, choices = _check_texts(place, question)
        if not has_answers:
            raise UserError(f"{place}: has no answer: use the validation split")
        answer = choices.index(question.answer) if by_text else _index_of(place, question, len(choices))
        question_id = f"{subject}/{num_of_subject[subject]}"
        questions.append(Question(subject, text, choices, answer, question_id, question.own_id))
        num_of_subject[subject] += 1
    return questions


def _check_texts(place: str, question: RawQuestion) -> tuple[str, tuple[str, ...]]:
    text, choices = question.text, question.choices
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place}: has no question text")
    if not isinstance(choices, list | tuple) or not 2 <= len(choices) <= len(LETTERS):
        num_choices = len(choices) if isinstance(choices, list | tuple) else "none"
        raise UserError(f"{place}: needs 2 to {len(LETTERS)} choices, found {num_choices}")
    if not all(isinstance(c, str) for c in choices):
        raise UserError(f"{place}: its choices must be text")
    if question.labels is not None and len(question.labels) != len(choices):
        raise UserError(f"{place}: has {len(choices)} choices and {len(question.labels)} labels")
    return text, tuple(choices)


def _answers_are_texts(questions: list[RawQuestion]) -> bool:
    """Whether a set gives its answers as the right choices' texts.

    It does where each is the text of exactly one choice, and not all can be read as a label: with the choices
    ``3, 2, 1, 0`` an answer ``2`` alone may be either.
    """
    return all(
        isinstance(q.answer, str) and isinstance(q.choices, list | tuple) and q.choices.count(q.answer) == 1
        for q in questions
    ) and any(_label_index(q, len(q.choices)) is None for q in questions)


def _label_index(question: RawQuestion, num_choices: int) -> int | None:
    """The index of the right choice where the answer is a label, a letter, a number or a number's text."""
    answer = question.answer
    if question.labels is not None:
        labels = [str(label).strip() for label in question.labels]
        return labels.index(str(answer).strip()) if labels.count(str(answer).strip()) == 1 else None
    if isinstance(answer, str):
        letters, numbers = LETTERS[:num_choices], [str(i) for i in range(num_choices)]
        answer = answer.strip().upper()
        return next((names.index(answer) for names in (list(letters), numbers) if answer in names), None)
    if isinstance(answer, float) and answer.is_integer():  # a column of numbers in which one is missing
        answer = int(answer)
    is_index = isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < num_choices
    return answer if is_index else None


def _index_of(place: str, question: RawQuestion, num_choices: int) -> int:
    index = _label_index(question, num_choices)
    if index is not None:
        return index
    expected = f"0 to {num_choices - 1} or A to {LETTERS[num_choices - 1]}"
    if question.labels is not None:
        expected = f"one of its labels, {', '.join(map(str, question.labels))[:80]}"
    found = "has no answer" if question.answer is None else f"answer {str(question.answer)[:40]!r}"
    raise UserError(f"{place}: {found}; expected {expected}")


def load_dev_questions(path: Path) -> list[Question] | None:
    """The solved few-shot questions that belong to the questions of ``path``.

    They are the split ``dev``, else ``train``, else ``validation``, but for the one that is asked: of the same folder,
    or else a file or folder beside it, named alike but for the split's name. So it is ``dev`` for MMLU, ``validation``
    for MMLU-Pro, and ``train`` for most others, as in lm-evaluation-harness.

    Returns:
        None where there are none.

    Raises:
        UserError: they cannot be read, or one of them is bad.
    """
    splits: tuple[Split, ...] = ("dev", "train", "validation")
    for split in splits:
        if path.is_dir() and (files := files_of(path, split)):
            # Looked at only here, as it takes reading the test split.
            if split != "train" and read_questions(path).split == split:
                continue
            return _parse(_read_raw(files, path))
    asked = split_of(path)
    for split in splits:
        beside = paths_beside(path, split) if split != asked else []
        if beside:
            return load_questions(beside[0])
    return None


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
