"""Asking a model every question: log-likelihoods from one forward pass each, or answers that it writes.

Every score is made with the longest questions first: memory runs out in the first batch or never.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F

from raylora.encoding import pad_left
from raylora.mmlu.prompts import EncodedQuestion
from raylora.mmlu.questions import LETTERS
from raylora.model import is_out_of_memory
from raylora.records import Progress, Score, ignore_progress

MAX_NEW_TOKENS = 10
_INFO_KEY = b"raylora"
Answers = list[tuple[list[float], int | None, str]]
"""For each question: four log-likelihoods, the prediction (0 to 3, None if unparsed), and the text that was written."""


@dataclass
class _Budget:
    """Padded tokens in a batch: what was asked for, until memory said no."""

    tokens: int
    num_backoffs: int = 0


def evaluate(
    model: Any,
    tokenizer: Any,
    encoded: Sequence[EncodedQuestion],
    scoring: Literal["logits", "generate"] = "logits",
    token_budget: int = 512,
    progress: Progress = ignore_progress,
) -> Score:
    """Ask ``model`` every question.

    Returns:
        The answers in the order of ``encoded``; ``info`` says how they came about.

    Raises:
        torch.OutOfMemoryError: a single question does not fit.
    """
    started = time.perf_counter()
    budget = _Budget(token_budget)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    answer: Callable[[list[EncodedQuestion]], Answers]
    if scoring == "generate":
        answer = lambda batch: _generate(model, tokenizer, batch, pad)  # noqa: E731
    else:
        answer = lambda batch: _choose(model, batch, pad)  # noqa: E731
    answers: dict[int, tuple[list[float], int | None, str]] = {}
    with _for_inference(model):
        for indices in _batches(encoded, budget):
            try:
                found = answer([encoded[i] for i in indices])
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(indices) == 1:
                    raise
                found = None
            if found is None:  # outside of the handler, which would keep the failed batch's tensors alive
                _back_off(budget, encoded, indices)
                continue
            answers |= dict(zip(indices, found, strict=True))
            progress("mmlu", len(answers), len(encoded))
    seconds = time.perf_counter() - started
    rows = [_row(encoded[i], *answers[i], written=scoring == "generate") for i in range(len(encoded))]
    num_tokens = sum(len(e) for e in encoded)
    info = {
        "scoring": scoring,
        "mmlu_seconds": seconds,
        "questions_per_second": len(rows) / seconds,
        "num_tokens": num_tokens,
        "token_budget": budget.tokens,
        "num_oom_backoffs": budget.num_backoffs,
        "num_truncated": sum(e.num_truncated > 0 for e in encoded),
        "num_unparsed": sum(not row["prediction"] for row in rows),
    }
    return Score(pd.DataFrame(rows), info)


def _batches(encoded: Sequence[EncodedQuestion], budget: _Budget) -> Iterator[list[int]]:
    """Indices of batches, longest first. A batch that was not answered (the budget shrank) comes again, smaller."""
    left = sorted(range(len(encoded)), key=lambda i: (-len(encoded[i]), i))
    while left:
        size = max(1, budget.tokens // max(1, len(encoded[left[0]])))
        before = budget.num_backoffs
        yield left[:size]
        if budget.num_backoffs == before:
            left = left[size:]


def _back_off(budget: _Budget, encoded: Sequence[EncodedQuestion], indices: list[int]) -> None:
    """Half of what the failed batch held, which may be far less than the budget allowed."""
    held = len(indices) * max(len(encoded[i]) for i in indices)
    budget.tokens = min(budget.tokens, held) // 2
    budget.num_backoffs += 1
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextlib.contextmanager
def _for_inference(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    # What a GPU adapter computes in float32 goes through bfloat16, as it did in training.
    autocast = torch.autocast("cuda", dtype=model.dtype) if model.device.type == "cuda" else contextlib.nullcontext()
    try:
        with torch.inference_mode(), autocast:
            yield
    finally:
        model.train(was_training)


def _choose(model: Any, batch: list[EncodedQuestion], pad: int) -> Answers:
    """Log-likelihoods of the four choices; the most likely one, the first of equals."""
    if all(e.single_token for e in batch):
        logprobs = _single_token_logprobs(model, batch, pad)
    else:
        logprobs = [_whole_logprobs(model, e, pad) for e in batch]
    return [(row, int(np.argmax(row)), "") for row in logprobs]


def _single_token_logprobs(model: Any, batch: list[EncodedQuestion], pad: int) -> list[list[float]]:
    inputs = pad_left([e.context_ids for e in batch], pad, model.device)
    logits = model(**inputs.model_inputs(), logits_to_keep=1, use_cache=False).logits[:, -1]  # (B, V)
    choices = torch.tensor([[c[0] for c in e.continuations] for e in batch], device=logits.device)
    return F.log_softmax(logits.float(), dim=-1).gather(1, choices).tolist()


def _whole_logprobs(model: Any, encoded: EncodedQuestion, pad: int) -> list[float]:
    """Each choice's tokens scored one after another, for tokenizers that make more than one of a letter."""
    rows = [encoded.context_ids + c[:-1] for c in encoded.continuations]
    inputs = pad_left(rows, pad, model.device)
    keep = max(len(c) for c in encoded.continuations)
    logits = model(**inputs.model_inputs(), logits_to_keep=keep, use_cache=False).logits
    logprobs = F.log_softmax(logits.float(), dim=-1)
    return [
        float(logprobs[i, -len(c) :].gather(1, torch.tensor(c, device=logits.device)[:, None]).sum())
        for i, c in enumerate(encoded.continuations)
    ]


def _generate(model: Any, tokenizer: Any, batch: list[EncodedQuestion], pad: int) -> Answers:
    """Greedy, at most ten tokens; the answer is read from the text."""
    from transformers import GenerationConfig

    inputs = pad_left([e.context_ids for e in batch], pad, model.device)
    config = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
        bos_token_id=model.generation_config.bos_token_id,
        eos_token_id=model.generation_config.eos_token_id or tokenizer.eos_token_id,
    )
    output = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, generation_config=config)
    texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return [([math.nan] * 4, parse_answer(text), text) for text in texts]


_OPEN, _CLOSE = r"[\s*_(\[\"']*", r"(?=$|[\s.,:;)\]*_\"'!?])"
_ANSWER_PATTERNS = (
    # The letter comes first: "C", "(C)", "C.", "C) banana", "**C**". A lone capital before a word is a word: "A cat".
    re.compile(rf"^{_OPEN}([A-Da-d])(?:$|[.,:;)\]*_\"'!?]|\s*\n)"),
    re.compile(rf"\b(?:answer|option|choice)\b(?:\s+is)?(?:\s+(?:option|choice))?\s*:?{_OPEN}([A-Da-d]){_CLOSE}", re.I),
)


def parse_answer(text: str) -> int | None:
    """The option that a text names, 0 to 3; None where it names none clearly."""
    text = text.strip()
    for pattern in _ANSWER_PATTERNS:
        if match := pattern.search(text):
            return LETTERS.index(match[1].upper())
    return None


def _row(
    encoded: EncodedQuestion, logprobs: list[float], prediction: int | None, text: str, written: bool
) -> dict[str, Any]:
    question = encoded.question
    return {
        "subject": question.subject,
        "question_id": question.question_id,
        "question": question.question,
        "answer": LETTERS[question.answer],
        "prediction": "" if prediction is None else LETTERS[prediction],
        **{f"logprob_{letter.lower()}": value for letter, value in zip(LETTERS, logprobs, strict=True)},
        "correct": prediction == question.answer,
        **({"text": text} if written else {}),
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
