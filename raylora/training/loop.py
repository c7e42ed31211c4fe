"""The training loop of LoRA adapters. The probe of the dynamic features runs the same loop with an observer.

It trains one adapter or several: adapters that are trained together share forward and backward passes of the base. In a
step the CPU never waits for the GPU to have done it: losses and norms are read a step late.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from raylora.config.method import Method
from raylora.data.encoding import EncodedExample, lengths_of
from raylora.errors import ErrorKind, TrainingDivergedError, UserError
from raylora.model.adapters import LoadedModel
from raylora.model.memory import CPU_TOKEN_BUDGET
from raylora.model.onednn import onednn_linears
from raylora.records import ProgressCallback, ProgressStage, ignore_progress
from raylora.rows import TrainingMetrics
from raylora.training.gradients import GradientAccumulator, Job, Observer, Step, StepGradient, count_labels
from raylora.training.optimizer_step import LaunchedStep, make_optimizer, take_step
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


Outcome = TrainingResult | UserError
"""What became of an adapter."""
Slots = Callable[[Sequence[Job]], int]
"""How many adapters may be in training at once, given those that are."""


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
    (outcome,) = _Training(loaded, [job], observer, progress).run()
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def train_adapters(
    loaded: LoadedModel,
    jobs: Iterable[Job],
    progress: ProgressCallback = ignore_progress,
    slots: Slots | None = None,
    finished: Callable[[Job, Outcome], None] | None = None,
) -> list[Outcome]:
    """Train several adapters over the same forward and backward passes of the base, each step over examples of all.

    Each adapter becomes what it would become alone, up to float noise: it has its own steps, optimizer, clipping and
    dropout. One that is done makes room for the next one, which joins in the very next step. If one cannot be trained,
    the others go on. Of each step's seconds a result gets a share by its tokens; tokens a second and memory are those
    of all together.

    Args:
        jobs: with attached adapters. The next one is taken when there is room for it, so that an iterator may attach
            its adapter only then.
        slots: how many may be in training at once; by default all.
        finished: called with a job and its outcome as soon as it is done, and may then detach its adapter: nothing of
            the training is in the model's way.

    Returns:
        What became of each, in the order of ``jobs``: a result, or a UserError where it has no supervised token, cannot
        share a forward pass with those in training, or diverged.

    Raises:
        torch.OutOfMemoryError: a single example does not fit.
    """
    return _Training(loaded, jobs, None, progress, slots, finished).run()


class _Trainee:
    """One adapter in training: the examples of its remaining steps, its optimizer, and the steps it has made.

    Args:
        number: its place among all that the training was given.

    Raises:
        UserError: there is no supervised token.
    """

    def __init__(self, job: Job, number: int, device: torch.device, num_backoffs: int) -> None:
        self.job, self.number, self.num_backoffs_before = job, number, num_backoffs
        usable = [i for i, count in enumerate(count_labels(job)) if count]
        if not usable:
            text = "no supervised token: every answer is empty, or cut away by --max-length"
            raise UserError(text, kind=ErrorKind.NO_SUPERVISED_TOKEN)
        self.num_steps = job.num_steps if job.num_steps is not None else count_steps(len(usable), job.method)
        orders = _steps_of_examples(len(usable), job.method, self.num_steps, job.seed)
        self.order = ([usable[i] for i in indices] for indices in orders)
        self.optimizer = make_optimizer(job.parameters, job.method, device)
        self.steps: list[Step] = []
        self.num_launched = self.num_examples = self.most_beside = 0
        self.seconds = 0.0
        self.diverged: TrainingDivergedError | None = None
        self._unread: list[LaunchedStep] = []

    @property
    def num_left(self) -> int:
        """Steps that are still to be launched."""
        return 0 if self.diverged else self.num_steps - self.num_launched

    def launch(self, gradient: StepGradient, observer: Observer | None) -> None:
        """Make a step; see ``read``."""
        k, method = self.num_launched, self.job.method
        self.num_examples += gradient.num_examples
        self.num_launched += 1
        rate = method.learning_rate * learning_rate_factor(k, self.num_steps, method)
        self._unread.append(
            take_step(k, self.job.parameters, self.optimizer, gradient, method.max_grad_norm, rate, observer)
        )

    def read(self) -> None:
        """Read what the steps did: of all but the one that was launched last, or of all once none is left."""
        while len(self._unread) > (self.num_left > 0):
            try:
                self.steps.append(self._unread.pop(0).read())
            except TrainingDivergedError as error:
                self.diverged = error
                self._unread.clear()


class _Training:
    """Adapters that join, make their steps side by side, and leave; see ``train_adapters``."""

    def __init__(
        self,
        loaded: LoadedModel,
        jobs: Iterable[Job],
        observer: Observer | None,
        progress: ProgressCallback,
        slots: Slots | None = None,
        finished: Callable[[Job, Outcome], None] | None = None,
    ) -> None:
        self._loaded, self._observer, self._progress = loaded, observer, progress
        self._slots, self._finished = slots, finished
        self._waiting = iter(jobs)
        self._accumulator = GradientAccumulator(loaded, [], observer)
        self._trainees: dict[int, _Trainee] = {}
        self._outcomes: dict[int, Outcome] = {}
        self._num_taken = self._num_steps = 0

    def run(self) -> list[Outcome]:
        on_gpu = self._loaded.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(self._loaded.device)
        try:
            with torch.random.fork_rng(devices=[self._loaded.device] if on_gpu else []):
                while self._fill_slots():
                    self._train()
                    self._let_go()
        finally:
            self._loaded.model.eval()
            self._accumulator.restore()
        return [outcome for _, outcome in sorted(self._outcomes.items())]

    def _fill_slots(self) -> bool:
        """Take in those for whom there is room; returns whether anybody is in training."""
        while self._has_room() and (job := next(self._waiting, None)):
            number = self._num_taken
            self._num_taken += 1
            try:
                num_backoffs = self._accumulator.budget.num_backoffs
                trainee = _Trainee(job, number, self._loaded.device, num_backoffs)
                self._trainees[self._accumulator.add(job)] = trainee
            except UserError as error:
                self._finish(job, number, error)
        return bool(self._trainees)

    def _has_room(self) -> bool:
        jobs = [t.job for t in self._trainees.values()]
        return not jobs or self._slots is None or len(jobs) < self._slots(jobs)

    def _train(self) -> None:
        """Make steps until one of the adapters is done, or there may be room for more of them."""
        trainees, budget = self._trainees.values(), self._loaded.training_token_budget
        for parameter in (p for t in trainees for p in t.job.parameters):
            parameter.requires_grad_(True)  # PEFT leaves it on for one adapter only
        num_steps = min(t.num_left for t in trainees)
        use_onednn = sum(count_tokens(t.job, num_steps) for t in trainees) >= ONEDNN_FROM_TOKENS
        self._loaded.model.train()
        with (
            self._accumulator.ready(),
            onednn_linears(self._loaded.model, CPU_TOKEN_BUDGET, with_backward=True)
            if use_onednn
            else contextlib.nullcontext(),
        ):
            while all(t.num_left for t in trainees) and self._loaded.training_token_budget == budget:
                self._step()
        self._loaded.model.eval()

    def _step(self) -> None:
        """One step of each adapter. The numbers of the step before are read while the GPU is at this one."""
        started = time.perf_counter()
        gradients = self._accumulator.backward({i: (t.num_launched, next(t.order)) for i, t in self._trainees.items()})
        for i, gradient in gradients.items():
            self._trainees[i].launch(gradient, self._observer)
            work_counts.supervised_tokens += gradient.num_supervised
        for trainee in self._trainees.values():
            trainee.read()
        seconds_a_token = (time.perf_counter() - started) / sum(g.num_tokens for g in gradients.values())
        for i, gradient in gradients.items():
            trainee = self._trainees[i]
            trainee.seconds += gradient.num_tokens * seconds_a_token
            trainee.most_beside = max(trainee.most_beside, len(gradients))
        self._num_steps += 1
        num_left = max(t.num_left for t in self._trainees.values())
        self._progress(ProgressStage.TRAIN, self._num_steps, self._num_steps + num_left)

    def _let_go(self) -> None:
        """Have those who are done leave."""
        for index in [i for i, t in self._trainees.items() if not t.num_left]:
            trainee = self._trainees.pop(index)
            outcome = trainee.diverged or TrainingResult(_summarize(trainee, self._accumulator), trainee.steps)
            self._accumulator.remove(index)
            self._finish(trainee.job, trainee.number, outcome)

    def _finish(self, job: Job, number: int, outcome: Outcome) -> None:
        self._outcomes[number] = outcome
        if self._finished:
            self._finished(job, outcome)


def _summarize(trainee: _Trainee, accumulator: GradientAccumulator) -> TrainingMetrics:
    steps, seconds = trainee.steps, trainee.seconds
    num_tokens = sum(s.num_tokens for s in steps)
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
        peak_memory_bytes=accumulator.peak_bytes,
        micro_batch_size=accumulator.fullest,
        num_oom_backoffs=accumulator.budget.num_backoffs - trainee.num_backoffs_before,
        packed=accumulator.packed,
        graphed=accumulator.graphed,
        num_adapters=trainee.most_beside,
        num_trained_parameters=sum(p.numel() for p in trainee.job.parameters),
        adapter_forward=accumulator.adapter_forward,
        train_notes=_note(trainee, accumulator.loaded),
    )


def _note(trainee: _Trainee, loaded: LoadedModel) -> str:
    """What is odd about the trained adapter: a change of exactly 0 is no result where it could be no other."""
    if not loaded.changes_nothing(trainee.job.name):
        return ""
    return UNTRAINED.format("" if any(step.learning_rate for step in trainee.steps) else " (learning rate 0)")
