"""Asks a model questions: for the log-likelihoods of their choices, or for a written answer.

LetterRows      a row a question, its letters' tokens behind it (``model/candidates.py``)
BranchRows      where a choice has several tokens: a row a question, and behind it its choices' texts
ChoiceRows      the same where rows cannot be packed: a row for each choice
WrittenAnswers  a text for each question, read afterwards
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raylora.config.options import ClozePer, Scoring
from raylora.data.encoding import IGNORE_INDEX, pad_token_of
from raylora.errors import ErrorKind, UserError
from raylora.mmlu.answers import max_new_tokens, parse_answer, write_answers
from raylora.mmlu.cloze import predict
from raylora.mmlu.journal import Answer
from raylora.mmlu.prompts import EncodedQuestion, Thinking
from raylora.model.adapters import LoadedModel
from raylora.model.attention import has_flash
from raylora.model.candidates import Branches, CandidatePasses, Row
from raylora.model.forward import Output, forward_rows, head_is_plain
from raylora.model.graphs import capture_of, free_what_others_need, keep_passes, kept_passes, make_room
from raylora.model.memory import TokenBudget
from raylora.model.packing import may_pack, window_of

Read = Callable[[], list[Answer]]
"""Returns a batch's answers, in its order; before that the device may still be at them."""


@dataclass(frozen=True)
class Asked:
    """A question, and who is asked."""

    question: EncodedQuestion
    adapter: str | None = None
    """The name of an attached adapter; None: the base."""


class Asker(Protocol):
    """Asks a model questions in one of the ways."""

    packed: bool
    """Whether a batch takes as many tokens as its questions have, or as if all were as long as the longest."""
    no_prefix: str
    """Why no prefix is shared; empty where prefixes may be."""

    def width(self, question: EncodedQuestion) -> int:
        """Tokens whose keys and values a question takes memory for."""

    def ready(self, longest_prefix: int = 0) -> contextlib.AbstractContextManager[None]:
        """Inside, questions can be asked.

        Args:
            longest_prefix: tokens that no shared prefix has more of.
        """

    def ask(self, batch: Sequence[Asked], prefix_length: int = 0) -> Read:
        """Ask a batch, whose prompts begin with the same ``prefix_length`` tokens.

        Raises:
            torch.OutOfMemoryError: it does not fit (MemoryError or RuntimeError on a CPU).
        """

    def make_room(self) -> bool:
        """Free what can be done without, as memory ran out; whether there was anything."""


def asker_of(
    loaded: LoadedModel,
    encoded: Sequence[EncodedQuestion],
    adapters: Sequence[str | None],
    scoring: Scoring,
    thinking: Thinking,
    cloze_per: ClozePer = "character",
) -> Asker:
    """What asks these questions.

    Args:
        adapters: who is asked: attached adapters by name, and None for the base. One alone is active in the model.

    Raises:
        UserError: several are asked, and they cannot share passes.
    """
    if scoring == "letters" and all(question.single_token for question in encoded):
        return LetterRows(loaded, encoded, adapters)
    if len(adapters) > 1:
        raise UserError("only letters of one token can be asked of several adapters at once", kind=ErrorKind.ADAPTER)
    if scoring == "generate":
        return WrittenAnswers(loaded, thinking)
    choose = functools.partial(predict, per=cloze_per if scoring == "cloze" else "choice")
    longest = max((_whole_length(question) for question in encoded), default=0)
    if may_pack(loaded, longest) and longest <= window_of(loaded.model):
        return BranchRows(loaded, encoded, adapters, choose)
    return ChoiceRows(loaded, choose)


def _whole_length(question: EncodedQuestion) -> int:
    """Tokens of the longest of a question's texts, prompt and choice."""
    return len(question) + max(map(len, question.continuations))


class LetterRows:
    """One row a question; the log-likelihoods of the letters are those of the token behind it."""

    def __init__(self, loaded: LoadedModel, encoded: Sequence[EncodedQuestion], adapters: Sequence[str | None]) -> None:
        longest = max(map(len, encoded), default=0)
        self.packed = may_pack(loaded, longest)
        self.no_prefix = ""
        if not self.packed:
            self.no_prefix = (
                "the model's rows cannot be packed: its attention sees more, or less, than their own tokens"
            )
        elif loaded.device.type == "cuda" and longest > window_of(loaded.model):
            self.no_prefix = "the model's attention has a window that is shorter than a prompt"
        self._loaded, self._adapters = loaded, [name for name in adapters if name is not None]
        replaced = self.packed and self._adapters and loaded.has_plain_adapters
        num_slots = len(adapters) if replaced else 0
        if len(adapters) > 1 and not num_slots:
            raise UserError("these adapters cannot share a pass over this model", kind=ErrorKind.ADAPTER)
        # Without flash attention a captured pass has one attention over all its tokens, with a mask: slower than to
        # launch those of each row, where passes are as long as memory allows.
        capture = capture_of(loaded) if self.packed and has_flash(loaded.device, loaded.forward_dtype) else None
        # A capture of PEFT's own forward pass has the adapter of that time in it.
        self._is_kept = capture is not None and (num_slots > 0 or not _has_active_adapters(loaded.model))
        kept = kept_passes(loaded, CandidatePasses, num_slots, 0) if self._is_kept else None
        self._passes, self._num_slots = kept or CandidatePasses(loaded, num_slots, capture), num_slots

    def width(self, question: EncodedQuestion) -> int:
        """See ``Asker``."""
        return len(question)

    @contextlib.contextmanager
    def ready(self, longest_prefix: int = 0) -> Iterator[None]:
        """See ``Asker``."""
        if self._is_kept:
            keep_passes(self._loaded, CandidatePasses, self._num_slots, 0, self._passes)
        with self._passes.ready(self._adapters, self.packed, longest_prefix):
            yield
            if self._passes.graphed.are_wanted and self._loaded.device.type == "cuda":
                free_what_others_need(self._loaded)

    def ask(self, batch: Sequence[Asked], prefix_length: int = 0) -> Read:
        """See ``Asker``."""
        prefix = batch[0].question.context_ids[:prefix_length]
        pending = self._passes.run([self._row(asked, prefix_length) for asked in batch], prefix)
        return lambda: [Answer(logprobs, int(np.argmax(logprobs))) for logprobs in pending.read()]

    def _row(self, asked: Asked, prefix_length: int) -> Row:
        question = asked.question
        candidates = [continuation[0] for continuation in question.continuations]
        return Row(question.context_ids[prefix_length:], candidates, self._passes.slot_of(asked.adapter))

    def make_room(self) -> bool:
        """See ``Asker``."""
        return make_room(self._loaded, self._passes.graphed)


def _has_active_adapters(model: Any) -> bool:
    """Whether adapters act in PEFT's own forward pass, raylora's or a caller's."""
    return any(getattr(module, "disable_adapters", True) is False for module in model.modules())


class BranchRows(LetterRows):
    """A row a question, whose keys and values its choices share: each stands behind it as a row of its own."""

    def __init__(
        self,
        loaded: LoadedModel,
        encoded: Sequence[EncodedQuestion],
        adapters: Sequence[str | None],
        choose: Callable[[EncodedQuestion, list[float]], int],
    ) -> None:
        super().__init__(loaded, encoded, adapters)
        self._choose = choose
        loaded.allows(head_is_plain)  # tried before attention is replaced

    def width(self, question: EncodedQuestion) -> int:
        """See ``Asker``."""
        return len(question) + question.num_choice_tokens

    def ask(self, batch: Sequence[Asked], prefix_length: int = 0) -> Read:
        """See ``Asker``."""
        questions = [asked.question for asked in batch]
        prefix = questions[0].context_ids[:prefix_length]
        rows = [Branches(q.context_ids[prefix_length:], q.continuations) for q in questions]
        sums = self._passes.run_branches(rows, prefix)

        def read() -> list[Answer]:
            of_all = iter(sums.read().tolist())
            return [_answer(q, list(itertools.islice(of_all, len(q.continuations))), self._choose) for q in questions]

        return read


def _answer(
    question: EncodedQuestion, logprobs: list[float], choose: Callable[[EncodedQuestion, list[float]], int]
) -> Answer:
    return Answer(logprobs, choose(question, logprobs))


class ChoiceRows:
    """A row for each choice."""

    packed = False
    no_prefix = "choices have several tokens"

    def __init__(self, loaded: LoadedModel, choose: Callable[[EncodedQuestion, list[float]], int]) -> None:
        self._loaded, self._choose = loaded, choose

    def width(self, question: EncodedQuestion) -> int:
        """See ``Asker``."""
        return len(question.continuations) * _whole_length(question)

    def ready(self, longest_prefix: int = 0) -> contextlib.AbstractContextManager[None]:
        """See ``Asker``."""
        return self._loaded.forward_autocast()

    def ask(self, batch: Sequence[Asked], prefix_length: int = 0) -> Read:
        """See ``Asker``."""
        pairs = [(asked.question.context_ids, c) for asked in batch for c in asked.question.continuations]
        rows = [context + continuation for context, continuation in pairs]
        labels = [[IGNORE_INDEX] * len(context) + continuation for context, continuation in pairs]
        packed = may_pack(self._loaded, max(map(len, rows)))
        sums = [0.0] * len(rows)

        def use(part: list[int], output: Output) -> list[float]:
            return [-float(losses.double().sum()) for losses in output.losses.split(output.num_losses)]

        # All rows in one minibatch: whoever asks has cut them to what memory holds.
        whole = TokenBudget(len(rows) * max(map(len, rows)))
        for part, found in forward_rows(self._loaded, rows, labels, whole, use, packed=packed):
            for i, logprob in zip(part, found, strict=True):
                sums[i] = logprob
        of_all = iter(sums)
        counts = [(asked.question, len(asked.question.continuations)) for asked in batch]
        answers = [_answer(q, list(itertools.islice(of_all, count)), self._choose) for q, count in counts]
        return lambda: answers

    def make_room(self) -> bool:
        """See ``Asker``."""
        return False


class WrittenAnswers:
    """Texts that the model writes."""

    packed = False
    no_prefix = "answers are written, not chosen"

    def __init__(self, loaded: LoadedModel, thinking: Thinking) -> None:
        self._loaded, self._thinking = loaded, thinking

    def width(self, question: EncodedQuestion) -> int:
        """See ``Asker``."""
        # Thoughts are as long as many prompts; ten tokens of an answer are not counted.
        return len(question) + (max_new_tokens(self._thinking) if self._thinking == "on" else 0)

    def ready(self, longest_prefix: int = 0) -> contextlib.AbstractContextManager[None]:
        """See ``Asker``."""
        return self._loaded.forward_autocast()

    def ask(self, batch: Sequence[Asked], prefix_length: int = 0) -> Read:
        """See ``Asker``."""
        loaded, questions = self._loaded, [asked.question for asked in batch]
        pad = pad_token_of(loaded.tokenizer)
        texts = write_answers(loaded.model, loaded.tokenizer, questions, pad, self._thinking)
        counts = [len(question.continuations) for question in questions]
        return lambda: [
            Answer([math.nan] * num, parse_answer(text, num), text) for num, text in zip(counts, texts, strict=True)
        ]

    def make_room(self) -> bool:
        """See ``Asker``."""
        return False
