"""Evaluates a model on encoded questions of MMLU, in batches filled to a token budget."""

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
from raylora.mmlu.answers import max_new_tokens, parse_answer, write_answers
from raylora.mmlu.batches import Part, batches_of, divide, in_turn
from raylora.mmlu.choices import SharedPrefix, choice_logprobs, why_no_prefix
from raylora.mmlu.journal import Answer, Journal
from raylora.mmlu.prompts import EncodedQuestion, Thinking
from raylora.mmlu.questions import LETTERS
from raylora.model.forward import inference
from raylora.model.memory import CPU_TOKEN_BUDGET, TokenBudget, free_gpu_bytes, tokens_that_fit
from raylora.model.onednn import onednn_linears
from raylora.model.packing import is_exact
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.work_counts import work_counts

log = logging.getLogger("raylora.mmlu")

MIN_TOKENS_SPARED = 64
"""A shared prefix is used only if it spares this many tokens, and half a batch's: it costs a forward pass of its own,
and the last batch behind it is seldom full."""
_INFO_KEY = b"raylora"
"""The key of ``Score.info`` in the metadata of a Parquet file."""


def evaluate(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    scoring: Literal["logits", "generate"] = "logits",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
    journal: Journal | None = None,
    thinking: Thinking = "",
) -> Score:
    """Evaluate ``model``, with the adapter that is active in it, on every question.

    Args:
        scoring: ``logits``: the choice of the highest log-likelihood; ``generate``: the choice that a generated text
            names.
        token_budget: padded tokens in a batch; None: 512 on a CPU, what the free memory holds on a GPU.
        journal: where answers are kept as they come; questions it has answers to are not asked again. The caller
            removes it.
        thinking: what the questions were encoded with.

    Returns:
        A row a question, in the order of ``encoded``; ``info`` has the settings, times and counts of the evaluation.

    Raises:
        torch.OutOfMemoryError: a single question does not fit (MemoryError or RuntimeError on a CPU).
    """
    journal = journal or Journal(None, "")
    started, num_resumed = time.perf_counter(), len(journal.answers)
    evaluation = answer(model, tokenizer, encoded, journal, scoring, token_budget, progress, thinking)
    seconds = time.perf_counter() - started
    rows = [_row(encoded[i], journal.answers[i], written=scoring == "generate") for i in range(len(encoded))]
    with_prefix = [part for part in evaluation.parts if part.prefix_length]
    info = {
        "scoring": scoring,
        "thinking": thinking,
        "mmlu_seconds": seconds,
        "questions_per_second": (len(rows) - num_resumed) / seconds,
        "num_resumed": num_resumed,
        "num_tokens": sum(len(e) for e in encoded),
        "num_tokens_spared": sum(p.prefix_length * (len(p.indices) - 1) for p in with_prefix),
        "num_shared_prefixes": len(with_prefix),
        "no_prefix_because": evaluation.no_prefix,
        "token_budget": evaluation.budget.tokens,
        "num_oom_backoffs": evaluation.budget.num_backoffs,
        "num_truncated": sum(e.num_truncated > 0 for e in encoded),
        "num_unparsed": sum(not row["prediction"] for row in rows),
    }
    return Score(pd.DataFrame(rows), info)


@dataclass(frozen=True)
class _Evaluation:
    """How the questions were put to the model."""

    parts: list[Part]
    budget: TokenBudget
    no_prefix: str
    """Why no prefix was shared; empty where prefixes may be."""


def answer(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    journal: Journal,
    scoring: Literal["logits", "generate"] = "logits",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
    thinking: Thinking = "",
) -> _Evaluation:
    """Answer the questions that the journal has no answer to, and add the answers to it.

    The journal's owner stops when all questions are answered, a helper when there is no batch that nobody has begun.

    Raises:
        torch.OutOfMemoryError: a single question does not fit (MemoryError or RuntimeError on a CPU).
    """
    pad = pad_token_of(tokenizer)
    with _for_questions(model):
        # Batches are always cut to the first budget: processes that share a journal, and a run that continues one, must
        # agree on them. Where memory runs out, a batch is asked in pieces of the reduced budget.
        cut = journal.budget or token_budget or find_token_budget(model, encoded, pad)
        budget = TokenBudget(journal.reduced or cut)
        journal.open(cut, budget.tokens)
        no_prefix = "answers are written, not chosen" if scoring == "generate" else why_no_prefix(model)
        parts = divide(encoded, math.inf if no_prefix else max(cut / 2, MIN_TOKENS_SPARED))
        prefix = _LastPrefix(model, encoded)
        if any(part.prefix_length for part in parts) and not _prefix_agrees(model, encoded, parts, pad, prefix):
            no_prefix = "the model answers differently behind a shared prefix"
            parts = divide(encoded, math.inf)
        batches = [batch for part in parts for batch in batches_of(encoded, part, cut)]
        for batch in in_turn(batches, journal):
            for answers in _ask(model, tokenizer, encoded, batch, scoring, thinking, pad, budget, prefix):
                journal.add(answers)
                work_counts.questions += len(answers)
                progress(ProgressStage.MMLU, len(journal.answers), len(encoded))
            if budget.tokens != journal.reduced:
                journal.open(cut, budget.tokens)
    return _Evaluation(parts, budget, no_prefix)


class _LastPrefix:
    """The shared prefix that was used last. One is enough, as all batches of a part are asked one after another."""

    def __init__(self, model: Any, encoded: Sequence[EncodedQuestion]) -> None:
        self._model, self._encoded = model, encoded
        self._ids: Sequence[int] = ()
        self._shared: SharedPrefix | None = None

    def of(self, batch: Part) -> SharedPrefix | None:
        """The keys and values of the batch's prefix; None where it has none."""
        ids = self._encoded[batch.indices[0]].context_ids[: batch.prefix_length]
        if ids != self._ids:
            self._shared = None  # so that the old one's memory is free when the new one is computed
            self._ids, self._shared = ids, SharedPrefix(self._model, ids) if ids else None
        return self._shared if ids else None


def _ask(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    batch: Part,
    scoring: Literal["logits", "generate"],
    thinking: Thinking,
    pad: int,
    budget: TokenBudget,
    prefix: _LastPrefix,
) -> Iterator[dict[int, Answer]]:
    """Answers of a batch, by question index: all at once, or piece by piece where memory does not hold the batch."""
    # All questions count as long as the first, as in ``batches_of``: a batch is whole until memory runs out.
    width = max(1, len(encoded[batch.indices[0]]) - batch.prefix_length)
    if thinking == "on":
        width += max_new_tokens(thinking)  # as much as many prompts: their keys and values need room, too

    def run(indices: list[int]) -> list[Answer]:
        questions = [encoded[i] for i in indices]
        if scoring == "generate":
            texts = write_answers(model, tokenizer, questions, pad, thinking)
            return [Answer([math.nan] * 4, parse_answer(text), text) for text in texts]
        logprobs = choice_logprobs(model, questions, pad, prefix.of(batch))
        return [Answer(of_choices, int(np.argmax(of_choices))) for of_choices in logprobs]

    for indices, answers in budget.pieces(batch.indices, lambda _: width, run):
        yield dict(zip(indices, answers, strict=True))


def _prefix_agrees(
    model: Any, encoded: Sequence[EncodedQuestion], parts: Sequence[Part], pad: int, prefix: _LastPrefix
) -> bool:
    """Whether a question gets the same log-likelihoods with and without a shared prefix.

    Some models' code mishandles a cache that is filled before the batch, so it is tried: on the shortest question of
    the first part with a prefix. The first batches need that prefix anyway, so it is not computed for the check alone.
    """
    part = next(p for p in parts if p.prefix_length)
    question = [encoded[part.indices[-1]]]
    (shared,), (alone,) = choice_logprobs(model, question, pad, prefix.of(part)), choice_logprobs(model, question, pad)
    # The numbers of LLM.int8 and of half precision change a little with a batch's shape; a wrong mask changes them by
    # several nats.
    return bool(np.abs(np.subtract(shared, alone)).max() < (1e-3 if is_exact(model) else 0.5))


def find_token_budget(model: Any, encoded: Sequence[EncodedQuestion], pad: int) -> int:
    """How many padded tokens a batch may have: 512 on a CPU, on a GPU as many as its free memory holds.

    On a GPU the longest prompt is run once, to measure the memory of a token. The result is rounded down to a power of
    two, so that machines of the same kind cut the same batches although their free memory differs a little: in half
    precision, and with LLM.int8, the log-likelihoods depend a little on the batch (benchmarks/NOTES.md).
    """
    if model.device.type != "cuda" or not encoded:
        return CPU_TOKEN_BUDGET
    longest = max(encoded, key=len)
    device = model.device
    torch.cuda.reset_peak_memory_stats(device)
    bytes_before = torch.cuda.memory_allocated(device)
    choice_logprobs(model, [longest], pad)
    bytes_a_token = (torch.cuda.max_memory_allocated(device) - bytes_before) / len(longest)
    return 1 << (tokens_that_fit(bytes_a_token, free_gpu_bytes(device)).bit_length() - 1)


@contextlib.contextmanager
def _for_questions(model: Any) -> Iterator[None]:
    """Inside, ``model`` is set up for questions: eval mode, mixed precision on a GPU, oneDNN on a CPU."""
    # An adapter's float32 matrices are multiplied in bfloat16 on a GPU, as they were in training.
    autocast = torch.autocast("cuda", dtype=model.dtype) if model.device.type == "cuda" else contextlib.nullcontext()
    with inference(model), autocast, onednn_linears(model, CPU_TOKEN_BUDGET):
        yield


def _row(encoded: EncodedQuestion, answer: Answer, written: bool) -> dict[str, Any]:
    """A question's row of ``Score.questions``; with its text where the answer was ``written``."""
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
    """Write a Parquet file with a row for each question; ``score.info`` goes into its metadata, as JSON."""
    table = pa.Table.from_pandas(score.questions, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), _INFO_KEY: json.dumps(score.info).encode()}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def load_score(path: Path) -> Score:
    """Read what ``save_score`` wrote."""
    table = pq.read_table(path)
    return Score(table.to_pandas(), json.loads((table.schema.metadata or {}).get(_INFO_KEY, b"{}")))
