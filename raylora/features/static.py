"""Features of a dataset that need no training: from all its texts, and from forward passes over a sample of it."""

from __future__ import annotations

import itertools
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
from raylora.data.held_out import Split, split_conversations
from raylora.data.parse_record import parse_record
from raylora.data.template_check import held_to_template
from raylora.errors import ErrorKind, UserError
from raylora.features import text
from raylora.features.measure import Measured, answers_alone, make_item, mean_pairwise_cosine, measure_all, start_token
from raylora.model.loading import borrowed
from raylora.model.onednn import onednn_linears
from raylora.records import Dataset, Example, ProgressCallback, ignore_progress
from raylora.rows import STATIC_NAMES
from raylora.training.losses import ExampleLoss

HELD_OUT_SHARE = 0.2
"""Of the sample, what the probe holds out; at most ``MAX_HELD_OUT`` examples."""
MAX_HELD_OUT = 32
NUM_FORESTS = 8
"""Isolation forests whose outliers are counted. Of 100 clean examples one forest calls 3 to 9% outlying, by its seed: a
standard deviation of 1.3%. That of the mean of 8 is 0.5%, a fifth of what a draw of other examples moves it by."""
MIN_OUTLIER_EXAMPLES = 50
"""Of fewer, a forest calls ever more outlying whatever they are: 9% of 50 clean ones, 19% of 20, 27% of 8."""


@dataclass(frozen=True)
class FeatureResult:
    """Features by name, None where one could not be measured; the reason for each None, and other notes."""

    values: dict[str, Any]
    notes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StaticResult(FeatureResult):
    """The static features, and what the probe takes over, so that it need not compute it again."""

    held_out: list[EncodedExample] = field(default_factory=list)
    """The examples that the probe holds out, those without an answer left out."""
    held_out_losses: list[ExampleLoss] = field(default_factory=list)
    """The base model's losses on them."""
    training: list[EncodedExample] = field(default_factory=list)
    """The examples that the probe trains on."""
    text_seconds: float = 0.0
    """Seconds of the features of size and text, which need no model."""


def count_held_out(num_examples: int) -> int:
    """How many examples the probe holds out: a fifth, 1 to 32; 0 where there is only one."""
    return min(MAX_HELD_OUT, max(1, round(num_examples * HELD_OUT_SHARE))) if num_examples > 1 else 0


def split_sample(sample: Sequence[Example]) -> Split:
    """Which examples the probe holds out, ``count_held_out`` at most, and which it trains on, by whole conversations.

    An example's messages hold the answers of its conversation's earlier turns: if one turn were trained on and another
    held out, the held-out loss would be that of a text that the training has seen. Where there are no two
    conversations there is nothing to train on either.
    """
    conversations = [example.conversation or i for i, example in enumerate(sample)]
    split = split_conversations(conversations, count_held_out(len(sample)))
    return split if split.held_out else Split([], [])


def has_answer(encoded: EncodedExample) -> bool:
    """Whether the example has a token of its answer within ``max_length``."""
    return any(encoded.is_answer_text)


class OfLoadedModel:
    """A measurement with a model that the caller has loaded; each call leaves it as it was, modules and flags too.

    Args:
        model: a transformers causal language model.
        device: the model is moved to it; by default it stays where it is.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str | None = None) -> None:
        self.model = model.to(device) if device is not None else model
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        name = getattr(getattr(self.model, "config", None), "name_or_path", "")
        return f"{type(self).__name__}({type(self.model).__name__} {name!r})"


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
            dataset: what ``read_dataset`` returned, Examples, or dicts in any of the known formats.
            sample_size: examples that the model looks at (0: all).
            batch_size: examples of ``max_length`` tokens in a batch; more of shorter ones.
            max_length: tokens of an example; the front of a longer one is cut.

        Raises:
            UserError: there is no valid example, or none that the chat template takes with its answer.
            torch.OutOfMemoryError: a single example does not fit.
        """
        converted = held_to_template(self.tokenizer, as_dataset(dataset))
        sample = sample_examples(converted.examples, sample_size, converted.seed)
        budget = batch_size * max_length
        result = extract_static(self.model, self.tokenizer, converted, sample, max_length, budget)
        return {**result.values, "feature_notes": join_notes(result.notes)}

    calculate_special_char_ratio = staticmethod(text.calculate_special_char_ratio)
    calculate_answer_groundedness = staticmethod(text.calculate_answer_groundedness)


def as_dataset(dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]]) -> Dataset:
    """A Dataset of what users hold: a Dataset, Examples, or dicts as in a dataset file. Bad dicts are counted.

    Raises:
        UserError: none of them is valid.
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
            parsed = parse_record(dict(record))
            examples += parsed.examples
            num_bad += len(parsed.errors)
            num_chars += _num_chars(record)
    if not examples:
        raise UserError("the dataset has no valid example", kind=ErrorKind.BAD_RECORDS)
    return Dataset("", tuple(examples), len(dataset), num_chars, num_bad_records=num_bad)


def _num_chars(value: Any) -> int:
    """Characters of all strings in a record, at any depth."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(_num_chars(part) for part in parts)


def join_notes(notes: Mapping[str, str]) -> str:
    """The text of ``feature_notes``, from the note on each feature that has one: "name: note; name: note"."""
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
    """Measure the static features: those of size and text on all of ``dataset``, the others on ``sample``.

    Args:
        sample: examples of ``dataset``; the probe holds some of them out (``split_sample``).
        max_length: tokens of an example; the front of a longer one is cut.
        token_budget: most tokens in a minibatch.
        train_on: the tokens whose losses are kept for the probe.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    items = [make_item(tokenizer, example, max_length) for example in sample]
    split = split_sample(sample)
    # Held-out examples are in batches of their own: the probe measures them again after its training, and the same
    # batches give comparable losses.
    held_out = [items[i] for i in split.held_out if has_answer(items[i].encoded)]
    others = [items[i] for i in split.training or range(len(items)) if has_answer(items[i].encoded)]
    usable = [*held_out, *others]
    values: dict[str, Any] = dict.fromkeys(STATIC_NAMES)
    values |= {"dataset_num_items": dataset.num_items, "dataset_total_chars": dataset.total_chars}
    started = time.perf_counter()
    text_values, notes = text.text_features(dataset.examples, tokenizer)
    text_seconds = time.perf_counter() - started
    values |= text_values
    held_out_losses: list[ExampleLoss] = []
    num_valid = 0
    if usable:
        with borrowed(model, tokenizer) as loaded, onednn_linears(model, token_budget, with_head=True):
            measured_held_out = measure_all(loaded, held_out, train_on, token_budget, progress)
            held_out_losses = [m.labels for m in measured_held_out]
            measured = [*measured_held_out, *measure_all(loaded, others, train_on, token_budget, progress)]
            losses_alone = answers_alone(loaded, usable, token_budget)
        # An example on which the model overflows (NaN, infinity) is left out: it would make every mean infinite or NaN.
        finite_alone = [loss is None or math.isfinite(loss) for loss in losses_alone]
        is_valid = [m.is_finite and finite for m, finite in zip(measured, finite_alone, strict=True)]
        measured = list(itertools.compress(measured, is_valid))
        losses_alone = list(itertools.compress(losses_alone, is_valid))
        num_valid = len(measured)
        if measured:
            values |= _semantic(measured) | _perplexity(measured, losses_alone) | _activations(measured)
        if measured and start_token(tokenizer) is None:
            notes["instruction_following_difficulty"] = "the tokenizer has no token that begins or ends a text"
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
    training = [items[i].encoded for i in split.training]
    return StaticResult(values, notes, [i.encoded for i in held_out], held_out_losses, training, text_seconds)


def _reason(name: str, num_usable: int, num_valid: int) -> str:
    """Why a static feature is None; the text features bring their own reasons."""
    if num_usable == 0:
        return "no example of the sample has an answer within --max-length"
    if num_valid == 0:
        return "the model gave no finite number"
    if name == "semantic_consistency":
        return "no answer has two sentences"
    if name == "avg_activation_sparsity":
        return "the model names its MLPs in a way that is not known here"
    if name == "semantic_diversity" and num_valid < 2:
        return "needs two examples"
    if name == "embedding_outlier_ratio" and num_valid < MIN_OUTLIER_EXAMPLES:
        return f"needs {MIN_OUTLIER_EXAMPLES} examples"
    return "the model gave no finite number"


# Features of the dataset from those of its examples


def _semantic(measured: Sequence[Measured]) -> dict[str, float | None]:
    embeddings = np.stack([m.embedding for m in measured])  # (N, H), of unit length
    has_pairs = len(embeddings) > 1
    return {
        "semantic_diversity": 1 - mean_pairwise_cosine(embeddings) if has_pairs else None,
        "io_similarity": _finite_mean([m.similarity for m in measured if m.similarity is not None]),
        "semantic_consistency": _finite_mean([m.consistency for m in measured if m.consistency is not None]),
        "embedding_outlier_ratio": outlier_ratio(embeddings) if len(embeddings) >= MIN_OUTLIER_EXAMPLES else None,
    }


def outlier_ratio(embeddings: np.ndarray) -> float:
    """Share of embeddings (N, H) that an isolation forest calls outliers, mean of ``NUM_FORESTS`` forests.

    A forest depends on the order of rows: it is the sample's, which does not depend on the file's.
    """
    forests = (IsolationForest(contamination="auto", random_state=seed) for seed in range(NUM_FORESTS))
    return float(np.mean([(forest.fit_predict(embeddings) < 0).mean() for forest in forests]))


def _perplexity(measured: Sequence[Measured], losses_alone: Sequence[float | None]) -> dict[str, float | None]:
    """``losses_alone`` are the losses of the answers without their questions, in nats per token, None if unknown."""
    with np.errstate(over="ignore"):  # a perplexity that overflows makes the mean infinite, and the feature None
        of_all, of_answer = np.exp([m.loss for m in measured]), np.exp([m.answer_loss for m in measured])
    ratios = [m.answer_loss / alone for m, alone in zip(measured, losses_alone, strict=True) if alone and alone > 0]
    return {
        "reference_perplexity": _finite_mean(of_all),
        "reference_perplexity_std": _finite_std(of_all),
        "base_model_perplexity": _finite_mean(of_answer),
        "base_perplexity_std": _finite_std(of_answer),
        "instruction_following_difficulty": _finite_mean(ratios),
    }


def _activations(measured: Sequence[Measured]) -> dict[str, float | None]:
    shares = [m.activation_sparsity for m in measured if m.activation_sparsity is not None]
    return {"avg_activation_sparsity": _finite_mean(shares)}


def _finite_mean(values: Sequence[float] | np.ndarray) -> float | None:
    """The mean; None where there are no values, or it is infinite or NaN."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean if math.isfinite(mean) else None


def _finite_std(values: np.ndarray) -> float | None:
    return float(np.std(values)) if _finite_mean(values) is not None else None
