"""One model, one set of questions: what every evaluation of a process shares."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from raylora.config import DEMO, EvaluationConfig, MmluOptions, ModelOptions
from raylora.files import location, reading
from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import EncodedQuestion, build_shots, encode_questions, load_encoded, save_encoded
from raylora.mmlu.questions import load_dev_questions, load_questions, questions_hash, select_questions
from raylora.mmlu.scoring import answer, evaluate, load_score, save_score
from raylora.model import LoadedModel, context_window, load_model, load_tokenizer
from raylora.records import SCHEMA_VERSION, MachineError, Progress, Question, Score, UserError, digest, ignore_progress
from raylora.sources import model_hash
from raylora.store import Store, write_atomically

T = TypeVar("T")
log = logging.getLogger("raylora")
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
    with reading(location(config.mmlu or "")):
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


def check_prompt_style(config: EvaluationConfig, source: str) -> None:
    """Say early that a tokenizer has no chat template.

    Raises:
        UserError: it has none, and ``chat`` needs one.
    """
    if config.prompt_style == "chat" and not load_tokenizer(source, config.trust_remote_code).chat_template:
        raise UserError(f"--prompt-style chat: {config.model} has no chat template; use --prompt-style harness")


class Examiner:
    """The base model and the encoded questions, each loaded once a process."""

    def __init__(self, config: EvaluationConfig, store: Store, loaded: LoadedModel | None = None) -> None:
        self.config = config
        self.store = store
        self._loaded = loaded
        self._encoded: dict[str, list[EncodedQuestion]] = {}

    @cached_property
    def loaded(self) -> LoadedModel:
        return self._loaded or load_model(ModelOptions(**self.config.settings_of(ModelOptions)))

    def questions(self, base_key: str) -> list[EncodedQuestion]:
        """The run's questions as token ids, made by whichever process comes first and read by all others."""
        if base_key not in self._encoded:
            asked = self._asked(base_key)
            path = self.store.base_file(base_key, "questions.parquet")
            with self.store.base_lock(base_key, "questions"):
                encoded = _kept(path, lambda: load_encoded(path, asked.questions))
                if encoded is None:
                    made = self._encode(asked)
                    write_atomically(path, lambda partial: save_encoded(made, partial))
                    encoded = load_encoded(path, asked.questions)
            self._encoded[base_key] = encoded
        return self._encoded[base_key]

    def _asked(self, base_key: str) -> QuestionSet:
        """The questions, as they were when the run was planned.

        Raises:
            MachineError: they, or the model, are something else now, or cannot be read here.
        """
        try:
            asked = load_question_set(self.config)
            key = score_key(model_key(self.config, self.loaded.source), questions_key(self.config, asked))
        except UserError as error:
            raise MachineError(str(error)) from error
        if key != base_key:
            raise MachineError(
                f"{find_questions(self.config)}, or the model: not what it was when the run began: run the same "
                "command again"
            )
        return asked

    def _encode(self, asked: QuestionSet) -> list[EncodedQuestion]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return encode_questions(
            tokenizer, asked.questions, asked.shots, self.config.prompt_style, context_window(model)
        )

    def score(self, base_key: str, key: str, path: Path, progress: Progress) -> Score:
        """Ask every question of the model as it is now, with the active adapter if there is one.

        Args:
            key: identity of the score; a half-done evaluation under the same one is gone on with.
            path: where the score is kept, as a Parquet file.
        """
        journal = Journal(_journal_folder(path), key)
        score = evaluate(
            self.loaded.model,
            self.loaded.tokenizer,
            self.questions(base_key),
            self.config.scoring,
            self.config.token_budget,
            progress=progress,
            journal=journal,
        )
        write_atomically(path, lambda partial: save_score(score, partial))
        journal.remove()
        return score

    def is_being_scored(self, key: str, path: Path) -> bool:
        """Whether there is a half-done evaluation to help with."""
        return Journal(_journal_folder(path), key, helper="looker").is_open

    def help_score(self, base_key: str, key: str, path: Path, name: str, progress: Progress) -> int:
        """Ask, for another process that is scoring the same model, questions it has not come to yet.

        Args:
            name: this process's name; no two helpers of a score have the same.

        Returns:
            The number of questions asked.
        """
        journal = Journal(_journal_folder(path), key, helper=name)
        if not journal.is_open:  # it was finished meanwhile
            return 0
        num_known = len(journal.answers)
        answer(
            self.loaded.model,
            self.loaded.tokenizer,
            self.questions(base_key),
            journal,
            self.config.scoring,
            self.config.token_budget,
            lambda _, done, total: progress("helping mmlu", done, total),
        )
        return len(journal.answers) - num_known

    def base_score(self, key: str, wait: bool, progress: Progress = ignore_progress) -> Score | None:
        """The base's score of this run: made once by whichever process comes first.

        Returns:
            None where another process is making it and ``wait`` is False.
        """
        path = self.store.base_file(key, "scores.parquet")
        with contextlib.suppress(TimeoutError), self.store.base_lock(key, "scores").acquire(timeout=-1 if wait else 0):
            self.store.fetch(path)
            if (score := _kept(path, lambda: load_score(path))) is None:
                with self.loaded.base():
                    self.score(key, key, path, lambda _, done, total: progress("base mmlu", done, total))
                self.store.share(path)
                score = load_score(path)  # another machine's, if it was the first to be done
            return score
        return _kept(path, lambda: load_score(path))


def _kept(path: Path, load: Callable[[], T]) -> T | None:
    """What a file holds; None where there is none, or it is empty or cut: it is made again."""
    if not path.is_file():
        return None
    try:
        return load()
    except (ValueError, KeyError) as error:
        log.warning("%s: cannot be read, and is made again: %s", path, " ".join(str(error).split()))
        return None


def _journal_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}.journal")
