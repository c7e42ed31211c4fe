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
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from raylora.config.method import Method
from raylora.data.encoding import EncodedExample, labels_of, lengths_of, pad_token_of, supervised_counts
from raylora.errors import PartialInputError
from raylora.model.adapter_products import check_may_share
from raylora.model.adapters import LoadedModel
from raylora.model.attention import attention_in_blocks
from raylora.model.device import peak_memory_bytes
from raylora.model.dropout import mix
from raylora.model.forward import head_is_plain
from raylora.model.graphs import (
    SMALLEST,
    Capture,
    capture_of,
    free_what_others_need,
    keep_passes,
    kept_passes,
    largest_size,
    make_room,
)  # fmt: skip
from raylora.model.memory import ENOUGH_TOKENS, TokenBudget, free_gpu_bytes, tokens_that_fit
from raylora.model.packing import may_pack
from raylora.training.pass_inputs import Example, PassInputs, PassSize, align_groups, make_inputs, size_of
from raylora.training.passes import Passes

log = logging.getLogger("raylora")
MOST_GROUPS = 8
"""Micro-batches of a probe in one pass, at most: each has a gradient of its own, 168 MB for an 8B model and rank 16."""
GROUP_ALIGNMENT = 16
"""Tokens that a group begins at multiples of on a GPU: its kernel for the gradients of groups asks for 16 bytes."""


@dataclass(frozen=True)
class Step:
    """What one optimizer step did.

    ``loss`` is in nats per supervised token; ``grad_norm`` is the global L2 norm before clipping.
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
    """One float64, in nats per supervised token, on the device: reading it waits for the GPU."""
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
        found = [(s, p.grad) for s, p in zip(sums, parameters, strict=True) if p.grad is not None]
        if found:  # one call: 448 matrices of an 8B model are as many launches otherwise
            torch._foreach_add_([s for s, _ in found], [g for _, g in found])
        for parameter in parameters:
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
    slot: int
    """Of its adapter."""
    group: int
    """Whose gradient it adds to: its adapter's slot, or the micro-batch of a probe."""
    weight: float
    """Of each of its labels in its step's loss."""


class GradientAccumulator:
    """Computes one step's gradients of all adapters, in minibatches that become smaller when memory runs out.

    Adapters join and leave between steps, outside of ``ready``. ``jobs`` holds those that are there, by their indices.
    ``packed``: whether minibatches are packed. ``fullest``: examples of the largest minibatch since the last halving.

    Args:
        observer: of a single job.
        capture: captures passes of fixed sizes; by default that of the model's device (``capture_of``).
    """

    def __init__(
        self, loaded: LoadedModel, jobs: Sequence[Job], observer: Observer | None, capture: Capture | None = None
    ) -> None:
        self.loaded, self.observer = loaded, observer
        self.jobs: dict[int, Job] = {}
        self._indices = itertools.count()
        self._counts: dict[int, list[int]] = {}
        self._on_gpu = loaded.device.type == "cuda"
        self._pad = pad_token_of(loaded.tokenizer)
        self._capture = capture or capture_of(loaded)
        self.budget = TokenBudget(loaded.training_token_budget, may_checkpoint=True)
        self._round_budget()
        self.fullest = self._most_tokens = self._num_replayed = 0
        self._passes: Passes | None = None
        self.packed = True
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> int:
        """Take in a job, whose adapter is attached; returns its index.

        Raises:
            UserError: it cannot share a forward pass with those that are there.
        """
        check_may_share(self.loaded, [other.name for other in (*self.jobs.values(), job)])
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
            self._choose_form()

    def _choose_form(self) -> None:
        """Choose whether minibatches are packed."""
        longest = max(n for job in self.jobs.values() for n in lengths_of(job.examples))
        # Tried before ``ready`` replaces attention and PEFT's forward pass; ``token_losses`` looks one result up.
        packed = may_pack(self.loaded, longest)
        self.loaded.allows(head_is_plain)
        if self.packed and not packed:
            log.info("minibatches are padded: this model's attention cannot be run in blocks")
        self.packed = packed

    @property
    def graphed(self) -> bool:
        """Whether passes were replayed as CUDA graphs."""
        return self._num_replayed > 0

    @property
    def adapter_forward(self) -> str:
        """See ``AdapterProducts.forward_names``."""
        return self._running.products.forward_names

    @property
    def peak_bytes(self) -> int:
        """See ``peak_memory_bytes``; with that of passes that were captured, in this training or before it."""
        captured = self._passes.graphed.peak_bytes if self._passes and self.graphed else 0
        return max(captured, peak_memory_bytes(self.loaded.device))

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model serves ``backward`` alone: its attention and its adapters' products are replaced."""
        blocks = attention_in_blocks(self.loaded.model) if self.packed else contextlib.nullcontext()
        passes = self._passes_of_jobs()
        replayed_before = passes.graphed.num_replayed
        with passes.products.installed(), blocks:
            yield
        self._num_replayed += passes.graphed.num_replayed - replayed_before

    def _passes_of_jobs(self) -> Passes:
        """Passes with room for all jobs. Those of earlier trainings are used again, with what was captured of them."""
        num_slots, num_groups = len(self.jobs), len(self.jobs)
        if self.observer:
            (method,) = (job.method for job in self.jobs.values())
            num_groups = min(MOST_GROUPS, method.gradient_accumulation)
        if self._passes is None or self._passes.products.num_slots < num_slots:
            kept = kept_passes(self.loaded, Passes, num_slots, num_groups) if self._capture else None
            self._passes = kept or Passes(self.loaded, num_slots, num_groups, self._capture)
            if self._capture:
                keep_passes(self.loaded, Passes, num_slots, num_groups, self._passes)
        self._passes.hold([job.name for job in self.jobs.values()])
        if num_groups > num_slots and not self._passes.products.is_whole:
            self._passes.use_one_group()
        return self._passes

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
        items = {index: self._items_of(index, k, examples) for index, (k, examples) in steps.items()}
        first, (first_k, _) = next(iter(steps.items()))
        bytes_before = torch.cuda.memory_allocated(self.loaded.device) if self._on_gpu else 0
        losses: dict[int, torch.Tensor] | None = None
        while losses is None:
            # Seeds the dropout that a model may have outside its adapters: a step that begins again draws the same.
            torch.manual_seed((self.jobs[first].seed + first_k) % 2**63)
            try:
                may_drop = functools.partial(make_room, self.loaded, self._running.graphed)
                losses = self.budget.attempt(functools.partial(self._backward_once, items), may_drop)
            except PartialInputError:
                self._running.use_one_group()
                self._drop_gradients()
                continue
            if losses is None:
                self._drop_gradients()
                self.use_less_memory()
        if self._on_gpu and self.loaded.training_tokens is None:
            self._measure_token_memory(bytes_before)
        return {
            index: StepGradient(
                losses[index],
                sum(map(self._length, of_job)),
                sum(map(self._num_supervised, of_job)),
                len(of_job),
            )
            for index, of_job in items.items()
        }

    @property
    def _running(self) -> Passes:
        assert self._passes is not None, "backward is called inside ready"
        return self._passes

    def _items_of(self, index: int, k: int, examples: Sequence[int]) -> list[_Item]:
        """The examples of a job's step ``k``."""
        job, counts = self.jobs[index], self._counts[index]
        weight = 1 / sum(counts[i] for i in examples)
        slot = self._running.products.slot_of(job.name)
        return [_Item(index, i, mix(job.seed, k, place), slot, slot, weight) for place, i in enumerate(examples)]

    def _backward_once(self, items: Mapping[int, list[_Item]]) -> dict[int, torch.Tensor]:
        """The step's loss of each job, by its index; memory may run out at any point.

        Args:
            items: for each job in the step, by its index, its examples.
        """
        if self.observer is not None:
            ((index, examples),) = items.items()  # an observer sees one adapter's training
            return {index: self._observe(self.jobs[index], examples, self.observer)}
        self._accumulate([item for of_job in items.values() for item in of_job])
        losses = {}
        for index, of_job in items.items():
            self._running.products.publish(self.jobs[index].name, of_job[0].group)
            losses[index] = self._running.losses[of_job[0].group].clone()
        return losses

    def _observe(self, job: Job, examples: list[_Item], observer: Observer) -> torch.Tensor:
        """The loss of a step whose micro-batches are observed: as many in a pass as there are groups."""
        size, num_groups = job.method.batch_size, self._running.products.num_groups
        micro_batches = [examples[i : i + size] for i in range(0, len(examples), size)]

        def run(number: int) -> torch.Tensor:
            group = number % num_groups
            if group == 0:
                beside = enumerate(micro_batches[number : number + num_groups])
                self._accumulate([replace(item, group=i) for i, batch in beside for item in batch])
            self._running.products.publish(job.name, group)
            return self._running.losses[group]

        passes = [functools.partial(run, number) for number in range(len(micro_batches))]
        return separate_gradients(job.parameters, passes, observer)

    def _accumulate(self, items: list[_Item]) -> None:
        """Compute what these examples contribute to the gradients and losses of their groups."""
        passes = self._running
        passes.begin()
        # Room for what aligns the groups: a pass that is a little too long would be filled up by a fifth.
        reserve = GROUP_ALIGNMENT * passes.products.num_groups if self._aligns else 0
        for part in self.budget.cut(items, self._length, self.packed, reserve):
            examples = [self._example(item) for item in sorted(part, key=lambda item: item.group)]
            inputs, size = self._inputs_of(examples, passes)
            passes.graphed.run(inputs, self.loaded.device, size)
            self.fullest = max(self.fullest, len(part))
            self._most_tokens = max(self._most_tokens, self.budget.held)

    def _example(self, item: _Item) -> Example:
        job = self.jobs[item.job]
        example = job.examples[item.index]
        labels, num_labels = labels_of(example, job.method.train_on), self._num_supervised(item)
        return Example(example.input_ids, labels, item.slot, item.seed, item.group, item.weight, num_labels)

    def _inputs_of(self, examples: list[Example], passes: Passes) -> tuple[PassInputs, PassSize | None]:
        """A pass of these examples, and the fixed size that it is filled up to; None where it is as large as it is."""
        size, products = None, passes.products
        if self._aligns:
            examples = align_groups(examples, products, GROUP_ALIGNMENT, self._pad)
        may_capture = passes.graphed.are_wanted and products.is_whole and not products.by_group
        if self.packed and may_capture and not self.budget.checkpointing:
            size = size_of(examples, any(job.method.lora_dropout for job in self.jobs.values()))
        return make_inputs(examples, products, self._pad, self.packed, size), size

    @property
    def _aligns(self) -> bool:
        """Whether groups are aligned and never empty."""
        return self.packed and self._running.products.num_groups > 1 and bool(self._on_gpu or self._capture)

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
        if self._on_gpu and self.budget.tokens < self.loaded.training_token_budget:
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
        captured = self._running.graphed.are_wanted
        self.budget.tokens = tokens_that_fit(bytes_a_token, free_gpu_bytes(device), captured)
        self._round_budget()
        self.loaded.training_tokens = self.budget.tokens
        log.info("%.1f MB a token: minibatches of %d tokens", bytes_a_token / 1e6, self.budget.tokens)

    def _round_budget(self) -> None:
        """Make full minibatches as large as a pass that is captured, so that these are filled up by little."""
        if self._capture and self.budget.tokens >= SMALLEST:
            self.budget.tokens = largest_size(self.budget.tokens)

    def _drop_gradients(self) -> None:
        for parameter in (p for job in self.jobs.values() for p in job.parameters):
            parameter.grad = None

    def restore(self) -> None:
        """Drop the gradients and switch gradient checkpointing off, for whoever uses the model next."""
        self._drop_gradients()
        if self.budget.checkpointing:
            self.loaded.model.gradient_checkpointing_disable()
        if self._on_gpu and self.graphed:
            free_what_others_need(self.loaded)
