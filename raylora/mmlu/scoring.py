"""Asking a model every question, in batches filled to a token budget."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
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
from raylora.mmlu.batches import Part, batches_of, divide, in_turn
from raylora.mmlu.choices import SharedPrefix, choice_logprobs, why_no_prefix
from raylora.mmlu.journal import Answer, Journal
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.questions import LETTERS
from raylora.model.forward import inference
from raylora.model.memory import CPU_TOKEN_BUDGET, TokenBudget, free_gpu_bytes, tokens_that_fit
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.work_counts import work_counts

log = logging.getLogger("raylora.mmlu")

MIN_TOKENS_SPARED = 64
"""A prefix must spare this many tokens and half a batch: so much is lost by a pass of its own and torn batches."""
_INFO_KEY = b"raylora"


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

    parts: list[Part]
    budget: TokenBudget
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
    with _for_questions(model):
        cut = journal.budget or token_budget or find_token_budget(model, encoded, pad)
        budget = TokenBudget(journal.reduced or cut)
        journal.open(cut, budget.tokens)
        no_prefix = "answers are written, not chosen" if scoring == "generate" else why_no_prefix(model)
        parts = divide(encoded, math.inf if no_prefix else max(cut / 2, MIN_TOKENS_SPARED))
        prefix = _Prefix(model, encoded)
        if any(part.prefix_length for part in parts) and not _prefix_agrees(model, encoded, parts, pad, prefix):
            no_prefix = "the model answers differently behind a shared prefix"
            parts = divide(encoded, math.inf)
        batches = [batch for part in parts for batch in batches_of(encoded, part, cut)]
        for batch in in_turn(batches, journal):
            for answers in _ask(model, tokenizer, encoded, batch, scoring, pad, budget, prefix):
                journal.add(answers)
                work_counts.questions += len(answers)
                progress(ProgressStage.MMLU, len(journal.answers), len(encoded))
            if budget.tokens != journal.reduced:
                journal.open(cut, budget.tokens)
    return _Asked(parts, budget, no_prefix)


class _Prefix:
    """The keys and values of the prefix that was asked for last: batches of one part follow each other."""

    def __init__(self, model: Any, encoded: Sequence[EncodedQuestion]) -> None:
        self._model, self._encoded = model, encoded
        self._ids: Sequence[int] = ()
        self._shared: SharedPrefix | None = None

    def of(self, batch: Part) -> SharedPrefix | None:
        ids = self._encoded[batch.indices[0]].context_ids[: batch.prefix_length]
        if ids != self._ids:
            self._shared = None  # the old one's memory is free before the new one is made
            self._ids, self._shared = ids, SharedPrefix(self._model, ids) if ids else None
        return self._shared if ids else None


def _ask(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    batch: Part,
    scoring: Literal["logits", "generate"],
    pad: int,
    budget: TokenBudget,
    prefix: _Prefix,
) -> Iterator[dict[int, Answer]]:
    """Answers of a batch, in one piece if memory allows it."""
    width = max(1, len(encoded[batch.indices[0]]) - batch.prefix_length)

    def run(indices: list[int]) -> list[Answer]:
        asked = [encoded[i] for i in indices]
        if scoring == "generate":
            texts = write_answers(model, tokenizer, asked, pad)
            return [Answer([math.nan] * 4, parse_answer(text), text) for text in texts]
        rows = choice_logprobs(model, asked, pad, prefix.of(batch))
        return [Answer(row, int(np.argmax(row))) for row in rows]

    for indices, answers in budget.pieces(batch.indices, lambda _: width, run):
        yield dict(zip(indices, answers, strict=True))


def _prefix_agrees(
    model: Any, encoded: Sequence[EncodedQuestion], parts: Sequence[Part], pad: int, prefix: _Prefix
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
        return CPU_TOKEN_BUDGET
    longest = max(encoded, key=len)
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    choice_logprobs(model, [longest], pad)
    bytes_a_token = (torch.cuda.max_memory_allocated(device) - before) / len(longest)
    return 1 << (tokens_that_fit(bytes_a_token, free_gpu_bytes(device)).bit_length() - 1)


@contextlib.contextmanager
def _for_questions(model: Any) -> Iterator[None]:
    # What a GPU adapter computes in float32 goes through bfloat16, as it did in training.
    autocast = torch.autocast("cuda", dtype=model.dtype) if model.device.type == "cuda" else contextlib.nullcontext()
    with inference(model), autocast, onednn_linears(model, CPU_TOKEN_BUDGET):
        yield


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
