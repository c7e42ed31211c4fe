"""Scoring of one base model and its adapters on one set of questions: both are loaded once a process."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch

from raylora.config.options import ModelOptions
from raylora.config.run import EvaluationConfig
from raylora.data.template_process import check_template
from raylora.errors import ErrorKind, MachineError, UserError, one_line
from raylora.mmlu.answers import max_new_tokens
from raylora.mmlu.journal import Journal
from raylora.mmlu.prompts import EncodedQuestion, Thinking, encode_questions, load_encoded, save_encoded, thinking_of
from raylora.mmlu.question_set import (
    QuestionSet,
    find_questions,
    load_question_set,
    model_key,
    questions_key,
    score_key,
)
from raylora.mmlu.scoring import answer, answer_together, evaluate, load_score, save_score
from raylora.model.adapter_files import is_plain_lora
from raylora.model.adapters import LoadedModel
from raylora.model.loading import context_window, load_model, tokenizer_for
from raylora.model.memory import CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.storage.atomic import write_atomically
from raylora.storage.damage import note_file
from raylora.storage.store import Store

T = TypeVar("T")
log = logging.getLogger("raylora")
MOST_TOGETHER = 8
"""Adapters that are asked in the same passes, at most: each takes memory, 250 MB for an 8B model and rank 16."""


def check_prompt_style(config: EvaluationConfig, source: str) -> Thinking:
    """Check that a tokenizer can render the prompts, before the model is loaded.

    Returns:
        How the model's thinking is dealt with.

    Raises:
        UserError: the style is ``chat``, and the tokenizer has no chat template.
    """
    if config.prompt_style != "chat":
        return ""
    tokenizer = tokenizer_for(config, source)
    if not tokenizer.chat_template:
        raise UserError(f"--prompt-style chat: {config.model} has no chat template; use --prompt-style harness")
    check_template(tokenizer, config.model)
    return thinking_of(tokenizer, config.prompt_style, config.scoring)


def note_on_thinking(thinking: Thinking) -> str:
    """What is said about a model's thinking before it is asked; empty where there is nothing to say."""
    return {
        "": "",
        "off": "the chat template does not begin a thinking part: the model answers at once (thinking: off)",
        "closed": "the chat template begins a thinking part, which the prompts end at once (thinking: closed)",
        "on": f"thoughts and answer have room for {max_new_tokens('on')} tokens (thinking: on)",
    }[thinking]


@dataclass(frozen=True)
class Unscored:
    """A score that is to be made."""

    key: str
    """Its identity, as of ``Evaluator.score``."""
    path: Path
    """Its Parquet file."""
    adapter: Path | None
    """A PEFT folder; None: it is the base's score."""


class Evaluator:
    """Scores models of one base; the base model and the encoded questions are loaded at their first use.

    Args:
        loaded: the base model, if it is loaded already.
    """

    def __init__(self, config: EvaluationConfig, store: Store, loaded: LoadedModel | None = None) -> None:
        self.config = config
        self.store = store
        self._loaded = loaded
        self._question_sets: dict[str, QuestionSet] = {}  # by base_key, as the next
        self._encoded: dict[str, list[EncodedQuestion]] = {}

    @cached_property
    def loaded(self) -> LoadedModel:
        return self._loaded or load_model(ModelOptions(**self.config.settings_of(ModelOptions)))

    @cached_property
    def thinking(self) -> Thinking:
        """How the model's thinking is dealt with."""
        return thinking_of(self.loaded.tokenizer, self.config.prompt_style, self.config.scoring)

    @contextlib.contextmanager
    def adapter(self, folder: Path) -> Iterator[None]:
        """Inside, the adapter in a PEFT folder is attached to the model. Should it change the base, that is let go of.

        Raises:
            UserError: it is no adapter of this model, or of a kind that cannot be asked.
        """
        before = self.loaded.base_hash()
        try:
            self.loaded.attach_saved(folder)
            yield
        finally:
            self.loaded.detach()
            if self.loaded.base_hash() != before:
                log.warning("%s: has changed the base model, which is loaded again", folder)
                self._load_again()

    def _load_again(self) -> None:
        """Let go of the model: it is loaded again at its next use."""
        self._loaded = None
        self.__dict__.pop("loaded", None)
        gc.collect()  # the model and its LoadedModel refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def questions(self, base_key: str) -> list[EncodedQuestion]:
        """The run's questions as token ids: the first process to ask for them encodes them, the others read its file.

        Raises:
            MachineError: the questions or the model are not those of ``base_key``, or cannot be read on this machine.
        """
        if base_key not in self._encoded:
            question_set = self.planned_questions(base_key)
            path = self.store.base_file(base_key, "questions.parquet")
            with self.store.base_lock(base_key, "questions"):
                encoded = _load_if_whole(path, lambda: load_encoded(path, question_set.questions))
                if encoded is None:
                    new = self._encode(question_set)
                    write_atomically(path, lambda partial: save_encoded(new, partial))
                    encoded = load_encoded(path, question_set.questions)
            self._encoded[base_key] = encoded
        return self._encoded[base_key]

    def planned_questions(self, base_key: str) -> QuestionSet:
        """A set of questions, checked to be one (and the model to be the one) that the run was planned with.

        Raises:
            MachineError: they are not, or cannot be read on this machine.
        """
        if base_key not in self._question_sets:
            try:
                of_model = model_key(self.config, self.loaded.source)
                for name in self.config.question_sets:
                    found = load_question_set(self.config, name)
                    key = score_key(of_model, questions_key(self.config, found, self.thinking))
                    self._question_sets[key] = found
            except UserError as error:
                raise MachineError(str(error), kind=error.kind) from error
        if base_key not in self._question_sets:
            files = ", ".join(str(find_questions(self.config, name)) for name in self.config.question_sets)
            raise MachineError(
                f"{files}, or the model: not what it was when the run began: run the same command again",
                kind=ErrorKind.CHANGED_MEANWHILE,
            )
        return self._question_sets[base_key]

    def _encode(self, question_set: QuestionSet) -> list[EncodedQuestion]:
        return encode_questions(
            self.loaded.tokenizer,
            question_set.questions,
            question_set.shots,
            self.config.prompt_style,
            context_window(self.loaded.model),
            self.thinking,
            self.config.scoring,
        )

    def score(self, base_key: str, key: str, path: Path, progress: ProgressCallback) -> Score:
        """Ask the model every question, with the active adapter if there is one, and write the score to ``path``.

        Args:
            base_key: identity of the base's score, which stands for the questions and the base model.
            key: identity of this score; a killed evaluation with the same key is continued.
            path: the score's Parquet file; its journal is a folder beside it until then.

        Raises:
            MachineError: see ``questions``.
            BaseChangedError: see ``check_base``. The score is not stored.
            torch.OutOfMemoryError: a single question does not fit.
        """
        if (saved := self._saved_score(key, path)) is not None:
            return saved
        journal = Journal(_journal_folder(path), key)
        score = evaluate(
            self.loaded,
            self.questions(base_key),
            self.config.scoring,
            self.config.token_budget,
            progress=progress,
            journal=journal,
            thinking=self.thinking,
            cloze_per=self.config.cloze_per,
        )
        self.check_base()
        score.info["key"] = key
        write_atomically(path, lambda partial: save_score(score, partial))
        journal.remove()
        return score

    def check_base(self) -> None:
        """Called before a score is stored; a subclass raises where the base model was changed."""

    def _saved_score(self, key: str, path: Path) -> Score | None:
        """A score that is there already: a run that was killed had several sets to ask. None: it is another one's."""
        score = _load_if_whole(path, lambda: load_score(path))
        return score if score is not None and score.info.get("key") == key else None

    def answer_together(self, base_key: str, unscored: Sequence[Unscored]) -> int:
        """Ask the base and adapters of it in passes that they share, where the questions of one would not fill a pass.

        The answers are kept in their journals: ``score`` and ``base_score`` then find them there. Adapters that are
        more than LoRA are left out, and all are where they cannot share passes: ``score`` asks them one by one.

        Returns:
            How many were asked.

        Raises:
            MachineError: see ``questions``.
        """
        encoded = self.questions(base_key)
        wanted = [one for one in unscored if one.adapter is None or is_plain_lora(one.adapter)]
        wanted = wanted[: self._most_together(encoded)]
        if len(wanted) < 2 or self.config.scoring != "letters":
            return 0
        before = self.loaded.base_hash()
        names: dict[str | None, Unscored] = {}
        try:
            for number, one in enumerate(wanted):
                name = None if one.adapter is None else f"asked_{number}"
                # One that is no adapter of this model is said to be none where it is asked by itself.
                with contextlib.suppress(UserError):
                    if one.adapter is not None:
                        self.loaded.attach_saved(one.adapter, str(name))
                    names[name] = one
            answers, cut = answer_together(self.loaded, encoded, list(names), self.config.token_budget)
        except (UserError, RuntimeError, MemoryError) as error:  # where it is one adapter's, it will be said again
            log.info("adapters are asked one by one: %s", one_line(error))
            return 0
        finally:
            for name in names:
                if name is not None:
                    self.loaded.detach(name)
        if self.loaded.base_hash() != before:
            log.warning("adapters that were asked together have changed the base model, which is loaded again")
            self._load_again()
            return 0
        for name, one in names.items():
            journal = Journal(_journal_folder(one.path), one.key)
            journal.open(cut, cut)
            journal.add(answers[name])
        return len(names)

    def _most_together(self, encoded: Sequence[EncodedQuestion]) -> int:
        """How many adapters' questions fill a pass; 1 where those of one do."""
        budget = GPU_TOKEN_BUDGET if self.loaded.device.type == "cuda" else CPU_TOKEN_BUDGET
        num_tokens = sum(map(len, encoded))
        return min(MOST_TOGETHER, -(-(self.config.token_budget or budget) // max(1, num_tokens)))

    def is_being_scored(self, key: str, path: Path) -> bool:
        """Whether the evaluation of ``key`` has begun and is not finished: there is something to help with."""
        return Journal(_journal_folder(path), key, helper="looker").is_open

    def help_score(self, base_key: str, key: str, path: Path, name: str, progress: ProgressCallback) -> int:
        """Ask questions that another process, which is scoring the same model, has not begun yet.

        Args:
            name: this process's name; no two helpers of a score may have the same.

        Returns:
            The number of questions asked; 0 if the evaluation is finished.

        Raises:
            MachineError: see ``questions``.
        """
        journal = Journal(_journal_folder(path), key, helper=name)
        if not journal.is_open:  # it was finished meanwhile
            return 0
        num_before = len(journal.answers)
        answer(
            self.loaded,
            self.questions(base_key),
            journal,
            self.config.scoring,
            self.config.token_budget,
            lambda _, done, total: progress(ProgressStage.HELPING_MMLU, done, total),
            self.thinking,
            self.config.cloze_per,
        )
        return len(journal.answers) - num_before

    def base_score(self, key: str, wait: bool, progress: ProgressCallback = ignore_progress) -> Score | None:
        """The base model's score, computed once a run: by the first process to ask for it, under a lock.

        Returns:
            None if another process is computing it and ``wait`` is False.

        Raises:
            MachineError: see ``questions``.
        """
        path = self.store.base_file(key, "scores.parquet")
        with contextlib.suppress(TimeoutError), self.store.base_lock(key, "scores").acquire(timeout=-1 if wait else 0):
            self.store.fetch(path)
            if (score := _load_if_whole(path, lambda: load_score(path))) is None:
                with self.loaded.base():
                    self.score(key, key, path, lambda _, *counts: progress(ProgressStage.BASE_MMLU, *counts))
                self.store.share(path)
                score = load_score(path)  # ``share`` has put another machine's in its place, if that was there first
            return score
        return _load_if_whole(path, lambda: load_score(path))


def _load_if_whole(path: Path, load: Callable[[], T]) -> T | None:
    """What a file holds; None if there is no file, or it is damaged, so that it has to be made again."""
    if not path.is_file():
        return None
    try:
        return load()
    except (OSError, ValueError, KeyError):  # of damaged pages pyarrow raises an OSError
        note_file(path)
        return None


def _journal_folder(path: Path) -> Path:
    return path.with_name(f"{path.stem}.journal")
