"""One model, one set of questions: what every evaluation of a process shares."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from raylora.config import EvaluationConfig, ModelOptions
from raylora.errors import ErrorKind, MachineError, UserError
from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import EncodedQuestion, encode_questions, load_encoded, save_encoded
from raylora.mmlu.question_set import (
    QuestionSet,
    find_questions,
    load_question_set,
    model_key,
    questions_key,
    score_key,
)
from raylora.mmlu.scoring import answer, evaluate, load_score, save_score
from raylora.model.adapters import LoadedModel
from raylora.model.loading import context_window, load_model, load_tokenizer
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.storage.atomic import write_atomically
from raylora.storage.store import Store

T = TypeVar("T")
log = logging.getLogger("raylora")


def check_prompt_style(config: EvaluationConfig, source: str) -> None:
    """Say early that a tokenizer has no chat template.

    Raises:
        UserError: it has none, and ``chat`` needs one.
    """
    if config.prompt_style == "chat" and not load_tokenizer(source, config.trust_remote_code).chat_template:
        raise UserError(f"--prompt-style chat: {config.model} has no chat template; use --prompt-style harness")


class Evaluator:
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
            raise MachineError(str(error), kind=error.kind) from error
        if key != base_key:
            raise MachineError(
                f"{find_questions(self.config)}, or the model: not what it was when the run began: run the same "
                "command again",
                kind=ErrorKind.CHANGED_MEANWHILE,
            )
        return asked

    def _encode(self, asked: QuestionSet) -> list[EncodedQuestion]:
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return encode_questions(
            tokenizer, asked.questions, asked.shots, self.config.prompt_style, context_window(model)
        )

    def score(self, base_key: str, key: str, path: Path, progress: ProgressCallback) -> Score:
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

    def help_score(self, base_key: str, key: str, path: Path, name: str, progress: ProgressCallback) -> int:
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
            lambda _, done, total: progress(ProgressStage.HELPING_MMLU, done, total),
        )
        return len(journal.answers) - num_known

    def base_score(self, key: str, wait: bool, progress: ProgressCallback = ignore_progress) -> Score | None:
        """The base's score of this run: made once by whichever process comes first.

        Returns:
            None where another process is making it and ``wait`` is False.
        """
        path = self.store.base_file(key, "scores.parquet")
        with contextlib.suppress(TimeoutError), self.store.base_lock(key, "scores").acquire(timeout=-1 if wait else 0):
            self.store.fetch(path)
            if (score := _kept(path, lambda: load_score(path))) is None:
                with self.loaded.base():
                    self.score(key, key, path, lambda _, *counts: progress(ProgressStage.BASE_MMLU, *counts))
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
