"""Features of a probe: a few optimizer steps with a fresh adapter, which is thrown away afterwards.

The steps are run by ``raylora.training.loop``, as a training's are; a ``ProbeObserver`` measures their gradients.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylora.config.method import Method
from raylora.data.encoding import EncodedExample
from raylora.errors import UserError
from raylora.features.observer import ProbeObserver, global_norm
from raylora.features.static import FeatureResult
from raylora.model.adapters import LoadedModel
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, ignore_progress
from raylora.rows import PROBE_NAMES
from raylora.training.gradients import Job
from raylora.training.loop import ONEDNN_FROM_TOKENS, count_tokens, train_adapter
from raylora.training.losses import ExampleLoss, example_losses

GENERAL_KNOWLEDGE = Path(__file__).parents[1] / "demo" / "general_knowledge.json"
RHO = 0.05
"""Length of the step along the gradient for ``landscape_flatness``: the default of sharpness-aware minimization (Foret
et al. 2021)."""
DRIFTING = ("gradient_consistency", "avg_param_change", "relative_weight_update", "landscape_flatness")
"""Features that move with the number of examples. A probe of 20 steps of 16 goes 4 times over what it trains on of 100
examples, 64 times over that of 6, and micro-batches that share examples have gradients alike: of 6, 25 and 100 examples
of one distribution ``gradient_consistency`` is 0.24, 0.16 and 0.07 (benchmarks/NOTES.md)."""
COMPARABLE_FROM = 100
"""Examples from which they are not noted: of 50, each still differs by more than draws of one distribution do."""
Losses = Sequence[ExampleLoss]


def run_probe(
    loaded: LoadedModel,
    held_out: Sequence[EncodedExample],
    before: Losses,
    training: Sequence[EncodedExample],
    method: Method,
    probe_steps: int,
    seed: int,
    token_budget: int,
    progress: ProgressCallback = ignore_progress,
    sample_size: int = 0,
) -> FeatureResult:
    """Train a fresh adapter for ``probe_steps`` steps on one part of a sample, and measure it on the other.

    Args:
        held_out: the examples to measure, each with an answer; the parts are those of ``split_sample``.
        before: the base's losses on them.
        training: the examples to train on, in an order that does not depend on the file's.
        token_budget: most tokens in a minibatch that is measured; a training has a budget of its own.
        sample_size: as in ``drift_notes``.

    Returns:
        The features of ``PROBE_NAMES``; those that could not be measured are None, with a note that says why. Others
        have a note where they do not compare with those of larger samples.

    Raises:
        torch.OutOfMemoryError: a single example does not fit (MemoryError or RuntimeError on a CPU).
    """
    if not training:
        return _unmeasured("the probe needs two conversations, one of them held out")
    if not sum(e.num_supervised for e in before):
        return _unmeasured("the held-out examples have no supervised token")
    base_values = {"initial_loss": mean_loss(before)}  # of the base: it needs no probe, and stays if that fails
    if probe_steps == 0:
        return _unmeasured("the probe is off (--probe-steps 0)", **base_values)
    job = Job((), training, method, seed, num_steps=probe_steps)
    use_onednn = count_tokens(job, probe_steps) >= ONEDNN_FROM_TOKENS
    products = (
        onednn_linears(loaded.model, token_budget, with_backward=True) if use_onednn else contextlib.nullcontext()
    )
    try:
        with products:
            values = base_values | _probe(loaded, held_out, before, job, token_budget, progress)
    except UserError as error:  # no target module, or the training diverged: the row's other features stay
        return _unmeasured(str(error), **base_values)
    finally:
        loaded.detach("probe")
    finite = _finite_values(values)
    notes = {k: _why_null(k) for k, v in finite.items() if v is None}
    if probe_steps * method.batch_size * method.gradient_accumulation > len(training):
        notes = drift_notes(len(held_out) + len(training), sample_size) | notes
    return FeatureResult(finite, notes)


def _probe(
    loaded: LoadedModel,
    held_out: Sequence[EncodedExample],
    before: Losses,
    job: Job,
    token_budget: int,
    progress: ProgressCallback,
) -> dict[str, float | None]:
    """Attach an adapter, train it for ``job``'s steps, and measure it; the caller detaches it.

    Returns:
        The features of ``PROBE_NAMES``, by name, without ``initial_loss``.
    """
    method = job.method
    general_before = general_losses_of(loaded, token_budget)
    parameters = loaded.attach(method, job.seed, "probe", job.examples)
    initial = [p.detach().clone() for p in parameters]
    observer = ProbeObserver(parameters)
    train_adapter(
        loaded,
        parameters,
        job.examples,
        method,
        job.seed,
        num_steps=job.num_steps,
        observer=observer,
        progress=lambda _, done, total: progress(ProgressStage.PROBE, done, total),
    )
    # With the gradient of the held-out loss, along which ``landscape_flatness`` takes its step.
    after = example_losses(loaded, held_out, method.train_on, token_budget, with_gradient=True)
    flatness = landscape_flatness(loaded, parameters, held_out, mean_loss(after), method, token_budget)
    general = example_losses(loaded, general_examples(loaded.tokenizer), "answer", token_budget)
    return {
        **_loss_features(before, after),
        **observer.features(),
        "avg_param_change": global_norm([p.detach() - s for p, s in zip(parameters, initial, strict=True)]),
        "relative_weight_update": loaded.relative_weight_update("probe"),
        "landscape_flatness": flatness,
        "catastrophic_forgetting": mean_loss(general) / mean_loss(general_before) - 1,
    }


def _finite_values(values: dict[str, float | None]) -> dict[str, float | None]:
    """``values`` with None in place of infinity and NaN."""
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def _why_null(name: str) -> str:
    """The note of a feature that is None although the probe was run."""
    reasons = {
        "loss_stability": "a trend needs three steps",
        "gradient_consistency": "needs two micro-batches with a gradient",
        "avg_grad_sparsity": "all gradients are zero",
        "landscape_flatness": "the held-out loss has no gradient",
    }
    return reasons.get(name, "the model gave no finite number")


def drift_notes(num_examples: int, sample_size: int) -> dict[str, str]:
    """The notes of features whose sample is smaller than that of other datasets, and that move with its size.

    Args:
        num_examples: of the sample.
        sample_size: what the other datasets' samples have, if these are large enough; 0: all their examples.
    """
    if num_examples >= min(COMPARABLE_FROM, sample_size or COMPARABLE_FROM):
        return {}
    return dict.fromkeys(DRIFTING, f"below {COMPARABLE_FROM} examples it depends on their number ({num_examples} here)")


def _loss_features(before: Losses, after: Losses) -> dict[str, float | None]:
    initial, final = mean_loss(before), mean_loss(after)
    return {
        "perplexity_change_rate": _perplexity_of(after) / _perplexity_of(before) - 1,
        "loss_decay_rate": (initial - final) / initial if initial else None,
    }


def landscape_flatness(
    loaded: LoadedModel,
    parameters: Sequence[torch.nn.Parameter],
    held_out: Sequence[EncodedExample],
    loss: float,
    method: Method,
    token_budget: int,
) -> float | None:
    """1 / (1 + s), where s is how much a step of length ``RHO`` along its gradient raises the held-out loss.

    The parameters have their values back afterwards.

    Args:
        parameters: with the gradient of the held-out loss in their ``grad``.
        loss: the held-out loss, in nats per token.

    Returns:
        None where the gradient is zero or NaN.
    """
    originals = [p.detach().clone() for p in parameters]
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    if not norm > 0:
        return None
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.add_(p.grad, alpha=RHO / norm)
        raised = mean_loss(example_losses(loaded, held_out, method.train_on, token_budget))
        for p, original in zip(parameters, originals, strict=True):
            p.copy_(original)
            p.grad = None
    return 1 / (1 + raised - loss)


def general_losses_of(loaded: LoadedModel, token_budget: int) -> Losses:
    """The base's losses on texts of general knowledge, measured once for each LoadedModel."""
    if loaded.general_losses is None:
        with loaded.base():
            texts = general_examples(loaded.tokenizer)
            loaded.general_losses = example_losses(loaded, texts, "answer", token_budget)
    return loaded.general_losses


def general_examples(tokenizer: Any) -> list[EncodedExample]:
    """Texts of general knowledge, without a chat template, written for this project.

    They measure what a probe makes the model forget. Every token is marked as answer: all but the first have a loss.
    """
    rows = tokenizer(json.loads(GENERAL_KNOWLEDGE.read_text(encoding="utf-8")))["input_ids"]
    return [EncodedExample(ids, [False] * len(ids), [True] * len(ids), [True] * len(ids)) for ids in rows]


def mean_loss(losses: Losses) -> float:
    """Mean over all supervised tokens of all examples, in nats; NaN where there is none."""
    count = sum(e.num_supervised for e in losses)
    return sum(e.total for e in losses) / count if count else math.nan


def _perplexity_of(losses: Losses) -> float:
    """Mean over examples of exp(mean loss of the answer's tokens), the definition of ``base_model_perplexity``."""
    with np.errstate(over="ignore"):  # exp of more than 709 is infinite; _finite_values then makes the feature None
        return float(np.mean(np.exp([e.answer for e in losses if e.num_supervised])))


def _unmeasured(reason: str, **base_values: float) -> FeatureResult:
    """The result where the probe was not run, or failed: all features None for ``reason``, but those of the base."""
    values = {**dict.fromkeys(PROBE_NAMES), **_finite_values(dict(base_values))}
    return FeatureResult(values, {name: reason for name, value in values.items() if value is None})
