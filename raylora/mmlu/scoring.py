"""Asking a model every question, in batches filled to a token budget.

Questions of a subject that begin with the same tokens (its description and solved questions) are asked together, behind
the keys and values of those tokens. All others are asked together, longest first: memory runs out at once or never.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raylora.data.encoding import pad_token_of
from raylora.mmlu.answers import parse_answer, write_answers
from raylora.mmlu.choices import SharedPrefix, choice_logprobs, why_no_prefix
from raylora.mmlu.journal import Answer, Journal
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.questions import LETTERS
from raylora.model.memory import is_out_of_memory
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.work_counts import work_counts

log = logging.getLogger("raylora.mmlu")

CPU_QUESTION_TOKENS = 512
"""Padded tokens in a batch on a CPU: larger ones are slower, as they leave its caches (benchmarks/NOTES.md)."""
MAX_GPU_TOKEN_BUDGET = 16384
SCORING_MEMORY_SHARE = 0.8
"""Of the free GPU memory, what a batch may take."""
MIN_TOKENS_SPARED = 64
"""A prefix must spare this many tokens and half a batch: so much is lost by a pass of its own and torn batches."""
_INFO_KEY = b"raylora"


@dataclass(frozen=True)
class _Part:
    """Questions, by index and longest first, that begin with the same ``prefix_length`` tokens."""

    indices: list[int]
    prefix_length: int = 0


@dataclass
class _Budget:
    """Padded tokens in a batch: what was asked for, until memory said no."""

    tokens: int
    num_backoffs: int = 0

    def halve(self, held: int) -> None:
        """Half of what the failed batch held, which may be far less than the budget allowed."""
        self.tokens = max(1, min(self.tokens, held) // 2)
        self.num_backoffs += 1
        work_counts.oom_backoffs += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def evaluate(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    scoring: Literal["logits", "generate"] = "logits",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
    journal: Journal | None = None,
) -> Score:
    """Ask ``model``, as it is now, every question.

    Args:
        token_budget: padded tokens in a batch; None: 512 on a CPU, what the free memory holds on a GPU.
        journal: where answers are kept as they come; what it knows already is not asked again. It is the caller's to
            remove.

    Returns:
        The answers in the order of ``encoded``; ``info`` says how they came about.

    Raises:
        torch.OutOfMemoryError: a single question does not fit.
    """
    done = journal or Journal(None, "")
    started, num_resumed = time.perf_counter(), len(done.answers)
    asked = answer(model, tokenizer, encoded, done, scoring, token_budget, progress)
    seconds = time.perf_counter() - started
    rows = [_row(encoded[i], done.answers[i], written=scoring == "generate") for i in range(len(encoded))]
    shared = [part for part in asked.parts if part.prefix_length]
    info = {
        "scoring": scoring,
        "mmlu_seconds": seconds,
        "questions_per_second": (len(rows) - num_resumed) / seconds,
        "num_resumed": num_resumed,
        "num_tokens": sum(len(e) for e in encoded),
        "num_tokens_spared": sum(p.prefix_length * (len(p.indices) - 1) for p in shared),
        "num_shared_prefixes": len(shared),
        "no_prefix_because": asked.no_prefix,
        "token_budget": asked.budget.tokens,
        "num_oom_backoffs": asked.budget.num_backoffs,
        "num_truncated": sum(e.num_truncated > 0 for e in encoded),
        "num_unparsed": sum(not row["prediction"] for row in rows),
    }
    return Score(pd.DataFrame(rows), info)


@dataclass(frozen=True)
class _Asked:
    """How questions were asked."""

    parts: list[_Part]
    budget: _Budget
    no_prefix: str


def answer(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    journal: Journal,
    scoring: Literal["logits", "generate"] = "logits",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
) -> _Asked:
    """Ask what the journal does not know yet: its owner until it knows everything, a helper while batches are free."""
    pad = pad_token_of(tokenizer)
    with _for_inference(model):
        cut = journal.budget or token_budget or find_token_budget(model, encoded, pad)
        budget = _Budget(journal.reduced or cut)
        journal.open(cut, budget.tokens)
        no_prefix = "answers are written, not chosen" if scoring == "generate" else why_no_prefix(model)
        parts = _parts(encoded, math.inf if no_prefix else max(cut / 2, MIN_TOKENS_SPARED))
        prefix = _Prefix(model, encoded)
        if any(part.prefix_length for part in parts) and not _prefix_agrees(model, encoded, parts, pad, prefix):
            no_prefix = "the model answers differently behind a shared prefix"
            parts = _parts(encoded, math.inf)
        batches = [batch for part in parts for batch in _batches(encoded, part, cut)]
        for batch in _in_turn(batches, journal):
            for answers in _ask(model, tokenizer, encoded, batch, scoring, pad, budget, prefix):
                journal.add(answers)
                work_counts.questions += len(answers)
                progress(ProgressStage.MMLU, len(journal.answers), len(encoded))
            if budget.tokens != journal.reduced:
                journal.open(cut, budget.tokens)
    return _Asked(parts, budget, no_prefix)


def _batches(encoded: Sequence[EncodedQuestion], part: _Part, budget: int) -> Iterator[_Part]:
    """A part cut into batches, each as large as the budget allows."""
    left = part.indices
    while left:
        width = max(1, len(encoded[left[0]]) - part.prefix_length)
        num = max(1, budget // width)
        yield _Part(left[:num], part.prefix_length)
        left = left[num:]


def _in_turn(batches: Sequence[_Part], journal: Journal) -> Iterator[_Part]:
    """Batches for this process to ask: those nobody has begun, then, for the owner, those somebody left unfinished."""
    numbers = range(len(batches))
    for number in reversed(numbers) if journal.is_helper else numbers:
        if not journal.knows(batches[number].indices) and journal.claim(number):
            yield batches[number]
    if journal.is_helper:
        return
    journal.read_others()
    for number in reversed(numbers):
        if not journal.knows(batches[number].indices):
            journal.read_others()
            if not journal.knows(batches[number].indices):
                yield batches[number]


class _Prefix:
    """The keys and values of the prefix that was asked for last: batches of one part follow each other."""

    def __init__(self, model: Any, encoded: Sequence[EncodedQuestion]) -> None:
        self._model, self._encoded = model, encoded
        self._ids: Sequence[int] = ()
        self._shared: SharedPrefix | None = None

    def of(self, batch: _Part) -> SharedPrefix | None:
        ids = self._encoded[batch.indices[0]].context_ids[: batch.prefix_length]
        if ids != self._ids:
            self._shared = None  # the old one's memory is free before the new one is made
            self._ids, self._shared = ids, SharedPrefix(self._model, ids) if ids else None
        return self._shared if ids else None


def _ask(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    batch: _Part,
    scoring: Literal["logits", "generate"],
    pad: int,
    budget: _Budget,
    prefix: _Prefix,
) -> Iterator[dict[int, Answer]]:
    """Answers of a batch, in one piece if memory allows it."""
    left = batch.indices
    width = max(1, len(encoded[left[0]]) - batch.prefix_length)
    while left:
        indices = left[: max(1, budget.tokens // width)]
        asked = [encoded[i] for i in indices]
        try:
            if scoring == "generate":
                texts = write_answers(model, tokenizer, asked, pad)
                found = [Answer([math.nan] * 4, parse_answer(text), text) for text in texts]
            else:
                rows = choice_logprobs(model, asked, pad, prefix.of(batch))
                found = [Answer(row, int(np.argmax(row))) for row in rows]
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(indices) == 1:
                raise
            found = []
        if not found:  # outside of the handler, which would keep the failed batch's tensors alive
            budget.halve(held=len(indices) * width)
            continue
        left = left[len(indices) :]
        yield dict(zip(indices, found, strict=True))


def _parts(encoded: Sequence[EncodedQuestion], least_saving: float) -> list[_Part]:
    """Subjects whose shared prefix saves at least so many tokens, each by itself, and one part of all others.

    The part with the longest prompt comes first.
    """

    def longest_first(indices: Iterable[int]) -> list[int]:
        return sorted(indices, key=lambda i: (-len(encoded[i]), i))

    by_subject: dict[str, list[int]] = defaultdict(list)
    for i, e in enumerate(encoded):
        by_subject[e.question.subject].append(i)
    parts, others = [], []
    for indices in by_subject.values():
        length = common_prefix([encoded[i] for i in indices])
        if length * (len(indices) - 1) >= least_saving:
            parts.append(_Part(longest_first(indices), length))
        else:
            others += indices
    if others:
        # Even prompts of different subjects begin with the same dozen words.
        length = common_prefix([encoded[i] for i in others])
        worth = length * (len(others) - 1) >= least_saving
        parts.append(_Part(longest_first(others), length if worth else 0))
    return sorted(parts, key=lambda part: (-len(encoded[part.indices[0]]), part.indices[0]))


def common_prefix(encoded: Sequence[EncodedQuestion]) -> int:
    """Tokens that all prompts begin with, at least one less than the shortest has. 0 where choices are long."""
    if len(encoded) < 2 or not all(e.single_token for e in encoded):
        return 0
    first, last = min(e.context_ids for e in encoded), max(e.context_ids for e in encoded)
    length = next((k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return min(length, min(len(e) for e in encoded) - 1)


def _prefix_agrees(
    model: Any, encoded: Sequence[EncodedQuestion], parts: Sequence[_Part], pad: int, prefix: _Prefix
) -> bool:
    """Whether one question gets the same answer with and without a shared prefix; a check of the model's own code."""
    part = next(p for p in parts if p.prefix_length)
    question = [encoded[part.indices[-1]]]
    (shared,), (alone,) = choice_logprobs(model, question, pad, prefix.of(part)), choice_logprobs(model, question, pad)
    # Quantized and half-precision models move a little with a batch's shape; a wrong mask moves them by whole nats.
    return bool(np.abs(np.subtract(shared, alone)).max() < (1e-3 if _is_exact(model) else 0.5))


def _is_exact(model: Any) -> bool:
    return model.dtype == torch.float32 and not getattr(model, "is_quantized", False)


def find_token_budget(model: Any, encoded: Sequence[EncodedQuestion], pad: int) -> int:
    """Padded tokens of a batch, a power of two, so that equal machines cut equal batches.

    On a GPU the longest prompt is asked once, and what it took tells how many tokens the free memory holds.
    """
    if model.device.type != "cuda" or not encoded:
        return CPU_QUESTION_TOKENS
    longest = max(encoded, key=len)
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    choice_logprobs(model, [longest], pad)
    per_token = max(1.0, (torch.cuda.max_memory_allocated(device) - before) / len(longest))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached
    tokens = int(min(SCORING_MEMORY_SHARE * free / per_token, MAX_GPU_TOKEN_BUDGET))
    return max(256, 1 << (max(tokens, 1).bit_length() - 1))


@contextlib.contextmanager
def _for_inference(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    # What a GPU adapter computes in float32 goes through bfloat16, as it did in training.
    autocast = torch.autocast("cuda", dtype=model.dtype) if model.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.inference_mode(), autocast, onednn_linears(model, CPU_QUESTION_TOKENS):
            yield
    finally:
        model.train(was_training)


def _row(encoded: EncodedQuestion, answer: Answer, written: bool) -> dict[str, Any]:
    question, prediction = encoded.question, answer.prediction
    return {
        "subject": question.subject,
        "question_id": question.question_id,
        "question": question.question,
        "answer": LETTERS[question.answer],
        "prediction": "" if prediction is None else LETTERS[prediction],
        **{f"logprob_{letter.lower()}": value for letter, value in zip(LETTERS, answer.logprobs, strict=True)},
        "correct": prediction == question.answer,
        **({"text": answer.text} if written else {}),
    }


def save_score(score: Score, path: Path) -> None:
    """A Parquet file, a row a question; how it was scored stands in the file's metadata."""
    table = pa.Table.from_pandas(score.questions, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), _INFO_KEY: json.dumps(score.info).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def load_score(path: Path) -> Score:
    """What ``save_score`` wrote."""
    table = pq.read_table(path)
    return Score(table.to_pandas(), json.loads((table.schema.metadata or {}).get(_INFO_KEY, b"{}")))
