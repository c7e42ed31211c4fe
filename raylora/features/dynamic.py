"""Features of a probe: a few optimizer steps from a fresh adapter, which is then thrown away.

The steps are those of ``raylora.train``; an observer keeps a few numbers a step and running sums, no gradient.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raylora.config import Method
from raylora.datasets import sample_examples
from raylora.encoding import IGNORE_INDEX, EncodedExample, encode_example
from raylora.features.columns import PROBE_NAMES
from raylora.features.static import FeatureResult, OfLoadedModel, as_dataset, count_held_out, has_answer, join_notes
from raylora.losses import example_losses
from raylora.model import LoadedModel, as_loaded
from raylora.passes import Step, StepGradient, separate_gradients
from raylora.records import Dataset, Example, Progress, UserError, ignore_progress
from raylora.train import take_step, train_adapter

GENERAL_KNOWLEDGE = Path(__file__).parents[1] / "demo" / "general_knowledge.json"
SPARSE_BELOW = 0.01
"""A gradient entry counts as sparse below this share of its tensor's root mean square."""
RHO = 0.05
"""Radius of the sharpness (Foret et al. 2021)."""
Losses = list[tuple[float, int]]
"""Summed loss and number of supervised tokens, by example."""


@dataclass(frozen=True)
class HyperParams:
    """What the research code calls the hyperparameters of a probe; all others have raylora's defaults."""

    learning_rate: float = 2e-4
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.1

    def method(self, batch_size: int) -> Method:
        return Method(**vars(self), batch_size=batch_size)


class ProbeObserver:
    """Losses, norms and sparsities of the steps, and the running sum of the micro-batches' unit gradients."""

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self.parameters = parameters
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.sparsities: list[float] = []
        self._sum = [torch.zeros_like(p) for p in parameters]
        self._num_units = 0
        self._step_sum = [torch.zeros_like(p) for p in parameters]
        self._num_step_units = 0

    def begin_step(self) -> None:
        for total in self._step_sum:
            total.zero_()
        self._num_step_units = 0

    def after_micro_batch(self) -> None:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = global_norm(gradients)
        if norm > 0 and math.isfinite(norm):
            for total, p in zip(self._step_sum, self.parameters, strict=True):
                if p.grad is not None:
                    total.add_(p.grad, alpha=1 / norm)
            self._num_step_units += 1

    def before_clipping(self) -> None:
        for total, of_step in zip(self._sum, self._step_sum, strict=True):
            total += of_step
        self._num_units += self._num_step_units
        sparsity = gradient_sparsity([p.grad for p in self.parameters if p.grad is not None])
        if sparsity is not None:
            self.sparsities.append(sparsity)

    def after_step(self, step: Step) -> None:
        self.losses.append(step.loss)
        self.grad_norms.append(step.grad_norm)

    def gradient_consistency(self) -> float | None:
        """Mean pairwise cosine of the n unit gradients: the squared length of their sum is n plus all the cosines."""
        n = self._num_units
        return float((global_norm(self._sum) ** 2 - n) / (n * (n - 1))) if n > 1 else None


def global_norm(tensors: Sequence[torch.Tensor]) -> float:
    """L2 norm of all entries together, summed in double precision."""
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def gradient_sparsity(gradients: Sequence[torch.Tensor]) -> float | None:
    """Share of entries below 1% of their tensor's root mean square; tensors that are exactly zero are left out."""
    num_sparse = num_all = 0
    for gradient in gradients:
        rms = gradient.float().square().mean().sqrt()
        if rms > 0:
            num_sparse += int((gradient.abs() < SPARSE_BELOW * rms).sum())
            num_all += gradient.numel()
    return num_sparse / num_all if num_all else None


def run_probe(
    loaded: LoadedModel,
    encoded: Sequence[EncodedExample],
    before: Losses,
    method: Method,
    probe_steps: int,
    seed: int,
    token_budget: int,
    progress: Progress = ignore_progress,
) -> FeatureResult:
    """Train ``probe_steps`` steps on most of the sample and measure what it did to the rest.

    Args:
        encoded: the sample, in an order that does not depend on the file's; its front is held out.
        before: losses of what is held out, with the base.

    Returns:
        The features of ``PROBE_NAMES``; null with a note where the probe cannot be run.
    """
    if probe_steps == 0:
        return _nothing("the probe is off (--probe-steps 0)")
    num_held_out = count_held_out(len(encoded))
    held_out, training = [e for e in encoded[:num_held_out] if has_answer(e)], encoded[num_held_out:]
    if not num_held_out:
        return _nothing("the probe needs two examples, one of them held out")
    if not sum(count for _, count in before):
        return _nothing("the held-out examples have no supervised token")
    general_before = _general_losses(loaded, token_budget)
    parameters = loaded.attach(method, seed, name="probe")
    try:
        start = [p.detach().clone() for p in parameters]
        observer = ProbeObserver(parameters)
        train_adapter(
            loaded,
            parameters,
            training,
            method,
            seed,
            num_steps=probe_steps,
            observer=observer,
            progress=lambda _, done, total: progress("probe", done, total),
        )
        after = example_losses(loaded, held_out, method.train_on, token_budget, with_gradient=True)
        values = _loss_features(before, after) | _observed(observer)
        values["avg_param_change"] = global_norm([p.detach() - s for p, s in zip(parameters, start, strict=True)])
        values["relative_weight_update"] = loaded.relative_weight_update("probe")
        values["landscape_flatness"] = _flatness(loaded, parameters, held_out, _mean(after), method, token_budget)
        general = example_losses(loaded, _general_examples(loaded.tokenizer), "answer", token_budget)
        values["catastrophic_forgetting"] = _mean(general) / _mean(general_before) - 1
    except UserError as error:
        return _nothing(str(error), initial_loss=_mean(before))  # it was measured before anything went wrong
    finally:
        loaded.detach("probe")
    values = _finite(values)
    return FeatureResult(values, {k: _reason(k) for k, v in values.items() if v is None})


def _finite(values: dict[str, float | None]) -> dict[str, float | None]:
    return {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()}


def _reason(name: str) -> str:
    reasons = {
        "loss_stability": "a trend needs three steps",
        "gradient_consistency": "needs two micro-batches with a gradient",
        "avg_grad_sparsity": "all gradients are zero",
        "landscape_flatness": "the held-out loss has no gradient",
    }
    return reasons.get(name, "the model gave no finite number")


def _loss_features(before: Losses, after: Losses) -> dict[str, float | None]:
    initial, final = _mean(before), _mean(after)
    return {
        "perplexity_change_rate": _perplexity(after) / _perplexity(before) - 1,
        "initial_loss": initial,
        "loss_decay_rate": (initial - final) / initial if initial else None,
    }


def _observed(observer: ProbeObserver) -> dict[str, float | None]:
    return {
        "loss_stability": loss_stability(observer.losses),
        "avg_grad_norm": float(np.mean(observer.grad_norms)),
        "gradient_consistency": observer.gradient_consistency(),
        "avg_grad_sparsity": float(np.mean(observer.sparsities)) if observer.sparsities else None,
    }


def _flatness(
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
        worse = _mean(example_losses(loaded, held_out, method.train_on, token_budget))
        for p, original in zip(parameters, kept, strict=True):
            p.copy_(original)
            p.grad = None
    return 1 / (1 + worse - loss)


def _general_losses(loaded: LoadedModel, token_budget: int) -> Losses:
    """The base's, measured once a process."""
    if loaded.general_losses is None:
        with loaded.base():
            texts = _general_examples(loaded.tokenizer)
            loaded.general_losses = example_losses(loaded, texts, "answer", token_budget)
    return loaded.general_losses


def _general_examples(tokenizer: Any) -> list[EncodedExample]:
    """Plain texts of general knowledge, written for this project; every token but the first is predicted."""
    rows = tokenizer(json.loads(GENERAL_KNOWLEDGE.read_text(encoding="utf-8")))["input_ids"]
    return [EncodedExample(ids, [False] * len(ids), [True] * len(ids), [True] * len(ids)) for ids in rows]


def _mean(losses: Losses) -> float:
    count = sum(c for _, c in losses)
    return sum(total for total, _ in losses) / count if count else math.nan


def _perplexity(losses: Losses) -> float:
    """Mean over examples of exp(mean token loss), as ``base_model_perplexity`` has it."""
    return float(np.mean([math.exp(min(total / count, 700)) for total, count in losses if count]))


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around their straight line); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))


def _nothing(reason: str, **known: float) -> FeatureResult:
    values = {**dict.fromkeys(PROBE_NAMES), **_finite(dict(known))}
    return FeatureResult(values, {name: reason for name, value in values.items() if value is None})


class DynamicProbeAnalyzer(OfLoadedModel):
    """Dynamic features of a dataset."""

    def extract_all_dynamic_features(
        self,
        dataset: Dataset | Sequence[Example] | Sequence[Mapping[str, Any]],
        hyperparams: HyperParams,
        probe_steps: int = 100,
        sample_size: int = 50,
        batch_size: int = 8,
        token_budget: int = 512,
    ) -> dict[str, Any]:
        """Every feature of the probe by column name, None where it could not be measured, and ``feature_notes``.

        Args:
            dataset: what ``load_dataset`` returned, Examples, or dicts in any of the known formats.
            sample_size: examples that are trained on and held out (0: all).
            batch_size: examples in a micro-batch; four make an optimizer step.

        Raises:
            UserError: there is no valid example.
        """
        known = as_dataset(dataset)
        loaded = as_loaded(self.model, self.tokenizer)
        method = hyperparams.method(batch_size)
        sample = sample_examples(known.examples, sample_size, known.seed)
        encoded = [encode_example(self.tokenizer, example, method.max_length) for example in sample]
        held_out = [e for e in encoded[: count_held_out(len(encoded))] if has_answer(e)]
        before = example_losses(loaded, held_out, method.train_on, token_budget)
        result = run_probe(loaded, encoded, before, method, probe_steps, known.seed % 2**62, token_budget)
        return {**result.values, "feature_notes": join_notes(result.notes)}

    def run_streaming_training(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        train_batches: Iterable[Mapping[str, torch.Tensor]],
        probe_steps: int,
        gradient_accumulation_steps: int = 1,
        max_grad_norm: float = 0.3,
    ) -> dict[str, Any]:
        """Optimizer steps on batches that are made already, over and over; nothing is kept a step but numbers.

        Args:
            model: with trainable parameters, those of ``optimizer``.
            train_batches: what the model's forward takes, ``labels`` among it; a list or a DataLoader.

        Returns:
            ``losses`` and ``grad_norms`` (lists, a number a step, norms before clipping), ``avg_grad_norm``,
            ``gradient_consistency``, ``avg_grad_sparsity``, ``loss_stability`` (None where it cannot be measured).

        Raises:
            TrainingDivergedError: the loss became infinite or NaN.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        observer = ProbeObserver(parameters)
        known = list(train_batches)

        def backward(batch: Mapping[str, torch.Tensor]) -> float:
            on_device = {key: value.to(model.device) for key, value in batch.items()}
            loss = model(**on_device).loss / gradient_accumulation_steps
            loss.backward()
            return float(loss.detach())

        def gradient(k: int) -> StepGradient:
            first = k * gradient_accumulation_steps
            batches = [known[(first + i) % len(known)] for i in range(gradient_accumulation_steps)]
            loss = separate_gradients(parameters, [functools.partial(backward, b) for b in batches], observer)
            num_tokens = sum(b["input_ids"].numel() for b in batches)
            return StepGradient(loss, num_tokens, sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches))

        was_training = model.training
        model.train()
        try:
            for k in range(probe_steps):
                take_step(k, parameters, optimizer, gradient(k), max_grad_norm, observer=observer)
        finally:
            model.train(was_training)
        return {"losses": observer.losses, "grad_norms": observer.grad_norms, **_observed(observer)}
