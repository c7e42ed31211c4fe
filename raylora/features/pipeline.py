"""All features of one dataset: static ones from its texts and forward passes, dynamic ones from a probe."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from raylora.config.method import Method
from raylora.config.options import FeatureOptions
from raylora.data.datasets import sample_examples
from raylora.data.template_check import held_to_template
from raylora.features.analyzer import HyperParams
from raylora.features.probe import run_probe
from raylora.features.static import OfLoadedModel, as_dataset, extract_static, join_notes
from raylora.model.adapters import LoadedModel
from raylora.model.loading import borrowed
from raylora.records import Dataset, Example, ProgressCallback, ignore_progress
from raylora.rows import FEATURE_NAMES


def extract_features(
    loaded: LoadedModel,
    dataset: Dataset,
    method: Method,
    options: FeatureOptions,
    token_budget: int,
    seed: int,
    progress: ProgressCallback = ignore_progress,
) -> dict[str, Any]:
    """Measure every feature of a dataset.

    Args:
        method: the hyperparameters of the probe's training.
        token_budget: most tokens in a minibatch.
        seed: mixed with the dataset's own; draws the sample and seeds the probe.

    Returns:
        Features by column name, None where one could not be measured; ``feature_notes``, the reasons for each None, and
        what does not compare with larger samples;
        ``text_seconds``, ``static_seconds`` (those of text included) and ``probe_seconds``.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    started = time.perf_counter()
    sample = sample_examples(dataset.examples, options.sample_size, dataset.seed ^ seed)
    static = extract_static(
        loaded.model, loaded.tokenizer, dataset, sample, method.max_length, token_budget, method.train_on, progress
    )
    static_done = time.perf_counter()
    dynamic = run_probe(
        loaded,
        static.held_out,
        static.held_out_losses,
        static.training,
        method,
        options.probe_steps,
        (dataset.seed ^ seed) % 2**62,
        token_budget,
        progress,
        options.sample_size,
    )
    values: dict[str, Any] = {**dict.fromkeys(FEATURE_NAMES), **static.values, **dynamic.values}
    values["feature_notes"] = join_notes({**static.notes, **dynamic.notes})
    values["text_seconds"] = static.text_seconds
    values["static_seconds"] = static_done - started
    values["probe_seconds"] = time.perf_counter() - static_done
    return values


class FeatureExtractionPipeline(OfLoadedModel):
    """All features of a dataset."""

    def extract_all_features(
        self,
        dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]],
        hyperparams: HyperParams,
        sample_size: int = 0,
        batch_size: int = 8,
        probe_steps: int = 100,
        enable_dynamic_probes: bool = True,
    ) -> dict[str, Any]:
        """Every feature by column name, None where it could not be measured, and ``feature_notes``.

        Args:
            dataset: what ``read_dataset`` returned, Examples, or dicts in any of the known formats.
            hyperparams: those of the probe's training.
            sample_size: examples that the model looks at (0: all).
            batch_size: examples in a micro-batch of the probe.
            probe_steps: optimizer steps of the probe.
            enable_dynamic_probes: False: no probe, its features are None.

        Raises:
            UserError: there is no valid example, or none that the chat template takes with its answer.
        """
        options = FeatureOptions(sample_size=sample_size, probe_steps=probe_steps if enable_dynamic_probes else 0)
        converted = held_to_template(self.tokenizer, as_dataset(dataset))
        with borrowed(self.model, self.tokenizer) as loaded:
            method, budget = hyperparams.method(batch_size), loaded.feature_token_budget
            return extract_features(loaded, converted, method, options, budget, seed=0)

    def run_quick_pipeline(
        self,
        dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]],
        hyperparams: HyperParams,
        sample_size: int = 0,
        batch_size: int = 4,
        probe_steps: int = 10,
    ) -> dict[str, Any]:
        """``extract_all_features`` with a short probe of 10 steps."""
        return self.extract_all_features(dataset, hyperparams, sample_size, batch_size, probe_steps)
