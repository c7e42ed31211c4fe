"""The training loop of a LoRA adapter. The probe of the dynamic features runs the same loop with an observer.

A step's loss is the sum of its token losses over the number of its supervised tokens, whatever the minibatches it is
cut into: halving them when memory runs out changes no result but float noise and dropout's draw.
"""

from __future__ import annotations

import functools
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from raylora.config import Method
from raylora.encoding import (
    IGNORE_INDEX,
    EncodedExample,
    Minibatch,
    TrainOn,
    batches_by_budget,
    labels_of,
    pad_left,
    supervised_counts,
)
from raylora.model import LoadedModel, is_out_of_memory, peak_memory_bytes
from raylora.records import Progress, UserError, ignore_progress

CPU_TOKEN_BUDGET = 1024
"""Padded tokens in a minibatch on a CPU, where no allocation fails before the system kills: 4 examples of 1024 tokens
took 10 GB with a model of 135 million parameters (benchmarks/NOTES.md)."""
GPU_TOKEN_BUDGET = 16384


class TrainingDivergedError(UserError):
    """The loss is no number any more."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did. ``grad_norm`` is the global L2 norm before clipping."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int


class Observer(Protocol):
    """Looks on while the loop runs; the probe measures its features this way.

    A step is cut into micro-batches of ``batch_size`` examples; after each one its gradient alone is in the parameters.
    """

    def begin_step(self) -> None:
        """Also after running out of memory, when the step begins again."""

    def after_micro_batch(self) -> None: ...

    def before_clipping(self) -> None:
        """The whole step's gradient is in the parameters."""

    def after_step(self, step: Step) -> None: ...


@dataclass(frozen=True)
class TrainingMetrics:
    """Seconds, counts and rates of a training; losses are natural-log cross entropies per supervised token."""

    train_initial_loss: float
    train_final_loss: float
    train_loss: float
    train_seconds: float
    num_train_examples: int
    num_train_steps: int
    num_train_tokens: int
    num_supervised_tokens: int
    train_samples_per_second: float
    train_steps_per_second: float
    train_tokens_per_second: float
    peak_memory_bytes: int
    micro_batch_size: int
    num_oom_backoffs: int


@dataclass(frozen=True)
class TrainingResult:
    metrics: TrainingMetrics
    steps: list[Step]

    def loss_curve(self) -> list[dict[str, Any]]:
        return [asdict(step) for step in self.steps]


def learning_rate_factor(step: int, num_steps: int, method: Method) -> float:
    """Share of the peak learning rate at ``step`` (from 0), as transformers' schedules have it."""
    num_warmup = math.ceil(num_steps * method.warmup_ratio)
    if step < num_warmup:
        return step / max(1, num_warmup)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if method.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if method.lr_scheduler == "linear" else 1.0


def token_losses(model: Any, batch: Minibatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of each label of a left-padded minibatch: losses (B, K) in float32, and labels (B, K).

    K spans the positions from the first label of any row to the end; the output head runs on those alone.
    """
    assert batch.labels is not None
    supervised = (batch.labels != IGNORE_INDEX).any(0).nonzero()
    width = batch.labels.shape[1]
    span = min(width - 1, width - int(supervised[0])) if len(supervised) else 1
    logits = model(**batch.model_inputs(), logits_to_keep=span + 1, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, -span:]
    losses = F.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return losses.view_as(labels), labels


def example_losses(
    loaded: LoadedModel,
    examples: Sequence[EncodedExample],
    train_on: TrainOn,
    token_budget: int,
    with_gradient: bool = False,
) -> list[tuple[float, int]]:
    """Each example's summed loss and its number of supervised tokens, without dropout.

    With ``with_gradient`` that of the mean loss over all supervised tokens is added to the trainable parameters'.
    """
    results: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
    num_supervised = sum(t != IGNORE_INDEX for e in examples for t in labels_of(e, train_on))
    left = list(range(len(examples)))
    with torch.inference_mode(not with_gradient), loaded.autocast():
        while left:
            part = next(batches_by_budget(left, lambda i: len(examples[i]), token_budget))
            try:
                losses, labels = token_losses(loaded.model, _collate(loaded, [examples[i] for i in part], train_on))
                if with_gradient:
                    (losses.sum() / max(num_supervised, 1)).backward()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or len(part) == 1:
                    raise
                token_budget = len(part) * max(len(examples[i]) for i in part) // 2
                continue
            sums, counts = losses.detach().double().sum(1).tolist(), (labels != IGNORE_INDEX).sum(1).tolist()
            for i, total, count in zip(part, sums, counts, strict=True):
                results[i] = (total, count)
            done = set(part)
            left = [i for i in left if i not in done]
    return results


def _collate(loaded: LoadedModel, examples: Sequence[EncodedExample], train_on: TrainOn) -> Minibatch:
    return pad_left(
        [e.input_ids for e in examples],
        loaded.tokenizer.pad_token_id,
        loaded.device,
        [labels_of(e, train_on) for e in examples],
    )


def _steps_of_examples(num_examples: int, method: Method, num_steps: int, seed: int) -> Iterator[list[int]]:
    """Indices of each step's examples: every epoch a new seeded order, its last step as short as it falls."""
    per_step = method.batch_size * method.gradient_accumulation
    done, epoch = 0, 0
    while done < num_steps:
        order = list(range(num_examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, num_examples, per_step):
            if done == num_steps:
                return
            yield order[start : start + per_step]
            done += 1
        epoch += 1


def count_steps(num_examples: int, method: Method) -> int:
    """Optimizer steps of a whole training."""
    per_epoch = math.ceil(num_examples / (method.batch_size * method.gradient_accumulation))
    return max(1, math.ceil(per_epoch * method.num_epochs))


def train_adapter(
    loaded: LoadedModel,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[EncodedExample],
    method: Method,
    seed: int,
    num_steps: int | None = None,
    observer: Observer | None = None,
    progress: Progress = ignore_progress,
) -> TrainingResult:
    """Train the attached adapter's ``parameters`` in place.

    Args:
        examples: in an order that does not depend on the file's, so that the seed alone decides.
        num_steps: optimizer steps; by default those of ``method.num_epochs``.

    Raises:
        UserError: there is no supervised token.
        TrainingDivergedError: the loss became infinite or NaN.
        torch.OutOfMemoryError: a single example does not fit.
    """
    num_supervised = supervised_counts(examples, method.train_on)
    usable = [i for i, count in enumerate(num_supervised) if count]
    if not usable:
        raise UserError("no supervised token: every answer is empty, or cut away by --max-length")
    num_steps = num_steps if num_steps is not None else count_steps(len(usable), method)
    optimizer = _make_optimizer(parameters, method, loaded.device)
    batch_size = min(method.batch_size, len(usable))
    micro = _MicroBatches(loaded, examples, num_supervised, parameters, method, batch_size, observer)
    if loaded.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(loaded.device)
    started = time.perf_counter()
    loaded.model.train()
    try:
        with torch.random.fork_rng(devices=[loaded.device] if loaded.device.type == "cuda" else []):
            # Dropout is seeded a step at a time: a step that is repeated after running out of memory is the same.
            gradients = (
                micro.backward([usable[i] for i in indices], (seed + k) % 2**63)
                for k, indices in enumerate(_steps_of_examples(len(usable), method, num_steps, seed))
            )
            steps = run_steps(
                parameters,
                optimizer,
                gradients,
                method.max_grad_norm,
                lambda k: method.learning_rate * learning_rate_factor(k, num_steps, method),
                observer,
                lambda done: progress("train", done, num_steps),
            )
    finally:
        loaded.model.eval()
        micro.restore()
    seconds = time.perf_counter() - started
    return TrainingResult(_summarize(steps, micro, seconds, loaded.device), steps)


def run_steps(
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: Iterable[tuple[float, int, int]],
    max_grad_norm: float,
    learning_rate: Callable[[int], float] | None = None,
    observer: Observer | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Step]:
    """Optimizer steps, one for each of ``gradients``: what puts a step's gradient into the parameters when it is asked,
    and says its loss, tokens and supervised tokens.

    Args:
        learning_rate: of each step, from 0; by default the optimizer's own.

    Raises:
        TrainingDivergedError: the loss or the gradient became infinite or NaN.
    """
    steps: list[Step] = []
    for k, (loss, num_tokens, num_labels) in enumerate(gradients):
        if observer:
            observer.before_clipping()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingDivergedError(f"the loss became {loss} at step {k + 1}: lower --learning-rate")
        if learning_rate:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(k)
        optimizer.step()
        rate = float(optimizer.param_groups[0]["lr"])
        steps.append(Step(k + 1, loss, norm, rate, num_tokens, num_labels))
        if observer:
            observer.after_step(steps[-1])
        optimizer.zero_grad(set_to_none=True)
        progress(k + 1)
    return steps


def _make_optimizer(
    parameters: Sequence[torch.nn.Parameter], method: Method, device: torch.device
) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=method.learning_rate,
        betas=(method.adam_beta1, method.adam_beta2),
        weight_decay=method.weight_decay,
        fused=device.type == "cuda",
    )


def separate_gradients(
    parameters: Sequence[torch.nn.Parameter], passes: Iterable[Callable[[], float]], observer: Observer
) -> float:
    """Run the backward pass of each micro-batch of a step, and show its gradient alone to ``observer``.

    Returns:
        The sum of what ``passes`` return, their losses; the sum of their gradients is in ``parameters``.
    """
    observer.begin_step()
    total = 0.0
    sums = [torch.zeros_like(p) for p in parameters]
    for run in passes:
        total += run()
        observer.after_micro_batch()
        for parameter, gradient in zip(parameters, sums, strict=True):
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = None
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient
    return total


class _MicroBatches:
    """Gradients of one step, in minibatches that shrink when memory runs out."""

    def __init__(
        self,
        loaded: LoadedModel,
        examples: Sequence[EncodedExample],
        num_supervised: list[int],
        parameters: Sequence[torch.nn.Parameter],
        method: Method,
        batch_size: int,
        observer: Observer | None,
    ) -> None:
        self.loaded, self.examples, self.parameters = loaded, examples, parameters
        self.num_supervised, self.method, self.observer = num_supervised, method, observer
        self.token_budget = GPU_TOKEN_BUDGET if loaded.device.type == "cuda" else CPU_TOKEN_BUDGET
        self.batch_size = batch_size
        self.num_backoffs = 0
        self.num_examples = 0
        self._checkpointing = False

    def backward(self, indices: list[int], dropout_seed: int) -> tuple[float, int, int]:
        """Loss, tokens and supervised tokens of a step; its gradients are in the parameters afterwards."""
        while True:
            try:
                torch.manual_seed(dropout_seed)
                result = self._backward_once(indices)
                self.num_examples += len(indices)
                return result
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error) or not self._back_off():
                    raise
            for parameter in self.parameters:
                parameter.grad = None

    def _backward_once(self, indices: list[int]) -> tuple[float, int, int]:
        num_supervised = sum(self.num_supervised[i] for i in indices)
        num_tokens = sum(len(self.examples[i]) for i in indices)
        if self.observer is None:
            # Neighbours of like length share a minibatch, so that little is padding; a step's sum has no order.
            return self._accumulate(sorted(indices), num_supervised), num_tokens, num_supervised
        groups = [indices[i : i + self.method.batch_size] for i in range(0, len(indices), self.method.batch_size)]
        passes = [functools.partial(self._accumulate, group, num_supervised) for group in groups]
        return separate_gradients(self.parameters, passes, self.observer), num_tokens, num_supervised

    def _accumulate(self, indices: list[int], num_supervised: int) -> float:
        """Add the gradient of these examples' part of the step's loss; that part."""
        total = 0.0
        for part in batches_by_budget(indices, lambda i: len(self.examples[i]), self.token_budget, self.batch_size):
            batch = _collate(self.loaded, [self.examples[i] for i in part], self.method.train_on)
            with self.loaded.autocast():
                losses, _ = token_losses(self.loaded.model, batch)
            loss = losses.sum() / num_supervised
            loss.backward()
            total += float(loss.detach())
        return total

    def _back_off(self) -> bool:
        """Use less memory next time: first checkpoint activations, then halve the minibatch. False: nothing is left."""
        self.num_backoffs += 1
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self._checkpointing:
            self.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            self._checkpointing = True
            return True
        if self.batch_size == 1:
            return False
        self.batch_size //= 2
        return True

    def restore(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None
        if self._checkpointing:
            self.loaded.model.gradient_checkpointing_disable()


def _summarize(steps: list[Step], micro: _MicroBatches, seconds: float, device: torch.device) -> TrainingMetrics:
    num_tokens = sum(s.num_tokens for s in steps)
    return TrainingMetrics(
        train_initial_loss=steps[0].loss,
        train_final_loss=steps[-1].loss,
        train_loss=sum(s.loss for s in steps) / len(steps),
        train_seconds=seconds,
        num_train_examples=micro.num_examples,
        num_train_steps=len(steps),
        num_train_tokens=num_tokens,
        num_supervised_tokens=sum(s.num_supervised for s in steps),
        train_samples_per_second=micro.num_examples / seconds,
        train_steps_per_second=len(steps) / seconds,
        train_tokens_per_second=num_tokens / seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        micro_batch_size=micro.batch_size,
        num_oom_backoffs=micro.num_backoffs,
    )
