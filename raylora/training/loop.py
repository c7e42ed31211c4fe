"""The training loop of LoRA adapters. The probe of the dynamic features runs the same loop with an observer.

It trains one adapter or several: adapters that are trained together share forward and backward passes of the base.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from raylora.config import Method
from raylora.data.encoding import EncodedExample, lengths_of
from raylora.errors import ErrorKind, TrainingDivergedError, UserError
from raylora.model.adapters import LoadedModel
from raylora.model.device import peak_memory_bytes
from raylora.model.memory import CPU_TOKEN_BUDGET
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, ignore_progress
from raylora.rows import TrainingMetrics
from raylora.training.gradients import (
    GradientAccumulator,
    Job,
    Observer,
    Step,
    StepGradient,
    count_labels,
)
from raylora.work_counts import work_counts

ONEDNN_FROM_TOKENS = 4000
"""Trainings of fewer tokens on a CPU do without oneDNN: steps are 12% faster with it, but reordering the weights takes
a second (benchmarks/NOTES.md)."""


UNTRAINED = "the adapter is what it was before training{}: the model is the base"
"""The note of an adapter whose weights leave the base as it is; with the cause, where that is the learning rate."""


@dataclass(frozen=True)
class TrainingResult:
    metrics: TrainingMetrics
    steps: list[Step]

    def loss_curve(self) -> list[dict[str, Any]]:
        """A row for each step, with the fields of ``Step`` as columns."""
        return [asdict(step) for step in self.steps]


def learning_rate_factor(step: int, num_steps: int, method: Method) -> float:
    """The share of the peak learning rate at ``step`` (from 0): as in transformers' schedules, warm-up apart.

    Of w = ceil(``num_steps`` * ``warmup_ratio``) steps of warm-up, step k has (k + 1) / (w + 1) of the peak. In
    transformers it has k / w, so that its first step is lost, and with it a training of a single step.
    """
    num_warmup = math.ceil(num_steps * method.warmup_ratio)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    if method.lr_scheduler == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if method.lr_scheduler == "linear" else 1.0


def _steps_of_examples(num_examples: int, method: Method, num_steps: int, seed: int) -> Iterator[list[int]]:
    """The indices of each step's examples: each epoch in a new seeded order, with fewer in its last step if need be."""
    per_step = method.batch_size * method.gradient_accumulation
    num_yielded, epoch = 0, 0
    while num_yielded < num_steps:
        order = list(range(num_examples))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, num_examples, per_step):
            if num_yielded == num_steps:
                return
            yield order[start : start + per_step]
            num_yielded += 1
        epoch += 1


def count_steps(num_examples: int, method: Method) -> int:
    """Optimizer steps of a whole training."""
    per_epoch = math.ceil(num_examples / (method.batch_size * method.gradient_accumulation))
    return max(1, math.ceil(per_epoch * method.num_epochs))


def count_tokens(job: Job, num_steps: int) -> float:
    """About how many tokens pass through the model in ``num_steps`` steps, from the examples' mean length."""
    per_step = min(job.method.batch_size * job.method.gradient_accumulation, len(job.examples))
    return num_steps * per_step * sum(lengths_of(job.examples)) / len(job.examples)


def train_adapter(
    loaded: LoadedModel,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[EncodedExample],
    method: Method,
    seed: int,
    num_steps: int | None = None,
    observer: Observer | None = None,
    progress: ProgressCallback = ignore_progress,
) -> TrainingResult:
    """Train the active adapter's ``parameters`` in place; see ``Job`` for the arguments.

    Raises:
        UserError: there is no supervised token.
        TrainingDivergedError: the loss became infinite or NaN.
        torch.OutOfMemoryError: a single example does not fit.
    """
    job = Job(parameters, examples, method, seed, loaded.active_adapter, num_steps)
    (result,) = _train(loaded, [_Trainee(job, loaded.device)], observer, progress)
    if isinstance(result, TrainingDivergedError):
        raise result
    return result


def train_adapters(
    loaded: LoadedModel, jobs: Sequence[Job], progress: ProgressCallback = ignore_progress
) -> list[TrainingResult | TrainingDivergedError]:
    """Train several attached adapters at once: each step's forward and backward passes hold examples of all of them.

    Each adapter becomes what it would become alone, up to float noise: it has its own steps, optimizer, clipping and
    dropout. If one diverges, the others go on. Of the training's seconds each result gets a share by its tokens; tokens
    a second and memory are those of all together.

    Raises:
        UserError: an adapter has no supervised token, or is on modules that cannot share a forward pass.
        torch.OutOfMemoryError: a single example does not fit.
    """
    return _train(loaded, [_Trainee(job, loaded.device) for job in jobs], None, progress)


def adapters_a_pass(loaded: LoadedModel, job: Job) -> int:
    """How many adapters like the one of ``job``, which is attached, to train at once.

    On a GPU as many as fill a minibatch with a step's tokens each, if half of the free memory holds them: 16 bytes a
    parameter, four each for itself, its gradient and AdamW's two moments. How large a minibatch may be is known from
    earlier trainings, those of probes included. On a CPU one: matrix products over its tokens alone are as fast
    (benchmarks/NOTES.md).
    """
    if loaded.device.type != "cuda":
        return 1
    tokens = count_tokens(job, num_steps=1)
    free, _ = torch.cuda.mem_get_info(loaded.device)
    fitting = free / 2 / (16 * sum(p.numel() for p in job.parameters))
    return max(1, min(int(loaded.training_token_budget / tokens), int(fitting)))


class _Trainee:
    """One adapter in training: the examples of its remaining steps, its optimizer, and the steps it has made.

    Raises:
        UserError: there is no supervised token.
    """

    def __init__(self, job: Job, device: torch.device) -> None:
        self.job = job
        usable = [i for i, count in enumerate(count_labels(job)) if count]
        if not usable:
            text = "no supervised token: every answer is empty, or cut away by --max-length"
            raise UserError(text, kind=ErrorKind.NO_SUPERVISED_TOKEN)
        self.num_steps = job.num_steps if job.num_steps is not None else count_steps(len(usable), job.method)
        orders = _steps_of_examples(len(usable), job.method, self.num_steps, job.seed)
        self.order = ([usable[i] for i in indices] for indices in orders)
        self.optimizer = _make_optimizer(job.parameters, job.method, device)
        self.steps: list[Step] = []
        self.num_examples = 0
        self.diverged: TrainingDivergedError | None = None

    @property
    def is_training(self) -> bool:
        return self.diverged is None and len(self.steps) < self.num_steps

    def step(self, gradient: StepGradient, observer: Observer | None) -> None:
        self.num_examples += gradient.num_examples
        k, method = len(self.steps), self.job.method
        rate = method.learning_rate * learning_rate_factor(k, self.num_steps, method)
        try:
            self.steps.append(
                take_step(k, self.job.parameters, self.optimizer, gradient, method.max_grad_norm, rate, observer)
            )
        except TrainingDivergedError as error:
            self.diverged = error


def _train(
    loaded: LoadedModel, trainees: Sequence[_Trainee], observer: Observer | None, progress: ProgressCallback
) -> list[TrainingResult | TrainingDivergedError]:
    accumulator = GradientAccumulator(loaded, [t.job for t in trainees], observer)
    num_steps, on_gpu = max(t.num_steps for t in trainees), loaded.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(loaded.device)
    for parameter in (p for t in trainees for p in t.job.parameters):
        parameter.requires_grad_(True)  # PEFT leaves it on for one adapter only
    use_onednn = sum(count_tokens(t.job, t.num_steps) for t in trainees) >= ONEDNN_FROM_TOKENS
    started = time.perf_counter()
    loaded.model.train()
    try:
        with (
            accumulator.ready(),
            onednn_linears(loaded.model, CPU_TOKEN_BUDGET, with_backward=True)
            if use_onednn
            else contextlib.nullcontext(),
            torch.random.fork_rng(devices=[loaded.device] if on_gpu else []),
        ):
            for k in range(num_steps):
                batches = {i: next(t.order) for i, t in enumerate(trainees) if t.is_training}
                if not batches:
                    break
                for i, gradient in accumulator.backward(batches, k).items():
                    trainees[i].step(gradient, observer)
                    work_counts.supervised_tokens += gradient.num_supervised
                progress(ProgressStage.TRAIN, k + 1, num_steps)
    finally:
        loaded.model.eval()
        accumulator.restore()
    seconds = time.perf_counter() - started
    num_tokens = sum(step.num_tokens for t in trainees for step in t.steps)
    return [
        t.diverged or TrainingResult(_summarize(t, accumulator, seconds / max(1, num_tokens), loaded.device), t.steps)
        for t in trainees
    ]


def take_step(
    k: int,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradient: StepGradient,
    max_grad_norm: float,
    learning_rate: float | None = None,
    observer: Observer | None = None,
) -> Step:
    """Optimizer step ``k``, from 0, with the gradient that is in the parameters: clip it, update, and reset it.

    Args:
        gradient: the loss and the token counts of that gradient.
        learning_rate: by default the optimizer's own.

    Raises:
        TrainingDivergedError: the loss or the gradient became infinite or NaN.
    """
    if observer:
        observer.before_clipping()
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm))
    if not math.isfinite(gradient.loss) or not math.isfinite(norm):
        raise TrainingDivergedError(f"the loss became {gradient.loss} at step {k + 1}: lower --learning-rate")
    if learning_rate is not None:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
    optimizer.step()
    rate = float(optimizer.param_groups[0]["lr"])
    step = Step(k + 1, gradient.loss, norm, rate, gradient.num_tokens, gradient.num_supervised)
    if observer:
        observer.after_step(step)
    optimizer.zero_grad(set_to_none=True)
    return step


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


def _summarize(
    trainee: _Trainee, accumulator: GradientAccumulator, seconds_a_token: float, device: torch.device
) -> TrainingMetrics:
    steps = trainee.steps
    num_tokens = sum(s.num_tokens for s in steps)
    seconds = num_tokens * seconds_a_token
    return TrainingMetrics(
        train_initial_loss=steps[0].loss,
        train_final_loss=steps[-1].loss,
        train_loss=sum(s.loss for s in steps) / len(steps),
        train_seconds=seconds,
        num_train_examples=trainee.num_examples,
        num_train_steps=len(steps),
        num_train_tokens=num_tokens,
        num_supervised_tokens=sum(s.num_supervised for s in steps),
        train_samples_per_second=trainee.num_examples / seconds,
        train_steps_per_second=len(steps) / seconds,
        train_tokens_per_second=num_tokens / seconds,
        peak_memory_bytes=peak_memory_bytes(device),
        micro_batch_size=accumulator.fullest,
        num_oom_backoffs=accumulator.budget.num_backoffs,
        packed=accumulator.packed,
        num_adapters=len(accumulator.jobs),
        train_notes=_note(trainee, accumulator.loaded),
    )


def _note(trainee: _Trainee, loaded: LoadedModel) -> str:
    """What is odd about the trained adapter: a change of exactly 0 is no result where it could be no other."""
    if not loaded.changes_nothing(trainee.job.name):
        return ""
    return UNTRAINED.format("" if any(step.learning_rate for step in trainee.steps) else " (learning rate 0)")
