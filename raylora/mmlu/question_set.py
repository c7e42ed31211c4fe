"""The questions of a run, and the keys by which scores are stored and found again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora.config.options import DEMO, MASKED, MmluOptions, ModelOptions
from raylora.config.run import EvaluationConfig
from raylora.errors import ErrorKind, UserError, errors_are
from raylora.mmlu.mask import find_masked
from raylora.mmlu.prompts import Thinking, build_shots
from raylora.mmlu.questions import load_dev_questions, questions_hash, read_questions, select_questions
from raylora.model.sources import model_hash
from raylora.records import SCHEMA_VERSION, Question, digest
from raylora.storage.places import location, reading

DEMO_QUESTIONS = Path(__file__).parents[1] / "demo" / "questions.json"
DEFAULT_QUESTIONS = Path("mmlu_dataset/test_all_subjects.json")
RENDERING = ("template_date", "allow_special_tokens")
"""Options of a tokenizer's text. They are part of what a result was made from where they are not the defaults."""


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a run, with what is shown before them."""

    questions: list[Question]
    shots: dict[str, list[Question]]
    """Few-shot examples: the solved questions shown before each question, by subject; empty for 0-shot."""
    notes: list[str]
    """Warnings about the file, for the user."""
    masked: frozenset[str] = frozenset()
    """Ids of the questions that ``--mask`` leaves out of the second numbers. They are asked all the same."""

    @property
    def num_shots(self) -> int:
        """How many solved questions are shown before each."""
        return max(map(len, self.shots.values()), default=0)

    @property
    def hash(self) -> str:
        """Identity of questions and shots by content."""
        return questions_hash([*self.questions, *(q for group in self.shots.values() for q in group)])


def find_questions(config: EvaluationConfig, name: str = "") -> Path:
    """The absolute path of the file or folder of a question set.

    Raises:
        UserError: there is no such path.
    """
    file = config.question_sets[name]
    if file == DEMO:
        return DEMO_QUESTIONS
    path = location(file).expanduser() if file else DEFAULT_QUESTIONS
    if not path.exists():
        if name:
            raise UserError(f"--questions {name}={path}: there is no such file or folder")
        ways = "`raylora questions mmlu` gets them; or --mmlu FILE, --mmlu demo"
        raise UserError(f"MMLU questions: {path} is missing: {ways}")
    return path.absolute()


def load_question_set(config: EvaluationConfig, name: str = "") -> QuestionSet:
    """Questions and shots of a set, as the configuration asks for them.

    Args:
        name: of a set in ``config.question_sets``; the first one's is empty. Where a further set has no solved
            questions, it is asked 0-shot, and a note says so.

    Raises:
        UserError: a file is missing or bad, or a subject has too few solved questions.
    """
    with errors_are(ErrorKind.QUESTIONS), reading(location(config.question_sets[name] or "")):
        return _load_question_set(config, name)


def _load_question_set(config: EvaluationConfig, name: str) -> QuestionSet:
    path = find_questions(config, name)
    all_questions, _, notes = read_questions(path)
    notes = [*notes, *_note_duplicates(path, all_questions)]
    questions = select_questions(all_questions, config.max_samples, config.question_seed)
    masked: frozenset[str] = frozenset()
    if config.mask and not name:
        masked = find_masked(config.mask, all_questions).intersection(q.question_id for q in questions)
        if len(masked) == len(questions):
            raise UserError(f"--mask {config.mask}: it leaves out all questions that are asked")
        of_all = f"{len(masked)} of {len(questions)} questions"
        notes.append(f"--mask {config.mask}: {of_all} are left out in columns named [{MASKED}]")
    shots, more_notes = _load_shots(config, name, path, questions)
    return QuestionSet(questions, shots, [*notes, *more_notes], masked)


def _load_shots(
    config: EvaluationConfig, name: str, path: Path, questions: list[Question]
) -> tuple[dict[str, list[Question]], list[str]]:
    """The few-shot examples of a set, by subject, and notes."""
    if config.num_fewshot == 0:
        return {}, []
    dev = load_dev_questions(path)
    if dev is None:
        missing = f"--num-fewshot {config.num_fewshot}: no solved questions beside {path} (dev, train or validation)"
        if not name:
            raise UserError(missing)
        return {}, [f"{missing}: {name} is asked 0-shot"]
    return build_shots(dev, sorted({q.subject for q in questions}), config.num_fewshot), []


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
    # On which devices the weights are, and in what files.
    for changes_no_score in ("max_memory", "gpus_per_worker", "allow_pickle"):
        options.pop(changes_no_score)
    for name in RENDERING:
        if getattr(config, name) == ModelOptions.model_fields[name].default:  # earlier results keep their hash
            options.pop(name)
    return {**options, "model": model_hash(source, config.trust_remote_code), "schema": SCHEMA_VERSION}


def questions_key(config: EvaluationConfig, question_set: QuestionSet, thinking: Thinking = "") -> dict[str, Any]:
    """Everything about the questions, and how they are asked, that changes a score."""
    options = config.settings_of(MmluOptions)
    # How questions are batched is no part of it. It moves log-likelihoods by float noise, and by more with LLM.int8
    # (benchmarks/NOTES.md): hence the token budget stands in every row.
    options.pop("token_budget")
    for which in ("question_seed", "questions", "mask"):  # those that are asked are in the set's hash
        options.pop(which)
    return {**options, "mmlu": question_set.hash, **({"thinking": thinking} if thinking else {})}


def score_key(of_model: dict[str, Any], of_questions: dict[str, Any], *adapter: str) -> str:
    """Identity of a score, 64 hex digits: model, questions, how they are asked, and the adapter's hash if there is one.

    Args:
        of_model: from ``model_key``.
        of_questions: from ``questions_key``.
    """
    return digest([of_model, of_questions, *adapter])
