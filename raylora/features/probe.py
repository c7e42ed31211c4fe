"""Features of a probe: a few optimizer steps from a fresh adapter, which is then thrown away.

The steps are those of ``raylora.training.loop``; an observer looks on.
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

from raylora.config import Method
from raylora.data.encoding import EncodedExample
from raylora.errors import UserError
from raylora.features.observer import ProbeObserver, global_norm
from raylora.features.static import FeatureResult, count_held_out, has_answer
from raylora.model.adapters import LoadedModel
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, ignore_progress
from raylora.rows import PROBE_NAMES
from raylora.training.gradients import Job
from raylora.training.loop import ONEDNN_FROM_TOKENS, count_tokens, train_adapter
from raylora.training.losses import ExampleLoss, example_losses

GENERAL_KNOWLEDGE = Path(__file__).parents[1] / "demo" / "general_knowledge.json"
RHO = 0.05
"""Radius of the sharpness (Foret et al. 2021)."""
Losses = Sequence[ExampleLoss]


def run_probe(
    loaded: LoadedModel,
    encoded: Sequence[EncodedExample],
    before: Losses,
    method: Method,
    probe_steps: int,
    seed: int,
    token_budget: int,
    progress: ProgressCallback = ignore_progress,
) -> FeatureResult:
    """Train ``probe_steps`` steps on most of the sample and measure what it did to the rest.

    Args:
        encoded: the sample, in an order that does not depend on the file's; its front is held out.
        before: losses of what is held out, with the base.

    Returns:
        The features of ``PROBE_NAMES``; null with a note where the probe cannot be run.
    """
    num_held_out = count_held_out(len(encoded))
    held_out, training = [e for e in encoded[:num_held_out] if has_answer(e)], encoded[num_held_out:]
    if not num_held_out:
        return _nothing("the probe needs two examples, one of them held out")
    if not sum(e.num_supervised for e in before):
        return _nothing("the held-out examples have no supervised token")
    known = {"initial_loss": mean_loss(before)}  # whatever comes of the probe
    if probe_steps == 0:
        return _nothing("the probe is off (--probe-steps 0)", **known)
    steps = Job((), training, method, seed, num_steps=probe_steps)
    pays = count_tokens(steps, probe_steps) >= ONEDNN_FROM_TOKENS
    faster = onednn_linears(loaded.model, token_budget, with_backward=True) if pays else contextlib.nullcontext()
    try:
        with faster:
            values = known | _probe(loaded, held_out, before, steps, token_budget, progress)
    except UserError as error:
        return _nothing(str(error), **known)
    finally:
        loaded.detach("probe")
    finite = _finite_values(values)
    return FeatureResult(finite, {k: _why_null(k) for k, v in finite.items() if v is None})


def _probe(
    loaded: LoadedModel,
    held_out: Sequence[EncodedExample],
    before: Losses,
    steps: Job,
    token_budget: int,
    progress: ProgressCallback,
) -> dict[str, float | None]:
    """What the steps' adapter does, which stays attached; a number of ``PROBE_NAMES`` each."""
    method = steps.method
    general_before = general_losses_of(loaded, token_budget)
    parameters = loaded.attach(method, steps.seed, name="probe")
    start = [p.detach().clone() for p in parameters]
    observer = ProbeObserver(parameters)
    train_adapter(
        loaded,
        parameters,
        steps.examples,
        method,
        steps.seed,
        num_steps=steps.num_steps,
        observer=observer,
        progress=lambda _, done, total: progress(ProgressStage.PROBE, done, total),
    )
    after = example_losses(loaded, held_out, method.train_on, token_budget, with_gradient=True)
    flatness = landscape_flatness(loaded, parameters, held_out, mean_loss(after), method, token_budget)
    general = example_losses(loaded, general_examples(loaded.tokenizer), "answer", token_budget)
    return {
        **_loss_features(before, after),
        **observer.features(),
        "avg_param_change": global_norm([p.detach() - s for p, s in zip(parameters, start, strict=True)]),
        "relative_weight_update": loaded.relative_weight_update("probe"),
        "landscape_flatness": flatness,
        "catastrophic_forgetting": mean_loss(general) / mean_loss(general_before) - 1,
    }


def _finite_values(values: dict[str, float | None]) -> dict[str, float | None]:
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def _why_null(name: str) -> str:
    reasons = {
        "loss_stability": "a trend needs three steps",
        "gradient_consistency": "needs two micro-batches with a gradient",
        "avg_grad_sparsity": "all gradients are zero",
        "landscape_flatness": "the held-out loss has no gradient",
    }
    return reasons.get(name, "the model gave no finite number")


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
    """1 / (1 + s): how much a step of length ``RHO`` along the held-out loss's gradient, which is there, raises it."""
    kept = [p.detach().clone() for p in parameters]
    norm = global_norm([p.grad for p in parameters if p.grad is not None])
    if not norm > 0:
        return None
    with torch.no_grad():
        for p in parameters:
            if p.grad is not None:
                p.add_(p.grad, alpha=RHO / norm)
        worse = mean_loss(example_losses(loaded, held_out, method.train_on, token_budget))
        for p, original in zip(parameters, kept, strict=True):
            p.copy_(original)
            p.grad = None
    return 1 / (1 + worse - loss)


def general_losses_of(loaded: LoadedModel, token_budget: int) -> Losses:
    """The base's, measured once a process."""
    if loaded.general_losses is None:
        with loaded.base():
            texts = general_examples(loaded.tokenizer)
            loaded.general_losses = example_losses(loaded, texts, "answer", token_budget)
    return loaded.general_losses


def general_examples(tokenizer: Any) -> list[EncodedExample]:
    """Plain texts of general knowledge, written for this project; every token but the first is predicted."""
    rows = tokenizer(json.loads(GENERAL_KNOWLEDGE.read_text(encoding="utf-8")))["input_ids"]
    return [EncodedExample(ids, [False] * len(ids), [True] * len(ids), [True] * len(ids)) for ids in rows]


def mean_loss(losses: Losses) -> float:
    count = sum(e.num_supervised for e in losses)
    return sum(e.total for e in losses) / count if count else math.nan


def _perplexity_of(losses: Losses) -> float:
    """Mean over examples of exp(mean token loss), as ``base_model_perplexity`` has it."""
    with np.errstate(over="ignore"):  # beyond floats it is infinite, and what is made of it null
        return float(np.mean(np.exp([e.answer for e in losses if e.num_supervised])))


def _nothing(reason: str, **known: float) -> FeatureResult:
    values = {**dict.fromkeys(PROBE_NAMES), **_finite_values(dict(known))}
    return FeatureResult(values, {name: reason for name, value in values.items() if value is None})
