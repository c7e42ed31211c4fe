"""Features of a sample from one forward pass of the base: perplexities and embeddings together.

    template    question            template   answer              end
    . . . . .   q q q q q q q q q   . . . . .  a a a a a a a a a   .
                '- states: question -'         '- states, losses -'

The template's own tokens are the same for every dataset: they are read, and not measured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.ensemble import IsolationForest

from raylora.datasets import parse_record, sample_examples
from raylora.encoding import EncodedExample, Minibatch, batches_by_budget, encode_example, pad_left
from raylora.features import text
from raylora.features.columns import STATIC_NAMES
from raylora.model import is_out_of_memory
from raylora.records import Dataset, Example, Progress, UserError, ignore_progress

_SENTENCE_END = re.compile(r"(?<=[.!?。！？…])\s*|\n+")
MAX_LOSS = 700.0
"""exp of more than this is no float."""


@dataclass(frozen=True)
class FeatureResult:
    """Features by name, None where one could not be measured, and the reason for each None."""

    values: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Item:
    """One example of the sample, encoded. ``sentences`` are slices of the answer's tokens."""

    example: Example
    encoded: EncodedExample
    sentences: list[tuple[int, int]]
    num_question_tokens: int
    num_answer_tokens: int


@dataclass(frozen=True)
class _Measured:
    """What the forward pass told of one example: unit-length states of shape (H,), losses in nats a token."""

    embedding: np.ndarray
    similarity: float | None
    consistency: float | None
    loss: float
    answer_loss: float


class StaticFeatureExtractor:
    """Static features of a dataset, with a model that is loaded already.

    Args:
        model: a transformers causal language model.
        device: where the model is moved to; by default it stays where it is.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str | None = None) -> None:
        self.model = model.to(device) if device is not None else model
        self.tokenizer = tokenizer

    def extract_all_static_features(
        self,
        dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]],
        sample_size: int = 100,
        batch_size: int = 8,
        max_length: int = 1024,
    ) -> dict[str, Any]:
        """Every static feature by column name, None where it could not be measured, and ``feature_notes``.

        Args:
            dataset: what ``load_dataset`` returned, Examples, or dicts in any of the known formats.
            sample_size: examples that are looked at (0: all).

        Raises:
            UserError: there is no valid example.
        """
        known = as_dataset(dataset)
        sample = sample_examples(known.examples, sample_size, known.seed)
        budget = batch_size * max_length
        result = extract_static(self.model, self.tokenizer, known, sample, max_length, budget)
        return {**result.values, "feature_notes": join_notes(result.notes)}

    calculate_special_char_ratio = staticmethod(text.calculate_special_char_ratio)
    calculate_answer_groundedness = staticmethod(text.calculate_answer_groundedness)


def as_dataset(dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]]) -> Dataset:
    """A Dataset of whatever users hold: one already, Examples, or records of a dataset file.

    Raises:
        UserError: no record is valid.
    """
    if isinstance(dataset, Dataset):
        return dataset
    examples: list[Example] = []
    num_bad = 0
    for record in dataset:
        if isinstance(record, Example):
            examples.append(record)
        else:
            parsed, errors = parse_record(dict(record))
            examples += parsed
            num_bad += len(errors)
    if not examples:
        raise UserError("the dataset has no valid example")
    num_chars = sum(len(m.content) for e in examples for m in e.messages) + sum(len(e.answer) for e in examples)
    return Dataset("", tuple(examples), len(dataset), num_chars, num_bad_records=num_bad)


def join_notes(notes: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in notes.items())


def extract_static(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    sample: Sequence[Example],
    max_length: int = 1024,
    token_budget: int = 512,
    progress: Progress = ignore_progress,
) -> FeatureResult:
    """Static features of ``sample``; ``dataset`` is asked for its size alone.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    items = [_encode(tokenizer, example, max_length) for example in sample]
    usable = [item for item in items if any(item.encoded.is_answer_text)]
    values: dict[str, Any] = dict.fromkeys(STATIC_NAMES)
    notes: dict[str, str] = {}
    values |= {"dataset_num_items": dataset.num_items, "dataset_total_chars": dataset.total_chars}
    if usable:
        lengths = [i.num_question_tokens for i in usable], [i.num_answer_tokens for i in usable]
        words, word_notes = text.text_features([i.example for i in usable], *lengths)
        measured = _measure_all(model, tokenizer, usable, token_budget, progress)
        alone = _answers_alone(model, tokenizer, usable, token_budget)
        values |= words | _semantic(measured) | _perplexity(measured, alone)
        notes |= word_notes
    for name in STATIC_NAMES:
        if values[name] is None:
            notes.setdefault(name, _reason(name, len(usable)))
    num_null = sum(values[name] is None for name in STATIC_NAMES)
    values |= {
        "static_valid_count": len(usable),
        "static_skipped_count": len(items) - len(usable),
        "static_imputed_count": 0,
        "static_coverage": 1 - num_null / len(STATIC_NAMES),
    }
    return FeatureResult(values, notes)


def _reason(name: str, num_usable: int) -> str:
    if num_usable == 0:
        return "no example of the sample has an answer within --max-length"
    if name == "semantic_consistency":
        return "no answer has two sentences"
    if name in {"semantic_diversity", "embedding_outlier_ratio"} and num_usable < 2:
        return "needs two examples"
    return "the model gave no finite number"


# Encoding


def _encode(tokenizer: Any, example: Example, max_length: int) -> _Item:
    encoded = encode_example(tokenizer, example, max_length)
    answer = tokenizer(example.answer.strip(), add_special_tokens=False, return_offsets_mapping=True)
    question = tokenizer(example.messages[-1].content.strip(), add_special_tokens=False)
    return _Item(
        example,
        encoded,
        _sentence_slices(example.answer.strip(), answer["offset_mapping"]),
        len(question["input_ids"]),
        len(answer["input_ids"]),
    )


def _sentence_slices(answer: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token slices of the sentences of two words or more (in scripts without spaces: two letters)."""
    slices, start = [], 0
    for end in [*(m.end() for m in _SENTENCE_END.finditer(answer)), len(answer)]:
        sentence = answer[start:end]
        words = text.words_of(sentence)
        if len(words) > 1 or (words and not words[0].isascii() and len(words[0]) > 1):
            tokens = [i for i, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
            if tokens:
                slices.append((tokens[0], tokens[-1] + 1))
        start = max(start, end)
    return slices


# The forward pass


def _measure_all(
    model: Any, tokenizer: Any, items: Sequence[_Item], token_budget: int, progress: Progress
) -> list[_Measured]:
    """What the model says of each item, in their order."""
    results: dict[int, _Measured] = {}

    def run(indices: list[int]) -> None:
        batch = pad_left([items[i].encoded.input_ids for i in indices], tokenizer.pad_token_id, model.device)
        output = model(**batch.model_inputs(), output_hidden_states=True, use_cache=False)
        states = output.hidden_states[-1].float()
        losses = _token_losses(output.logits, batch)
        for row, i in enumerate(indices):
            length = len(items[i].encoded)
            results[i] = _measure(items[i], states[row, -length:], losses[row, -length:])
        progress("features", len(results), len(items))

    _in_batches(model, [len(item.encoded) for item in items], token_budget, run)
    return [results[i] for i in range(len(items))]


def _token_losses(logits: torch.Tensor, batch: Minibatch) -> torch.Tensor:
    """Loss of each token given all before it, (B, T); that of a first token is 0. A row at a time: float32 is large."""
    losses = torch.zeros(batch.input_ids.shape, device=logits.device)
    for row in range(len(logits)):
        losses[row, 1:] = F.cross_entropy(logits[row, :-1].float(), batch.input_ids[row, 1:], reduction="none")
    return losses


def _measure(item: _Item, states: torch.Tensor, losses: torch.Tensor) -> _Measured:
    device = states.device
    question = torch.tensor(item.encoded.is_question, device=device)
    answer = torch.tensor(item.encoded.is_answer_text, device=device)
    content = question | answer
    predicted = torch.arange(len(losses), device=device) > 0  # nothing stands before the first token
    answer_states = states[answer]
    similarity = None
    if question.any():
        similarity = float(F.cosine_similarity(states[question].mean(0), answer_states.mean(0), dim=0))
    return _Measured(
        F.normalize(states[content].mean(0), dim=0).cpu().numpy(),
        similarity,
        _consistency(answer_states, item.sentences),
        float(losses[content & predicted].double().mean()),
        float(losses[answer & predicted].double().mean()),
    )


def _consistency(states: torch.Tensor, sentences: Sequence[tuple[int, int]]) -> float | None:
    """Mean pairwise cosine of the sentences' mean states, those that truncation left."""
    means = [states[a:b].mean(0) for a, b in sentences if a < len(states)]
    if len(means) < 2:
        return None
    return _mean_pairwise_cosine(F.normalize(torch.stack(means), dim=1).cpu().numpy())


def _mean_pairwise_cosine(unit: np.ndarray) -> float:
    """Of n unit vectors (n, H), in closed form: the squared length of their sum is n plus all the cosines."""
    n = len(unit)
    total = unit.astype(np.float64).sum(0)
    return float((total @ total - n) / (n * (n - 1)))


def _answers_alone(model: Any, tokenizer: Any, items: Sequence[_Item], token_budget: int) -> list[float]:
    """Mean token loss of each answer with nothing before it but the token that begins a text."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [
        [start, *(t for t, mine in zip(i.encoded.input_ids, i.encoded.is_answer_text, strict=True) if mine)]
        for i in items
    ]
    results: dict[int, float] = {}

    def run(indices: list[int]) -> None:
        batch = pad_left([rows[i] for i in indices], tokenizer.pad_token_id, model.device)
        losses = _token_losses(model(**batch.model_inputs(), use_cache=False).logits, batch)
        for row, i in enumerate(indices):
            results[i] = float(losses[row, 1 - len(rows[i]) :].double().mean())

    _in_batches(model, [len(row) for row in rows], token_budget, run)
    return [results[i] for i in range(len(items))]


def _in_batches(model: Any, lengths: Sequence[int], token_budget: int, run: Callable[[list[int]], None]) -> None:
    """``run`` on indices, longest first, in evaluation mode; half the budget when memory runs out."""
    was_training = model.training
    model.eval()
    left = list(range(len(lengths)))
    try:
        with torch.inference_mode():
            while left:
                left, token_budget = _run_until_full(lengths, left, token_budget, run)
    finally:
        model.train(was_training)


def _run_until_full(
    lengths: Sequence[int], left: list[int], token_budget: int, run: Callable[[list[int]], None]
) -> tuple[list[int], int]:
    """Run batches of ``left``; what is left when memory ran out, and the budget to go on with."""
    batches: Iterator[list[int]] = batches_by_budget(left, lambda i: lengths[i], token_budget)
    done: set[int] = set()
    for batch in batches:
        try:
            run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            return [i for i in left if i not in done], len(batch) * max(lengths[i] for i in batch) // 2
        done |= set(batch)
    return [], token_budget


# From examples to the dataset


def _semantic(measured: Sequence[_Measured]) -> dict[str, float | None]:
    unit = np.stack([m.embedding for m in measured])
    finite = bool(np.isfinite(unit).all())
    several = len(unit) > 1 and finite
    return {
        "semantic_diversity": 1 - _mean_pairwise_cosine(unit) if several else None,
        "io_similarity": _finite_mean([m.similarity for m in measured if m.similarity is not None]),
        "semantic_consistency": _finite_mean([m.consistency for m in measured if m.consistency is not None]),
        "embedding_outlier_ratio": _outlier_ratio(unit) if several else None,
    }


def _outlier_ratio(unit: np.ndarray) -> float:
    """Of embeddings in the sample's own order, which does not depend on the file's."""
    return float((IsolationForest(contamination="auto", random_state=0).fit_predict(unit) < 0).mean())


def _perplexity(measured: Sequence[_Measured], alone: Sequence[float]) -> dict[str, float | None]:
    whole = [math.exp(m.loss) for m in measured if m.loss < MAX_LOSS]
    answers = [math.exp(m.answer_loss) for m in measured if m.answer_loss < MAX_LOSS]
    ratios = [m.answer_loss / loss for m, loss in zip(measured, alone, strict=True) if loss > 0]
    return {
        "reference_perplexity": _finite_mean(whole),
        "reference_perplexity_std": float(np.std(whole)) if _finite_mean(whole) is not None else None,
        "base_model_perplexity": _finite_mean(answers),
        "base_perplexity_std": float(np.std(answers)) if _finite_mean(answers) is not None else None,
        "instruction_following_difficulty": _finite_mean(ratios),
    }


def _finite_mean(values: Sequence[float]) -> float | None:
    mean = float(np.mean(values)) if values else math.nan
    return mean if math.isfinite(mean) else None
