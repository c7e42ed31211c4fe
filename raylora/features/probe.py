"""Features of a probe: a few optimizer steps from a fresh adapter, which is then thrown away.

The steps are those of ``raylora.train``; an observer keeps a few numbers a step and running sums, no gradient.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from raylora.config import Method
from raylora.data.datasets import sample_examples
from raylora.data.encoding import IGNORE_INDEX, EncodedExample, encode_example
from raylora.errors import UserError
from raylora.features.static import FeatureResult, OfLoadedModel, as_dataset, count_held_out, has_answer, join_notes
from raylora.model.adapters import LoadedModel
from raylora.model.loading import borrowed
from raylora.model.onednn import onednn_linears
from raylora.records import Dataset, Example, ProgressCallback, ProgressStage, ignore_progress
from raylora.rows import PROBE_NAMES
from raylora.training.gradients import Job, Step, StepGradient, separate_gradients
from raylora.training.loop import ONEDNN_FROM_TOKENS, count_tokens, take_step, train_adapter
from raylora.training.losses import ExampleLoss, example_losses

GENERAL_KNOWLEDGE = Path(__file__).parents[1] / "demo" / "general_knowledge.json"
SPARSE_GRADIENT_BELOW = 0.01
"""A gradient entry counts as sparse below this share of its tensor's root mean square."""
RHO = 0.05
"""Radius of the sharpness (Foret et al. 2021)."""
Losses = Sequence[ExampleLoss]
T = TypeVar("T")


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
    """L2 norm of all entries together, summed in double precision; a GPU is waited for once."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors]
    return float(torch.linalg.vector_norm(_in_a_row(norms))) if norms else 0.0


def _in_a_row(numbers: Sequence[torch.Tensor]) -> torch.Tensor:
    """Tensors of one number each, of whatever devices, as one (N,)."""
    return torch.stack([number.to(numbers[0].device) for number in numbers])


def gradient_sparsity(gradients: Sequence[torch.Tensor]) -> float | None:
    """Share of entries below 1% of their tensor's root mean square; tensors that are exactly zero are left out."""
    if not gradients:
        return None
    rms = [torch.linalg.vector_norm(g, dtype=torch.float32) / math.sqrt(g.numel()) for g in gradients]
    num_sparse = _in_a_row([(g.abs() < SPARSE_GRADIENT_BELOW * r).sum() for g, r in zip(gradients, rms, strict=True)])
    counted = _in_a_row(rms) > 0
    num_all = (counted * torch.tensor([g.numel() for g in gradients], device=counted.device)).sum()
    return float((num_sparse * counted).sum() / num_all) if num_all else None


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
        **_observed(observer),
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


def _observed(observer: ProbeObserver) -> dict[str, float | None]:
    return {
        "loss_stability": loss_stability(observer.losses),
        "avg_grad_norm": float(np.mean(observer.grad_norms)) if observer.grad_norms else None,
        "gradient_consistency": observer.gradient_consistency(),
        "avg_grad_sparsity": float(np.mean(observer.sparsities)) if observer.sparsities else None,
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


def loss_stability(losses: Sequence[float]) -> float | None:
    """1 / (1 + standard deviation of the losses around their straight line); None for fewer than three."""
    if len(losses) < 3:
        return None
    steps = np.arange(len(losses))
    residuals = np.asarray(losses) - np.polyval(np.polyfit(steps, losses, 1), steps)
    return float(1 / (1 + residuals.std()))


def _nothing(reason: str, **known: float) -> FeatureResult:
    values = {**dict.fromkeys(PROBE_NAMES), **_finite_values(dict(known))}
    return FeatureResult(values, {name: reason for name, value in values.items() if value is None})


def _over_and_over(batches: Iterable[T]) -> Iterator[T]:
    """Raises UserError where there is none."""
    for turn in itertools.count():
        is_empty = True
        for batch in batches:
            is_empty = False
            yield batch
        if is_empty and turn == 0:
            raise UserError("there is no batch to train on")
        if is_empty:  # an iterator, which is at its end
            return


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
        method = hyperparams.method(batch_size)
        sample = sample_examples(known.examples, sample_size, known.seed)
        encoded = [encode_example(self.tokenizer, example, method.max_length) for example in sample]
        held_out = [e for e in encoded[: count_held_out(len(encoded))] if has_answer(e)]
        with borrowed(self.model, self.tokenizer) as loaded:
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
        """Optimizer steps on batches that are made already; nothing is kept of a step but numbers.

        Args:
            model: with trainable parameters, those of ``optimizer``.
            train_batches: what the model's forward takes, ``labels`` among it. A list or a DataLoader is gone through
                over and over, an iterator once: where it ends, the steps end.

        Returns:
            ``losses`` and ``grad_norms`` (lists, a number a step, norms before clipping), ``avg_grad_norm``,
            ``gradient_consistency``, ``avg_grad_sparsity``, ``loss_stability`` (None where it cannot be measured).

        Raises:
            UserError: there is no batch.
            TrainingDivergedError: the loss became infinite or NaN.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        observer = ProbeObserver(parameters)
        batches = _over_and_over(train_batches)

        def backward(batch: Mapping[str, torch.Tensor]) -> float:
            on_device = {key: value.to(model.device) for key, value in batch.items()}
            loss = model(**on_device).loss / gradient_accumulation_steps
            loss.backward()
            return float(loss.detach())

        def gradient(part: Sequence[Mapping[str, torch.Tensor]]) -> StepGradient:
            loss = separate_gradients(parameters, [functools.partial(backward, b) for b in part], observer)
            num_tokens = sum(b["input_ids"].numel() for b in part)
            return StepGradient(loss, num_tokens, sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in part))

        was_training = model.training
        model.train()
        try:
            for k in range(probe_steps):
                if not (part := list(itertools.islice(batches, gradient_accumulation_steps))):
                    break
                take_step(k, parameters, optimizer, gradient(part), max_grad_norm, observer=observer)
        finally:
            model.train(was_training)
        return {"losses": observer.losses, "grad_norms": observer.grad_norms, **_observed(observer)}
