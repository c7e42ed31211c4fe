"""The gradient of an optimizer step, added up over minibatches that are as full as memory allows.

A step's loss is the sum of its token losses, divided by the number of its supervised tokens. Dropout is seeded for each
example. So neither depends on how the step is cut into minibatches: where memory runs out and they become smaller, or
other adapters are trained in the same minibatches, the gradient differs by float noise only.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

from raylora.config import Method
from raylora.data.encoding import EncodedExample, labels_of, lengths_of, pad_token_of, supervised_counts
from raylora.data.minibatch import collate, send
from raylora.model.adapters import LoadedModel
from raylora.model.forward import head_is_plain, token_losses
from raylora.model.memory import ENOUGH_TOKENS, TokenBudget, free_gpu_bytes, tokens_that_fit
from raylora.model.packing import attention_in_blocks, can_pack, window_of
from raylora.training.adapter_products import AdapterProducts, Span, mix

log = logging.getLogger("raylora")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    ``loss`` is in nats a supervised token; ``grad_norm`` is the global L2 norm before clipping.
    """

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int


class StepGradient(NamedTuple):
    """The loss of a step, and how much it was computed from. The gradient itself is in the parameters' ``grad``."""

    loss: torch.Tensor
    """One float64, in nats a supervised token, on the device: reading it waits for the GPU."""
    num_tokens: int
    num_supervised: int
    num_examples: int = 0


class Observer(Protocol):
    """Methods that the training loop calls in each step; the probe measures its features in them.

    With an observer a step is cut into micro-batches of ``batch_size`` examples, whose gradients it sees one by one.
    """

    def begin_step(self) -> None:
        """Called before the first micro-batch; again where memory ran out, as the step then begins again."""

    def after_micro_batch(self) -> None:
        """Called while the parameters' ``grad`` is that of this micro-batch alone."""

    def before_clipping(self) -> None:
        """Called while the parameters' ``grad`` is that of the whole step."""

    def after_step(self, step: Step) -> None:
        """Called once the optimizer has changed the parameters, of all but the last step when the next is launched."""


@dataclass(frozen=True)
class Job:
    """An attached adapter, and what it is to be trained on.

    The order of ``examples`` must not depend on their order in the file: it is then the seed alone that decides which
    examples share a step.
    """

    parameters: Sequence[torch.nn.Parameter]
    examples: Sequence[EncodedExample]
    method: Method
    seed: int
    name: str = "default"
    num_steps: int | None = None
    """Optimizer steps; by default those of ``method.num_epochs``."""


def count_labels(job: Job) -> list[int]:
    """Supervised tokens of each example."""
    return supervised_counts(job.examples, job.method.train_on)


def separate_gradients(
    parameters: Sequence[torch.nn.Parameter], passes: Iterable[Callable[[], torch.Tensor]], observer: Observer
) -> torch.Tensor:
    """Compute the gradient of each micro-batch of a step by itself, for ``observer``, and their sum.

    Args:
        passes: a function for each micro-batch that runs its forward and backward pass and returns its share of the
            step's loss, a tensor of one number.

    Returns:
        The step's loss in float64, the sum of these shares; the step's gradient is in the parameters' ``grad``.
    """
    observer.begin_step()
    total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
    sums = [torch.zeros_like(p) for p in parameters]
    for run in passes:
        total += run().to(total.device)
        observer.after_micro_batch()
        for parameter, gradient in zip(parameters, sums, strict=True):
            if parameter.grad is not None:
                gradient += parameter.grad
            parameter.grad = None
    for parameter, gradient in zip(parameters, sums, strict=True):
        parameter.grad = gradient
    return total


@dataclass(frozen=True)
class _Item:
    """An example of a step."""

    job: int
    """Whose example it is: a key of the accumulator's ``jobs``."""
    index: int
    """Which of the job's examples it is."""
    seed: int
    """Of its dropout."""


class GradientAccumulator:
    """Computes one step's gradients of all adapters, in minibatches that become smaller when memory runs out.

    Adapters join and leave between steps, outside of ``ready``. ``jobs`` holds those that are there, by their indices.
    ``packed``: whether minibatches are packed. ``fullest``: examples of the largest minibatch since the last halving.
    """

    def __init__(self, loaded: LoadedModel, jobs: Sequence[Job], observer: Observer | None) -> None:
        self.loaded, self.observer = loaded, observer
        self.jobs: dict[int, Job] = {}
        self._indices = itertools.count()
        self._counts: dict[int, list[int]] = {}
        self._on_gpu = loaded.device.type == "cuda"
        self.budget = TokenBudget(loaded.training_token_budget, may_checkpoint=True)
        self.fullest = self._most_tokens = 0
        self._adapters: AdapterProducts
        self.packed = True
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> int:
        """Take in a job, whose adapter is attached; returns its index.

        Raises:
            UserError: it cannot share a forward pass with those that are there.
        """
        self._adapters = AdapterProducts(self.loaded, [other.name for other in (*self.jobs.values(), job)])
        index = next(self._indices)
        self.jobs[index], self._counts[index] = job, count_labels(job)
        self._choose_form()
        return index

    def remove(self, index: int) -> None:
        """Let go of a job that is done, and of its gradients."""
        for parameter in self.jobs.pop(index).parameters:
            parameter.grad = None
        del self._counts[index]
        if self.jobs:
            self._adapters = AdapterProducts(self.loaded, [job.name for job in self.jobs.values()])
            self._choose_form()

    def _choose_form(self) -> None:
        """Choose whether minibatches are packed: only where attention's window holds each example of each job."""
        longest = max(n for job in self.jobs.values() for n in lengths_of(job.examples))
        # Tried before ``ready`` replaces attention and PEFT's forward pass; ``token_losses`` looks one result up.
        packed = longest <= window_of(self.loaded.model) and self.loaded.allows(can_pack)
        self.loaded.allows(head_is_plain)
        if self.packed and not packed:
            log.info("minibatches are padded: this model's attention cannot be run in blocks")
        self.packed = packed

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model serves ``backward`` alone: its attention and its adapters' products are replaced."""
        blocks = attention_in_blocks(self.loaded.model) if self.packed else contextlib.nullcontext()
        with self._adapters.installed(), blocks:
            yield

    def backward(self, steps: Mapping[int, tuple[int, Sequence[int]]]) -> dict[int, StepGradient]:
        """Compute the gradients of a step of each adapter; they are left in the parameters' ``grad``.

        Args:
            steps: for each job, by its index, the number of its own step, from 0, and which of its examples are in it;
                finished jobs are left out.

        Returns:
            The ``StepGradient`` of each job in ``steps``, by its index.

        Raises:
            torch.OutOfMemoryError: a single example does not fit, even with gradient checkpointing (MemoryError or
                RuntimeError on a CPU).
        """
        items = [
            [_Item(job, i, mix(self.jobs[job].seed, k, position)) for position, i in enumerate(indices)]
            for job, (k, indices) in steps.items()
        ]
        first, (first_k, _) = next(iter(steps.items()))
        bytes_before = torch.cuda.memory_allocated(self.loaded.device) if self._on_gpu else 0
        losses: dict[int, torch.Tensor] | None = None
        while losses is None:
            # Seeds the dropout that a model may have outside its adapters: a step that begins again draws the same.
            torch.manual_seed((self.jobs[first].seed + first_k) % 2**63)
            losses = self.budget.attempt(functools.partial(self._backward_once, items))
            if losses is None:
                self._drop_gradients()
                self.use_less_memory()
        if self._on_gpu and self.loaded.training_tokens is None:
            self._measure_token_memory(bytes_before)
        return {
            of_job[0].job: StepGradient(
                losses[of_job[0].job],
                sum(map(self._length, of_job)),
                sum(map(self._num_supervised, of_job)),
                len(of_job),
            )
            for of_job in items
        }

    def _backward_once(self, items: list[list[_Item]]) -> dict[int, torch.Tensor]:
        """The step's loss of each job, by its index; memory may run out at any point.

        Args:
            items: for each job in the step, its examples.
        """
        totals = {of_job[0].job: sum(map(self._num_supervised, of_job)) for of_job in items}
        if self.observer is None:
            losses = self._accumulate([item for of_job in items for item in of_job], totals)
            return dict(zip(totals, losses.unbind(), strict=True))
        (examples,), (index,) = items, totals  # an observer sees one adapter's training
        size = self.jobs[index].method.batch_size
        micro_batches = [examples[i : i + size] for i in range(0, len(examples), size)]
        passes = [lambda batch=batch: self._accumulate(batch, totals)[0] for batch in micro_batches]
        return {index: separate_gradients(self.jobs[index].parameters, passes, self.observer)}

    def _accumulate(self, items: list[_Item], totals: dict[int, int]) -> torch.Tensor:
        """Add to the gradients what these examples contribute to their steps.

        Args:
            totals: supervised tokens of each job's whole step, by the job's index.

        Returns:
            (jobs in the step,), float64: what these examples contribute to each job's loss, in the order of ``totals``.
        """
        places = {job: place for place, job in enumerate(totals)}
        sums = torch.zeros(len(totals), dtype=torch.float64, device=self.loaded.device)
        for part in self.budget.cut(items, self._length, self.packed):
            part = sorted(part, key=lambda item: item.job)  # AdapterProducts multiplies one slice for each adapter
            jobs = [item.job for item in part for _ in range(self._num_supervised(item))]
            job_of_loss = send(torch.tensor([places[job] for job in jobs]), sums.device)
            weights = send(torch.tensor([1 / totals[job] for job in jobs]), sums.device)
            with self.loaded.autocast():
                losses = self._losses(part)
            losses = losses * weights.to(losses.device)
            losses.sum().backward()
            sums.index_add_(0, job_of_loss, losses.detach().to(sums.device, torch.float64))
            self.fullest = max(self.fullest, len(part))
            self._most_tokens = max(self._most_tokens, self.budget.held)
        return sums

    def _losses(self, part: list[_Item]) -> torch.Tensor:
        """Losses (N,) of the supervised tokens of a minibatch, example after example."""
        examples = [self.jobs[item.job].examples[item.index] for item in part]
        labels = [labels_of(e, self.jobs[i.job].method.train_on) for e, i in zip(examples, part, strict=True)]
        rows, pad = [e.input_ids for e in examples], pad_token_of(self.loaded.tokenizer)
        batch = collate(rows, labels, pad, self.loaded.device, self.packed)
        spans = [
            Span(start, stop, self.jobs[item.job].name, item.seed)
            for item, (start, stop) in zip(part, batch.spans([len(e) for e in examples]), strict=True)
        ]
        self._adapters.expect(spans, batch.input_ids.numel())
        return token_losses(self.loaded, batch)

    def _length(self, item: _Item) -> int:
        return len(self.jobs[item.job].examples[item.index])

    def _num_supervised(self, item: _Item) -> int:
        return self._counts[item.job][item.index]

    def use_less_memory(self) -> None:
        """Do what the budget has decided after memory ran out: gradient checkpointing, or smaller minibatches."""
        if self.budget.checkpointing and not self.loaded.model.is_gradient_checkpointing:
            # use_reentrant=False: the reentrant kind gives no gradients where a segment's inputs need none, and the
            # embeddings, the first inputs, are frozen.
            self.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            return
        self.fullest = 0
        if self._on_gpu:
            self.loaded.training_tokens = self.budget.tokens  # so that the next training begins with what fits

    def _measure_token_memory(self, bytes_before: int) -> None:
        """Set how many tokens a minibatch may have, by the GPU memory that a token of this step took.

        Args:
            bytes_before: GPU memory that was allocated before the step.
        """
        device = self.loaded.device
        if self.budget.checkpointing or self._most_tokens < ENOUGH_TOKENS / 4:
            # Checkpointing lowers what a token takes. Of fewer than 512 tokens, memory that does not depend on their
            # number makes up too much.
            return
        bytes_a_token = (torch.cuda.max_memory_allocated(device) - bytes_before) / self._most_tokens
        self.loaded.training_tokens = self.budget.tokens = tokens_that_fit(bytes_a_token, free_gpu_bytes(device))
        log.info("%.1f MB a token: minibatches of %d tokens", bytes_a_token / 1e6, self.budget.tokens)

    def _drop_gradients(self) -> None:
        for parameter in (p for job in self.jobs.values() for p in job.parameters):
            parameter.grad = None

    def restore(self) -> None:
        """Drop the gradients and switch gradient checkpointing off, for whoever uses the model next."""
        self._drop_gradients()
        if self.budget.checkpointing:
            self.loaded.model.gradient_checkpointing_disable()
