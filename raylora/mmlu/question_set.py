"""The questions of a run, and the identity of a score."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.config import DEMO, EvaluationConfig, MmluOptions, ModelOptions
from raylora.errors import ErrorKind, UserError, errors_are
from raylora.mmlu.prompts import build_shots
from raylora.mmlu.questions import load_dev_questions, load_questions, questions_hash, select_questions
from raylora.model.sources import model_hash
from raylora.records import SCHEMA_VERSION, Question, digest
from raylora.storage.places import location, reading

DEMO_QUESTIONS = Path(__file__).parents[1] / "demo" / "questions.json"
DEFAULT_QUESTIONS = Path("mmlu_dataset/test_all_subjects.json")


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a run, and the solved ones shown before them, by subject."""

    questions: list[Question]
    shots: dict[str, list[Question]]
    notes: list[str]
    """What is odd about the file, and no reason to stop."""

    @property
    def hash(self) -> str:
        return questions_hash([*self.questions, *(q for group in self.shots.values() for q in group)])


def find_questions(config: EvaluationConfig) -> Path:
    """The questions' file or folder.

    Raises:
        UserError: it is not there.
    """
    if config.mmlu == DEMO:
        return DEMO_QUESTIONS
    path = location(config.mmlu).expanduser() if config.mmlu else DEFAULT_QUESTIONS
    if not path.exists():
        raise UserError(f"MMLU questions: {path} is missing: give --mmlu FILE, or try --mmlu demo")
    return path.absolute()


def load_question_set(config: EvaluationConfig) -> QuestionSet:
    """Questions and shots as the configuration asks for them.

    Raises:
        UserError: the file is missing or bad, or a subject has too few solved questions.
    """
    with errors_are(ErrorKind.QUESTIONS), reading(location(config.mmlu or "")):
        return _load_question_set(config)


def _load_question_set(config: EvaluationConfig) -> QuestionSet:
    path = find_questions(config)
    everything = load_questions(path)
    notes = _duplicates(path, everything)
    questions = select_questions(everything, config.max_samples, config.seed)
    if config.num_fewshot == 0:
        return QuestionSet(questions, {}, notes)
    dev = load_dev_questions(path)
    if dev is None:
        raise UserError(f"--num-fewshot {config.num_fewshot}: no dev questions beside {path} (dev_all_subjects.json)")
    subjects = sorted({q.subject for q in questions})
    return QuestionSet(questions, build_shots(dev, subjects, config.num_fewshot), notes)


def _duplicates(path: Path, questions: list[Question]) -> list[str]:
    """MMLU itself has 27 questions twice: they count as often as they stand there, as in the reference."""
    counts = Counter((q.subject, q.question, q.choices) for q in questions)
    repeated = [key for key, count in counts.items() if count > 1]
    if not repeated:
        return []
    num_more = sum(counts[key] - 1 for key in repeated)
    subject, text, _ = repeated[0]
    return [f"{path}: {num_more} questions stand there again, the first of {subject}: {' '.join(text.split())[:60]!r}"]


def model_key(config: EvaluationConfig, source: str) -> dict[str, Any]:
    """Everything about the base model that moves a result. Not its name: a folder may be moved, or its content change.

    Raises:
        UserError: there is no such model.
    """
    options = config.settings_of(ModelOptions)
    for no_part_of_it in ("max_memory", "allow_pickle"):  # where the weights lie, and in what files
        options.pop(no_part_of_it)
    return {**options, "model": model_hash(source, config.trust_remote_code), "schema": SCHEMA_VERSION}


def questions_key(config: EvaluationConfig, asked: QuestionSet) -> dict[str, Any]:
    """Everything about the questions that moves a result."""
    options = config.settings_of(MmluOptions)
    options.pop("token_budget")  # where batches are cut is no part of what is asked
    return {**options, "mmlu": asked.hash}


def score_key(of_model: dict[str, Any], of_questions: dict[str, Any], *adapter: str) -> str:
    """Identity of a score: model, questions, how they are asked, and the adapter's hash if there is one."""
    return digest([of_model, of_questions, *adapter])
