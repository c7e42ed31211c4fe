"""The gradient of an optimizer step, added up over minibatches that are as full as memory allows.

A step's loss is the sum of its token losses over the number of its supervised tokens, whatever the minibatches it is
cut into, and dropout is drawn example by example: smaller minibatches when memory runs out, and other adapters that
are trained in the same passes, change nothing but float noise.
"""

from __future__ import annotations

import contextlib
import functools
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
    """What one optimizer step did. ``grad_norm`` is the global L2 norm before clipping."""

    step: int
    loss: float
    grad_norm: float
    learning_rate: float
    num_tokens: int
    num_supervised: int


class StepGradient(NamedTuple):
    """What a step's gradient, which is in the parameters, comes from."""

    loss: float
    num_tokens: int
    num_supervised: int
    num_examples: int = 0


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
class Job:
    """An attached adapter, and what it is to be trained on.

    ``examples`` stand in an order that does not depend on the file's, so that the seed alone decides.
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


@dataclass(frozen=True)
class _Item:
    """An example of a step: whose, which, and the seed of its dropout."""

    job: int
    index: int
    seed: int


class GradientAccumulator:
    """Gradients of one step of every adapter, in minibatches that shrink when memory runs out."""

    def __init__(self, loaded: LoadedModel, jobs: Sequence[Job], observer: Observer | None) -> None:
        self.loaded, self.jobs, self.observer = loaded, jobs, observer
        self._counts = [count_labels(job) for job in jobs]
        self._on_gpu = loaded.device.type == "cuda"
        self.budget = TokenBudget(loaded.training_token_budget, may_checkpoint=True)
        self.fullest = self._most_tokens = 0
        longest = max(n for job in self.jobs for n in lengths_of(job.examples))
        self.packed = longest <= window_of(loaded.model) and loaded.allows(can_pack)
        if not self.packed:
            log.info("minibatches are padded: this model's attention cannot be run in blocks")
        loaded.allows(head_is_plain)  # tried here, while the model is its plain self
        self._adapters = AdapterProducts(loaded, [job.name for job in self.jobs])

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model runs these passes and no others."""
        blocks = attention_in_blocks(self.loaded.model) if self.packed else contextlib.nullcontext()
        with self._adapters.installed(), blocks:
            yield

    def backward(self, steps: Mapping[int, Sequence[int]], k: int) -> dict[int, StepGradient]:
        """Put the gradient of step ``k`` into the parameters.

        Args:
            steps: the examples of the step, by the number of the adapter's job; jobs that are done are not in it.
        """
        items = [
            [_Item(job, i, mix(self.jobs[job].seed, k, at)) for at, i in enumerate(indices)]
            for job, indices in steps.items()
        ]
        held = torch.cuda.memory_allocated(self.loaded.device) if self._on_gpu else 0
        losses: list[float] | None = None
        while losses is None:
            # For dropout outside the adapters, which a model may have: a step that is repeated draws the same.
            torch.manual_seed((self.jobs[0].seed + k) % 2**63)
            losses = self.budget.attempt(functools.partial(self._backward_once, items))
            if losses is None:
                self._drop_gradients()
                self.use_less_memory()
        if self._on_gpu and self.loaded.training_tokens is None:
            self._learn_what_fits(held)
        return {
            own[0].job: StepGradient(
                losses[own[0].job], sum(map(self._length, own)), sum(map(self._num_supervised, own)), len(own)
            )
            for own in items
        }

    def _backward_once(self, items: list[list[_Item]]) -> list[float]:
        """The loss of each adapter's step, 0 for those that are done."""
        totals = {own[0].job: sum(map(self._num_supervised, own)) for own in items}
        if self.observer is None:
            losses = self._accumulate([item for own in items for item in own], totals)
            return losses.tolist()
        (own,), size = items, self.jobs[0].method.batch_size
        groups = [own[i : i + size] for i in range(0, len(own), size)]
        passes = [lambda group=group: float(self._accumulate(group, totals)[0]) for group in groups]
        return [separate_gradients(self.jobs[0].parameters, passes, self.observer)]

    def _accumulate(self, items: list[_Item], totals: dict[int, int]) -> torch.Tensor:
        """Add the gradients of these examples' part of their adapters' losses; that part, adapter by adapter."""
        sums = torch.zeros(len(self.jobs), dtype=torch.float64, device=self.loaded.device)
        for part in self.budget.cut(items, self._length, self.packed):
            part = sorted(part, key=lambda item: item.job)  # an adapter's tokens side by side
            jobs = [item.job for item in part for _ in range(self._num_supervised(item))]
            owners = send(torch.tensor(jobs), sums.device)
            shares = send(torch.tensor([1 / totals[job] for job in jobs]), sums.device)
            with self.loaded.autocast():
                losses = self._losses(part)
            losses = losses * shares.to(losses.device)
            losses.sum().backward()
            sums.index_add_(0, owners, losses.detach().to(sums.device, torch.float64))
            self.fullest = max(self.fullest, len(part))
            self._most_tokens = max(self._most_tokens, self.budget.held)
        return sums

    def _losses(self, part: list[_Item]) -> torch.Tensor:
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
        """As the budget says, which memory has made smaller."""
        if self.budget.checkpointing and not self.loaded.model.is_gradient_checkpointing:
            self.loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
            return
        self.fullest = 0
        if self._on_gpu:
            self.loaded.training_tokens = self.budget.tokens  # the next training need not find out again

    def _learn_what_fits(self, held: int) -> None:
        """How many tokens a minibatch may have, going by what those of this step took beyond ``held``, in bytes."""
        device = self.loaded.device
        if self.budget.checkpointing or self._most_tokens < ENOUGH_TOKENS / 4:
            return  # too few to tell
        a_token = (torch.cuda.max_memory_allocated(device) - held) / self._most_tokens
        self.loaded.training_tokens = self.budget.tokens = tokens_that_fit(a_token, free_gpu_bytes(device))
        log.info("%.1f MB a token: minibatches of %d tokens", a_token / 1e6, self.budget.tokens)

    def _drop_gradients(self) -> None:
        for parameter in (p for job in self.jobs for p in job.parameters):
            parameter.grad = None

    def restore(self) -> None:
        self._drop_gradients()
        if self.budget.checkpointing:
            self.loaded.model.gradient_checkpointing_disable()
