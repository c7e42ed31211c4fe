"""Features of a dataset that need no training: of all its texts, and of a sample through the base model."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import IsolationForest

from raylora.data.datasets import sample_examples
from raylora.data.encoding import EncodedExample, TrainOn
from raylora.data.parse_record import parse_record
from raylora.errors import ErrorKind, UserError
from raylora.features import text
from raylora.features.measure import Measured, answers_alone, make_item, mean_pairwise_cosine, measure_all
from raylora.model.onednn import onednn_linears
from raylora.records import Dataset, Example, ProgressCallback, ignore_progress
from raylora.rows import STATIC_NAMES
from raylora.training.losses import ExampleLoss

HELD_OUT_SHARE = 0.2
MAX_HELD_OUT = 32


@dataclass(frozen=True)
class FeatureResult:
    """Features by name, None where one could not be measured, and the reason for each None."""

    values: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StaticResult(FeatureResult):
    """Beside the features, what the probe goes on with: the sample's token ids and, for those it holds out, losses.

    ``text_seconds`` are those of the features of size and text, which need no model.
    """

    encoded: list[EncodedExample] = field(default_factory=list)
    held_out_losses: list[ExampleLoss] = field(default_factory=list)
    text_seconds: float = 0.0


def count_held_out(num_examples: int) -> int:
    """How many examples at the front of a sample the probe holds out: a fifth, 1 to 32, never the only one."""
    return min(MAX_HELD_OUT, max(1, round(num_examples * HELD_OUT_SHARE))) if num_examples > 1 else 0


def has_answer(encoded: EncodedExample) -> bool:
    return any(encoded.is_answer_text)


class OfLoadedModel:
    """Measures with a model that is loaded already, and is after every call as it was before, modules and flags too.

    Args:
        model: a transformers causal language model.
        device: where the model is moved to; by default it stays where it is.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str | None = None) -> None:
        self.model = model.to(device) if device is not None else model
        self.tokenizer = tokenizer


class StaticFeatureExtractor(OfLoadedModel):
    """Static features of a dataset."""

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
    num_bad = num_chars = 0
    for record in dataset:
        if isinstance(record, Example):
            examples.append(record)
            num_chars += sum(len(m.content) for m in record.messages) + len(record.answer)
        else:
            parsed, errors = parse_record(dict(record))
            examples += parsed
            num_bad += len(errors)
            num_chars += _num_chars(record)
    if not examples:
        raise UserError("the dataset has no valid example", kind=ErrorKind.BAD_RECORDS)
    return Dataset("", tuple(examples), len(dataset), num_chars, num_bad_records=num_bad)


def _num_chars(value: Any) -> int:
    """Characters over all strings of a record."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(_num_chars(part) for part in parts)


def join_notes(notes: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in notes.items())


def extract_static(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    sample: Sequence[Example],
    max_length: int = 1024,
    token_budget: int = 512,
    train_on: TrainOn = "answer",
    progress: ProgressCallback = ignore_progress,
) -> StaticResult:
    """Static features: of size and text from all of ``dataset``, the others from ``sample``.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    items = [make_item(tokenizer, example, max_length) for example in sample]
    num_held_out = count_held_out(len(items))
    # What is held out is measured by itself, so that the probe measures it again in the same batches.
    held_out = [item for item in items[:num_held_out] if has_answer(item.encoded)]
    others = [item for item in items[num_held_out:] if has_answer(item.encoded)]
    usable = [*held_out, *others]
    values: dict[str, Any] = dict.fromkeys(STATIC_NAMES)
    values |= {"dataset_num_items": dataset.num_items, "dataset_total_chars": dataset.total_chars}
    started = time.perf_counter()
    words, notes = text.text_features(dataset.examples, tokenizer)
    text_seconds = time.perf_counter() - started
    values |= words
    held_out_losses: list[ExampleLoss] = []
    num_valid = 0
    if usable:
        with onednn_linears(model, token_budget, with_head=True):
            first = measure_all(model, tokenizer, held_out, train_on, token_budget, progress)
            held_out_losses = [m.labels for m in first]
            measured = [*first, *measure_all(model, tokenizer, others, train_on, token_budget, progress)]
            alone = answers_alone(model, tokenizer, usable, token_budget)
        # One example that the model has no number for must not take those of all others with it.
        numbers = [i for i, m in enumerate(measured) if m.is_finite and math.isfinite(alone[i])]
        measured, alone = [measured[i] for i in numbers], [alone[i] for i in numbers]
        num_valid = len(numbers)
        if measured:
            values |= _semantic(measured) | _perplexity(measured, alone) | _activations(measured)
    for name in STATIC_NAMES:
        if values[name] is None:
            notes.setdefault(name, _reason(name, len(usable), num_valid))
    num_null = sum(values[name] is None for name in STATIC_NAMES)
    values |= {
        "static_valid_count": num_valid,
        "static_skipped_count": len(items) - num_valid,
        "static_imputed_count": 0,
        "static_coverage": 1 - num_null / len(STATIC_NAMES),
    }
    return StaticResult(values, notes, [i.encoded for i in items], held_out_losses, text_seconds)


def _reason(name: str, num_usable: int, num_valid: int) -> str:
    if num_usable == 0:
        return "no example of the sample has an answer within --max-length"
    if num_valid == 0:
        return "the model gave no finite number"
    if name == "semantic_consistency":
        return "no answer has two sentences"
    if name == "avg_activation_sparsity":
        return "the model names its MLPs in a way that is not known here"
    if name in {"semantic_diversity", "embedding_outlier_ratio"} and num_valid < 2:
        return "needs two examples"
    return "the model gave no finite number"


# From examples to the dataset


def _semantic(measured: Sequence[Measured]) -> dict[str, float | None]:
    unit = np.stack([m.embedding for m in measured])
    several = len(unit) > 1
    return {
        "semantic_diversity": 1 - mean_pairwise_cosine(unit) if several else None,
        "io_similarity": _finite_mean([m.similarity for m in measured if m.similarity is not None]),
        "semantic_consistency": _finite_mean([m.consistency for m in measured if m.consistency is not None]),
        "embedding_outlier_ratio": _outlier_ratio(unit) if several else None,
    }


def _outlier_ratio(unit: np.ndarray) -> float:
    """Of embeddings in the sample's own order, which does not depend on the file's."""
    return float((IsolationForest(contamination="auto", random_state=0).fit_predict(unit) < 0).mean())


def _perplexity(measured: Sequence[Measured], alone: Sequence[float]) -> dict[str, float | None]:
    with np.errstate(over="ignore"):  # a perplexity beyond floats makes the mean infinite, and so null
        whole, answers = np.exp([m.loss for m in measured]), np.exp([m.answer_loss for m in measured])
    ratios = [m.answer_loss / loss for m, loss in zip(measured, alone, strict=True) if loss > 0]
    return {
        "reference_perplexity": _finite_mean(whole),
        "reference_perplexity_std": _finite_std(whole),
        "base_model_perplexity": _finite_mean(answers),
        "base_perplexity_std": _finite_std(answers),
        "instruction_following_difficulty": _finite_mean(ratios),
    }


def _activations(measured: Sequence[Measured]) -> dict[str, float | None]:
    shares = [m.activation_sparsity for m in measured if m.activation_sparsity is not None]
    return {"avg_activation_sparsity": _finite_mean(shares)}


def _finite_mean(values: Sequence[float] | np.ndarray) -> float | None:
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def _finite_std(values: np.ndarray) -> float | None:
    return float(np.std(values)) if _finite_mean(values) is not None else None
