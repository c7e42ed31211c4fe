"""The questions of a run, and the keys by which scores are stored and found again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.config import DEMO, EvaluationConfig, MmluOptions, ModelOptions
from raylora.errors import ErrorKind, UserError, errors_are
from raylora.mmlu.prompts import Thinking, build_shots
from raylora.mmlu.questions import load_dev_questions, load_questions, questions_hash, select_questions
from raylora.model.sources import model_hash
from raylora.records import SCHEMA_VERSION, Question, digest
from raylora.storage.places import location, reading

DEMO_QUESTIONS = Path(__file__).parents[1] / "demo" / "questions.json"
DEFAULT_QUESTIONS = Path("mmlu_dataset/test_all_subjects.json")


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a run, with what is shown before them."""

    questions: list[Question]
    shots: dict[str, list[Question]]
    """Few-shot examples: the solved questions shown before each question, by subject; empty for 0-shot."""
    notes: list[str]
    """Warnings about the file, for the user."""

    @property
    def hash(self) -> str:
        """Identity of questions and shots by content."""
        return questions_hash([*self.questions, *(q for group in self.shots.values() for q in group)])


def find_questions(config: EvaluationConfig) -> Path:
    """The absolute path of the questions' file or folder.

    Raises:
        UserError: there is no such path.
    """
    if config.mmlu == DEMO:
        return DEMO_QUESTIONS
    path = location(config.mmlu).expanduser() if config.mmlu else DEFAULT_QUESTIONS
    if not path.exists():
        ways = "`raylora questions mmlu` gets them; or --mmlu FILE, --mmlu demo"
        raise UserError(f"MMLU questions: {path} is missing: {ways}")
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
    all_questions = load_questions(path)
    notes = _note_duplicates(path, all_questions)
    questions = select_questions(all_questions, config.max_samples, config.question_seed)
    if config.num_fewshot == 0:
        return QuestionSet(questions, {}, notes)
    dev = load_dev_questions(path)
    if dev is None:
        raise UserError(f"--num-fewshot {config.num_fewshot}: no dev questions beside {path} (dev_all_subjects.json)")
    subjects = sorted({q.subject for q in questions})
    return QuestionSet(questions, build_shots(dev, subjects, config.num_fewshot), notes)


def _note_duplicates(path: Path, questions: list[Question]) -> list[str]:
    """A warning where questions are repeated. All count, as in lm-evaluation-harness: MMLU itself has 27 twice."""
    counts = Counter((q.subject, q.question, q.choices) for q in questions)
    repeated = [key for key, count in counts.items() if count > 1]
    if not repeated:
        return []
    num_extra = sum(counts[key] - 1 for key in repeated)
    subject, text, _ = repeated[0]
    return [f"{path}: {num_extra} questions stand there again, the first of {subject}: {' '.join(text.split())[:60]!r}"]


def model_key(config: EvaluationConfig, source: str) -> dict[str, Any]:
    """Everything about the base model that changes a score: its content, not its path, as folders are moved or changed.

    Raises:
        UserError: there is no such model.
    """
    options = config.settings_of(ModelOptions)
    for changes_no_score in ("max_memory", "allow_pickle"):  # on which devices the weights are, and in what files
        options.pop(changes_no_score)
    return {**options, "model": model_hash(source, config.trust_remote_code), "schema": SCHEMA_VERSION}


def questions_key(config: EvaluationConfig, question_set: QuestionSet, thinking: Thinking = "") -> dict[str, Any]:
    """Everything about the questions, and how they are asked, that changes a score."""
    options = config.settings_of(MmluOptions)
    # How questions are batched is no part of it. It moves log-likelihoods by float noise, and by more with LLM.int8
    # (benchmarks/NOTES.md): hence the token budget stands in every row.
    options.pop("token_budget")
    options.pop("question_seed")  # which questions it draws is in the set's hash
    return {**options, "mmlu": question_set.hash, **({"thinking": thinking} if thinking else {})}


def score_key(of_model: dict[str, Any], of_questions: dict[str, Any], *adapter: str) -> str:
    """Identity of a score, 64 hex digits: model, questions, how they are asked, and the adapter's hash if there is one.

    Args:
        of_model: from ``model_key``.
        of_questions: from ``questions_key``.
    """
    return digest([of_model, of_questions, *adapter])
