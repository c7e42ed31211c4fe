"""Evaluates a model on encoded questions of MMLU, in batches filled to a token budget."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from raylora.config.options import ClozePer, Scoring
from raylora.errors import ErrorKind, UserError, one_line
from raylora.mmlu.batches import Part, batches_of, divide, in_turn
from raylora.mmlu.choices import Asked, Asker, Read, asker_of
from raylora.mmlu.cloze import by_letter, columns_of
from raylora.mmlu.journal import Answer, Journal
from raylora.mmlu.prompts import EncodedQuestion, Thinking
from raylora.mmlu.questions import LETTERS
from raylora.model.adapters import LoadedModel
from raylora.model.attention import REFUSALS
from raylora.model.fetching import one_late
from raylora.model.forward import inference
from raylora.model.graphs import capture_of
from raylora.model.memory import CPU_TOKEN_BUDGET, TokenBudget, free_gpu_bytes, is_out_of_memory, tokens_that_fit
from raylora.model.onednn import onednn_linears
from raylora.model.packing import is_exact
from raylora.records import ProgressCallback, ProgressStage, Score, ignore_progress
from raylora.storage.digests import open_parquet, write_parquet
from raylora.work_counts import work_counts

log = logging.getLogger("raylora.mmlu")

MIN_TOKENS_SPARED = 64
"""A shared prefix is used only if it spares this many tokens, and half a batch's: it costs a forward pass of its own,
and the last batch behind it is seldom full."""
_INFO_KEY = b"raylora"
"""The key of ``Score.info`` in the metadata of a Parquet file."""


def evaluate(
    loaded: LoadedModel,
    encoded: Sequence[EncodedQuestion],
    scoring: Scoring = "letters",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
    journal: Journal | None = None,
    thinking: Thinking = "",
    cloze_per: ClozePer = "character",
) -> Score:
    """Evaluate the model, with the adapter that is active in it, on every question.

    Args:
        scoring: ``letters``: the choice whose letter is likeliest; ``cloze``: that whose text is; ``generate``: that
            which a generated text names.
        token_budget: tokens in a batch; None: 512 on a CPU, what the free memory holds on a GPU.
        journal: where answers are kept as they come; questions it has answers to are not asked again. The caller
            removes it.
        thinking: what the questions were encoded with.
        cloze_per: what the log-likelihood of a choice's text is divided by.

    Returns:
        A row a question, in the order of ``encoded``; ``info`` has the settings, times and counts of the evaluation.

    Raises:
        UserError: a log-likelihood is not finite.
        torch.OutOfMemoryError: a single question does not fit (MemoryError or RuntimeError on a CPU).
    """
    journal = journal or Journal(None, "")
    started, num_resumed = time.perf_counter(), len(journal.answers)
    evaluation = answer(loaded, encoded, journal, scoring, token_budget, progress, thinking, cloze_per)
    if scoring != "generate":  # what is written has no log-likelihoods
        _check_finite(loaded, journal.answers)
    seconds = time.perf_counter() - started
    letters = LETTERS[: max([4, *(len(e.question.choices) for e in encoded)])]
    rows = [_row(encoded[i], journal.answers[i], scoring, letters) for i in range(len(encoded))]
    with_prefix = [part for part in evaluation.parts if part.prefix_length]
    info = {
        "scoring": scoring,
        "thinking": thinking,
        **({"cloze_per": cloze_per} if scoring == "cloze" else {}),
        "mmlu_seconds": seconds,
        "questions_per_second": (len(rows) - num_resumed) / seconds,
        "num_resumed": num_resumed,
        "num_tokens": sum(len(e) + (e.num_choice_tokens if scoring == "cloze" else 0) for e in encoded),
        "num_tokens_spared": sum(p.prefix_length * (len(p.indices) - 1) for p in with_prefix),
        "num_shared_prefixes": len(with_prefix),
        "no_prefix_because": evaluation.no_prefix,
        "token_budget": evaluation.budget.tokens,
        "num_oom_backoffs": evaluation.budget.num_backoffs,
        "num_truncated": sum(e.num_truncated > 0 for e in encoded),
        "num_unparsed": sum(not row["prediction"] for row in rows),
    }
    return Score(pd.DataFrame(rows), info)


def _check_finite(loaded: LoadedModel, answers: Mapping[int, Answer]) -> None:
    """Check the log-likelihoods of all answers: of NaN the first letter would be the highest.

    Raises:
        UserError: one is not finite.
    """
    broken = [number for number, answer in answers.items() if not np.isfinite(answer.logprobs).all()]
    if broken:
        text = f"the log-likelihoods of {len(broken)} of {len(answers)} questions are not finite numbers"
        if loaded.serving is not None:
            raise UserError(f"no adapter of {loaded.source}: with it {text}", kind=ErrorKind.ADAPTER)
        raise UserError(f"--model {loaded.source}: {text}", kind=ErrorKind.MODEL)


@dataclass(frozen=True)
class _Evaluation:
    """How the questions were put to the model."""

    parts: list[Part]
    budget: TokenBudget
    no_prefix: str
    """Why no prefix was shared; empty where prefixes may be."""


def answer(
    loaded: LoadedModel,
    encoded: Sequence[EncodedQuestion],
    journal: Journal,
    scoring: Scoring = "letters",
    token_budget: int | None = None,
    progress: ProgressCallback = ignore_progress,
    thinking: Thinking = "",
    cloze_per: ClozePer = "character",
) -> _Evaluation:
    """Answer the questions that the journal has no answer to, and add the answers to it.

    The journal's owner stops when all questions are answered, a helper when there is no batch that nobody has begun.

    Raises:
        torch.OutOfMemoryError: a single question does not fit (MemoryError or RuntimeError on a CPU).
    """
    asked = [Asked(question, loaded.serving) for question in encoded]
    return _answer(loaded, asked, [loaded.serving], journal, scoring, token_budget, progress, thinking, cloze_per)


def answer_together(
    loaded: LoadedModel,
    encoded: Sequence[EncodedQuestion],
    adapters: Sequence[str | None],
    token_budget: int | None = None,
) -> tuple[dict[str | None, dict[int, Answer]], int]:
    """Answers of several adapters to the same questions, in passes that they share: by adapter and question index.

    Args:
        adapters: the names of attached ones, and None for the base.

    Returns:
        The answers, and the tokens that a batch had at most.

    Raises:
        UserError: they cannot share passes: the questions' choices have several tokens, or the adapters are not linear.
        torch.OutOfMemoryError: a single question does not fit (MemoryError or RuntimeError on a CPU).
    """
    pairs = [(i, name) for i in range(len(encoded)) for name in adapters]
    asked = [Asked(encoded[i], name) for i, name in pairs]
    journal = Journal(None, "")
    evaluation = _answer(loaded, asked, adapters, journal, "letters", token_budget, ignore_progress)
    found: dict[str | None, dict[int, Answer]] = {name: {} for name in adapters}
    for number, (i, name) in enumerate(pairs):
        found[name][i] = journal.answers[number]
    return found, evaluation.budget.tokens


def _answer(
    loaded: LoadedModel,
    asked: Sequence[Asked],
    adapters: Sequence[str | None],
    journal: Journal,
    scoring: Scoring,
    token_budget: int | None,
    progress: ProgressCallback,
    thinking: Thinking = "",
    cloze_per: ClozePer = "character",
) -> _Evaluation:
    encoded = [a.question for a in asked]
    with _for_questions(loaded):
        asker = asker_of(loaded, encoded, adapters, scoring, thinking, cloze_per)
        # Batches are always cut to the first budget: processes that share a journal, and a run that continues one, must
        # agree on them. Where memory runs out, a batch is asked in pieces of the reduced budget.
        cut = journal.budget or token_budget or find_token_budget(loaded, asker, asked)
        budget = TokenBudget(journal.reduced or cut)
        journal.open(cut, budget.tokens)
        parts = divide(encoded, math.inf if asker.no_prefix else max(cut / 2, MIN_TOKENS_SPARED))
        with asker.ready(max((part.prefix_length for part in parts), default=0)):
            no_prefix = asker.no_prefix or _why_no_prefix(loaded, asker, asked, parts)
            if no_prefix:
                parts = divide(encoded, math.inf)
            batches = [batch for part in parts for batch in batches_of(encoded, part, cut, asker.width, asker.packed)]
            for answers in ask_all(asker, asked, in_turn(batches, journal), budget):
                journal.add(answers)
                work_counts.questions += len(answers)
                progress(ProgressStage.MMLU, len(journal.answers), len(encoded))
                if budget.tokens != journal.reduced:
                    journal.open(cut, budget.tokens)
    return _Evaluation(parts, budget, no_prefix)


def ask_all(
    asker: Asker, asked: Sequence[Asked], batches: Iterable[Part], budget: TokenBudget
) -> Iterator[dict[int, Answer]]:
    """Ask batches one after another; the answers to one are fetched while the device is at the next.

    Yields:
        Answers by index: of a whole batch, or of a piece of it where memory does not hold it.
    """
    for indices, read in one_late(_launch(asker, asked, batches, budget)):
        yield dict(zip(indices, read(), strict=True))


def _launch(
    asker: Asker, asked: Sequence[Asked], batches: Iterable[Part], budget: TokenBudget
) -> Iterator[tuple[list[int], Read]]:
    for batch in batches:

        def run(indices: list[int], prefix_length: int = batch.prefix_length) -> Read:
            return asker.ask([asked[i] for i in indices], prefix_length)

        # Where rows are padded, all questions count as long as the first, as in ``batches_of``: a batch is whole until
        # memory runs out.
        widths = {i: _width(asker, asked, i if asker.packed else batch.indices[0], batch) for i in batch.indices}
        yield from budget.pieces(batch.indices, widths.__getitem__, run, packed=asker.packed, make_room=asker.make_room)


def _width(asker: Asker, asked: Sequence[Asked], index: int, batch: Part) -> int:
    """Tokens that a question of a batch takes."""
    return max(1, asker.width(asked[index].question) - batch.prefix_length)


def _why_no_prefix(loaded: LoadedModel, asker: Asker, asked: Sequence[Asked], parts: Sequence[Part]) -> str:
    """Why the prefixes of these parts cannot be shared; empty where they can.

    Some models' code counts positions in another way behind one, so it is tried, on the shortest question of the first
    part with a prefix. The first batches need that prefix anyway, so it is not computed for the trial alone.
    """
    part = next((part for part in parts if part.prefix_length), None)
    if part is None:
        return ""
    question = asked[part.indices[-1]]
    try:
        shared, alone = _ask_one(asker, question, part.prefix_length), _ask_one(asker, question)
    except REFUSALS as error:
        if is_out_of_memory(error):
            raise
        return f"the model's attention has no place for one ({one_line(error)})"
    # The numbers of LLM.int8 and of half precision change a little with a batch's shape; a wrong mask changes them by
    # several nats.
    tolerance = 1e-3 if is_exact(loaded.model) else 0.5
    agrees = np.abs(np.subtract(shared.logprobs, alone.logprobs)).max() < tolerance
    return "" if agrees else "the model answers differently behind a shared prefix"


def _ask_one(asker: Asker, asked: Asked, prefix_length: int = 0) -> Answer:
    """Ask one question and wait for the answer; again, where memory runs out and something can be done without.

    Raises:
        torch.OutOfMemoryError: it does not fit (MemoryError or RuntimeError on a CPU).
    """
    budget, found = TokenBudget(asker.width(asked.question)), None
    while found is None:
        found = budget.attempt(lambda: asker.ask([asked], prefix_length)(), asker.make_room)
    return found[0]


def find_token_budget(loaded: LoadedModel, asker: Asker, asked: Sequence[Asked]) -> int:
    """How many tokens a batch may have: 512 on a CPU, on a GPU as many as its free memory holds.

    On a GPU the longest prompt is run once, to measure the memory of a token. The result is rounded down to a power of
    two, so that machines of the same kind cut the same batches although their free memory differs a little: in half
    precision, and with LLM.int8, the log-likelihoods depend a little on the batch (benchmarks/NOTES.md).
    """
    device = loaded.device
    if device.type != "cuda" or not asked:
        return CPU_TOKEN_BUDGET
    longest = max(asked, key=lambda a: asker.width(a.question))
    with asker.ready():  # the weights of adapters are no token's
        torch.cuda.reset_peak_memory_stats(device)
        bytes_before = torch.cuda.memory_allocated(device)
        _ask_one(asker, longest)
        bytes_taken = torch.cuda.max_memory_allocated(device) - bytes_before
    bytes_a_token = bytes_taken / asker.width(longest.question)
    captured = capture_of(loaded) is not None
    return 1 << (tokens_that_fit(bytes_a_token, free_gpu_bytes(device), captured).bit_length() - 1)


@contextlib.contextmanager
def _for_questions(loaded: LoadedModel) -> Iterator[None]:
    """Inside, the model is set up for questions: eval mode, and oneDNN on a CPU."""
    with inference(loaded.model), onednn_linears(loaded.model, CPU_TOKEN_BUDGET):
        yield


def _row(encoded: EncodedQuestion, answer: Answer, scoring: Scoring, letters: str) -> dict[str, Any]:
    """A question's row of ``Score.questions``; with its text where the answer was written, and cloze's lengths.

    Args:
        letters: that rows have columns for.
    """
    question, prediction = encoded.question, answer.prediction
    return {
        "subject": question.subject,
        "question_id": question.question_id,
        "question": question.question,
        "answer": LETTERS[question.answer],
        "prediction": "" if prediction is None else LETTERS[prediction],
        **by_letter("logprob", letters, answer.logprobs),
        "correct": prediction == question.answer,
        **({"text": answer.text} if scoring == "generate" else {}),
        **(columns_of(encoded, letters) if scoring == "cloze" else {}),
    }


def save_score(score: Score, path: Path) -> None:
    """Write a Parquet file with a row for each question; ``score.info`` goes into its metadata, as JSON."""
    table = pa.Table.from_pandas(score.questions, preserve_index=False)
    metadata = {**(table.schema.metadata or {}), _INFO_KEY: json.dumps(score.info).encode()}
    write_parquet(table.replace_schema_metadata(metadata), path)


def load_score(path: Path) -> Score:
    """Read what ``save_score`` wrote.

    Raises:
        DamagedError: it is not what was written.
        OSError, ValueError: it is no whole Parquet file.
    """
    table = pq.read_table(open_parquet(path))
    return Score(table.to_pandas(), json.loads((table.schema.metadata or {}).get(_INFO_KEY, b"{}")))
