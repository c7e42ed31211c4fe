"""The records that modules exchange. They are frozen, hold plain values, and can be pickled for other processes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

SCHEMA_VERSION = 6
"""Part of every experiment's identity. Raise it when products that older versions stored must not be reused."""


class ProgressStage(StrEnum):
    """What a process is doing for an experiment, as the live table and the metrics call it."""

    LOAD = "load"
    FEATURES = "features"
    PROBE = "probe"
    TRAIN = "train"
    BASE_MMLU = "base mmlu"
    MMLU = "mmlu"
    HELPING_MMLU = "helping mmlu"
    TRANSFER = "transfer"

    @property
    def can_share(self) -> bool:
        """Whether idle workers can help: ask some of its MMLU questions."""
        return self in {ProgressStage.BASE_MMLU, ProgressStage.MMLU}


ProgressCallback = Callable[[ProgressStage, int, int], None]
"""Called as ``progress(stage, done, total)`` while an experiment runs."""


def ignore_progress(stage: ProgressStage, done: int, total: int) -> None:
    """A ``ProgressCallback`` that does nothing."""


def digest(value: Any, length: int = 64) -> str:
    """SHA-256, in hex, of a JSON value with sorted keys: the same in every process and on every machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:length]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation. ``role`` is ``system``, ``user``, ``assistant`` or ``tool``, what a tool returned."""

    role: str
    content: str
    extra: str = ""
    """What else the chat template is told of the turn (``tool_calls``, ``name``, ``tool_call_id``): a JSON object as
    text; empty where there is nothing."""
    is_trained: bool = True
    """False where the record says that nothing is to be learned from the turn (``weight: 0``, ``train: false``)."""

    @property
    def values(self) -> tuple[str | bool, ...]:
        """All of it as JSON values, (role, content) of a plain turn: digests of older versions are of these."""
        is_plain = self.is_trained and not self.extra
        return (self.role, self.content) if is_plain else (self.role, self.content, self.extra, self.is_trained)


@dataclass(frozen=True)
class Example:
    """A training pair: the conversation so far, and the answer that the model should give.

    A conversation with several assistant turns makes one Example of each that is to be learned.
    """

    messages: tuple[Message, ...]
    """The conversation up to the answer. Empty where the record is a plain text: all of it is the answer then."""
    answer: str
    question: str
    """The question without its context; the last user message if there is no context."""
    context: str = ""
    """The passage that the answer should rest on, which is in ``messages`` too; empty if there is none. Where tools
    were called just before the answer, what they returned."""
    conversation: str = ""
    """Identity by content of the conversation whose turns gave several Examples; empty where this is its only one."""
    num_repeated: int = 0
    """How many of ``messages``, from the front, an earlier Example of the conversation ends with or holds as well."""
    tools: str = ""
    """The tools that the model may call, for the chat template: a JSON list as text; empty where there are none."""

    @property
    def asked(self) -> str:
        """The last user turn, context and question; empty where there is none."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")

    @cached_property
    def digest(self) -> str:
        """Identity by content, so that order and place in the file do not matter."""
        # With the conversation, as two that begin alike, and differ later, have equal first examples.
        rest: list[Any] = [self.conversation] if self.conversation else []
        rest += [[self.tools]] if self.tools else []
        return digest([[m.values for m in self.messages], self.answer, *rest])


def digests_of(examples: Sequence[Example]) -> np.ndarray:
    """The examples' digests as bytes, (N, 32), uint8. Sequences on disk keep them in memory: no example is read."""
    stored: np.ndarray | None = getattr(examples, "digests", None)
    if stored is not None:
        return stored
    return np.frombuffer(b"".join(bytes.fromhex(e.digest) for e in examples), dtype=np.uint8).reshape(-1, 32)


@dataclass(frozen=True)
class BadRecord:
    """A record that was left out: ``place`` is where in the file (``record 7``, ``line 12``), ``reason`` why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Dataset:
    """What a dataset file holds, in the file's order."""

    path: str
    examples: Sequence[Example] = field(repr=False)
    """A tuple, or a sequence on disk that reads an example whenever it is used."""
    num_items: int
    """Records in the file, good and bad."""
    total_chars: int
    """Characters over all string fields of all records."""
    bad_records: tuple[BadRecord, ...] = ()
    """The first of them; ``num_bad_records`` counts all."""
    num_bad_records: int = 0
    num_lost_records: int = 0
    """Records that ``--salvage`` lost, after the place where the file breaks off; -1 if their number is unknown."""
    data_hash: str = ""
    """SHA-256 of the file's bytes in hex; empty if the examples are not from a file."""
    record_form: str = ""
    """The forms of its records, such as ``question/answer``; with how many records each has, if there are several."""
    ignored_keys: str = ""
    """The keys of records and turns that no form uses, with commas between them."""
    num_answers_cut: int = 0
    """Answers of which the chat template leaves a part out; known once the dataset was held against it."""
    template_note: str = ""
    """What else the chat template does to the examples; empty where there is nothing to say."""

    @cached_property
    def seed(self) -> int:
        """A seed of 60 bits from the examples' content; their order does not change it."""
        digests = sorted(row.tobytes().hex() for row in digests_of(self.examples))
        return int(digest(digests, 15), 16)


@dataclass(frozen=True)
class Question:
    """One multiple-choice question. ``answer`` is the index of the right choice."""

    subject: str
    question: str
    choices: tuple[str, ...]
    """2 to 10."""
    answer: int
    question_id: str
    """``{subject}/{number within the subject in the file}``."""
    own_id: str = ""
    """What its file calls it; empty where it has no name there, as in MMLU."""


@dataclass(frozen=True)
class Score:
    """The result of one evaluation of one model on a set of questions.

    ``questions`` has a row for each question: ``subject, question_id, question, answer, prediction`` (letters,
    prediction empty where unparsed), ``logprob_a`` to ``logprob_d``, or to that of the last choice of a question with
    more (natural logarithms; NaN for ``generate`` and where a question has no such choice), ``correct`` (bool).
    """

    questions: pd.DataFrame
    info: dict[str, Any] = field(default_factory=dict)
    """How it was scored: method, prompt style, shots, seconds, token budget, num_truncated, num_unparsed."""

    def without(self, question_ids: Collection[str]) -> Score:
        """The score on all other questions."""
        return Score(self.questions[~self.questions["question_id"].isin(list(question_ids))], self.info)

    @property
    def total_questions(self) -> int:
        return len(self.questions)

    @property
    def correct_questions(self) -> int:
        return int(self.questions["correct"].sum())

    @property
    def overall_accuracy(self) -> float:
        """The share of correct answers, 0 to 1, over all questions: large subjects count for more."""
        return self.correct_questions / max(self.total_questions, 1)


@dataclass(frozen=True)
class Experiment:
    """One dataset file trained with one set of hyperparameters."""

    experiment_id: str
    """A folder name that is safe on every file system and unique within the run."""
    dataset: str
    """The dataset's name: its file name without the ending, or ``org--name`` of one on the hub."""
    path: str
    """Of its file or folder; of a dataset on the hub ``dataset_source``."""
    settings: dict[str, Any]
    """The hyperparameters of this experiment (the configuration with the grid's values put in)."""
    identity: str
    """Hash of everything that its row depends on: data, model, settings, questions and schema version."""
    origins: dict[str, dict[str, str]]
    """By stage (``features``, ``train``, ``mmlu``, ``transfer``), hashes of what its result depends on."""
    base_key: str
    """Hash of everything that the base model's score on the run's questions depends on."""
    set_keys: dict[str, str] = field(default_factory=dict)
    """The same for each further set of questions, by its name."""
    transfer_key: str = ""
    """Hash of the datasets on whose held-out examples the adapter is scored; empty where it is not."""
    data_hash: str = ""
    """As ``Dataset.data_hash``."""
    num_examples: int = 0
    num_tokens: int = 0
    """Tokens of all examples, estimated from the first ones."""
    estimated_peak_memory_bytes: int | None = None
    estimated_seconds: float | None = None
    """Seconds of all its stages on one worker. Both estimates are None where they cannot be made."""
    num_adapted_modules: int | None = None
    """Layers, and parameters of fused experts, that get an adapter; None where they are not known before it is run."""
    modules_without_adapter: str | None = None
    """Names of linear layers and of fused experts that get none, but for the output head, with commas between."""
    error: str = ""
    """Why it cannot run, if that is known before anything starts. It still gets a row."""
    error_kind: str = ""
    """An ``ErrorKind``; empty where there is no error."""
    record_form: str = ""
    """As ``Dataset.record_form``; ``ignored_keys`` as well."""
    ignored_keys: str = ""
    template_note: str = ""
    """What the chat template does to the dataset's first examples; empty where there is nothing to say."""
    dataset_source: str = ""
    """Of a dataset on the hub, its name with the commit that is used; empty for files."""

    @property
    def is_missing(self) -> bool:
        """Whether it is of a dataset on the hub that the hub does not give."""
        return bool(self.error) and self.path.startswith("hf://") and not self.dataset_source

    @property
    def base_keys(self) -> dict[str, str]:
        """The keys of all sets of questions by name; the first one's name is empty."""
        return {"": self.base_key, **self.set_keys}


@dataclass(frozen=True)
class ResultRow:
    """The row of one experiment: ``values`` by column name; None in columns that the run did not measure."""

    values: dict[str, Any]

    @property
    def ok(self) -> bool:
        return self.values.get("status") == "ok"
