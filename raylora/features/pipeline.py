"""All features of one dataset: static ones from a look at its sample, dynamic ones from a probe."""

from __future__ import annotations

import time
from typing import Any

from raylora.config import FeatureOptions, Method
from raylora.datasets import sample_examples
from raylora.encoding import encode_example
from raylora.features.columns import FEATURE_NAMES
from raylora.features.dynamic import run_probe
from raylora.features.static import extract_static, join_notes
from raylora.model import LoadedModel
from raylora.records import Dataset, Progress, ignore_progress


def extract_features(
    loaded: LoadedModel,
    dataset: Dataset,
    method: Method,
    options: FeatureOptions,
    token_budget: int,
    seed: int,
    progress: Progress = ignore_progress,
) -> dict[str, Any]:
    """Every feature by column name, with ``feature_notes`` and the seconds of each part.

    A feature that could not be measured is None, and its reason stands in ``feature_notes``.
    """
    started = time.perf_counter()
    sample = sample_examples(dataset.examples, options.sample_size, dataset.seed ^ seed)
    static = extract_static(
        loaded.model, loaded.tokenizer, dataset, sample, method.max_length, token_budget, progress=progress
    )
    static_done = time.perf_counter()
    encoded = [encode_example(loaded.tokenizer, example, method.max_length) for example in sample]
    dynamic = run_probe(loaded, encoded, method, options.probe_steps, (dataset.seed ^ seed) % 2**62, progress)
    values: dict[str, Any] = {**dict.fromkeys(FEATURE_NAMES), **static.values, **dynamic.values}
    notes = {**static.notes, **dynamic.notes}
    values["feature_notes"] = join_notes(notes)
    values["static_seconds"] = static_done - started
    values["probe_seconds"] = time.perf_counter() - static_done
    return values
