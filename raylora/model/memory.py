"""How many tokens a minibatch may have, and what is done when memory runs out.

    |----------- 4096 -----------|            out of memory: a large minibatch is halved
    |---- 2048 ----|                          out of memory: activations are checkpointed, in a training
    |---- 2048 ----| checkpointing            out of memory: a small one is halved, too
    |- 1024 -| checkpointing                  it fits

This module imports no torch of its own: the processes that watch workers read the numbers, and run no model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from raylora.work_counts import work_counts

T = TypeVar("T")
ItemT = TypeVar("ItemT", bound=Hashable)

CPU_TOKEN_BUDGET = 512
"""Tokens in a minibatch on a CPU, in training, features and MMLU alike. Larger ones are no faster, as they leave the
caches, and in training take more memory, where no allocation fails before the system kills: 2 GB for each 1000 tokens
of a model of 135 million parameters (benchmarks/NOTES.md)."""
GPU_TOKEN_BUDGET = 16384
"""Most tokens in a minibatch on a GPU."""
GPU_FEATURE_TOKENS = 8192
LEAST_GPU_TOKENS = 256
"""Whatever is measured of the memory that a token takes, a minibatch is tried that has so many."""
ENOUGH_TOKENS = 2048
"""In a training's minibatch on a GPU until it is known what a token takes of its memory. Smaller ones are slower there:
below this the forward pass is rather run twice (gradient checkpointing), which takes half as long again."""
MINIBATCH_MEMORY_SHARE = 0.8
"""Of the free memory of a GPU, what a minibatch may take."""
COPIES_MEMORY_SHARE = 0.25
"""Of the free memory of a CPU, what the copies of the weights in oneDNN's layout may take."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    import torch

    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(t in text for t in known)
    )


def free_gpu_bytes(device: Any) -> int:
    """What a minibatch can allocate on a GPU: what the driver has, and what torch keeps at hand and does not use."""
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def tokens_that_fit(bytes_a_token: float, free_bytes: float) -> int:
    """Of a minibatch on a GPU."""
    fitting = int(MINIBATCH_MEMORY_SHARE * free_bytes / max(1.0, bytes_a_token))
    return max(LEAST_GPU_TOKENS, min(GPU_TOKEN_BUDGET, fitting))


def batches_by_budget(items: Iterable[T], length: Callable[[T], int], token_budget: int) -> Iterator[list[T]]:
    """Minibatches of at most ``token_budget`` padded tokens, longest first, so that memory runs out at once or never.

    A single item longer than the budget goes alone.
    """
    batch: list[T] = []
    for item in sorted(items, key=length, reverse=True):
        width = length(batch[0]) if batch else length(item)
        if batch and width * (len(batch) + 1) > token_budget:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def packs_by_budget(items: Iterable[T], length: Callable[[T], int], token_budget: int) -> Iterator[list[T]]:
    """Packs of at most ``token_budget`` tokens, the fullest first: each item, longest first, goes where it just fits.

    A single item longer than the budget goes alone.
    """
    packs: list[tuple[int, list[T]]] = []
    for item in sorted(items, key=length, reverse=True):
        size = length(item)
        fitting = [i for i, (used, _) in enumerate(packs) if used + size <= token_budget]
        if fitting:
            best = max(fitting, key=lambda i: packs[i][0])
            packs[best] = (packs[best][0] + size, [*packs[best][1], item])
        else:
            packs.append((size, [item]))
    yield from (items for _, items in sorted(packs, key=lambda pack: -pack[0]))


class Attempt(NamedTuple):
    """How work is tried: the most tokens in a minibatch, and whether activations are checkpointed."""

    tokens: int
    checkpointing: bool = False


def next_attempt(last: Attempt, held: int, is_single: bool, may_checkpoint: bool = False) -> Attempt | None:
    """What to try after a minibatch ran out of memory; None where there is nothing smaller to try.

    Args:
        held: tokens of that minibatch, which may have been far fewer than it was allowed.
        is_single: it was of one item.
        may_checkpoint: there is a backward pass, whose activations take the memory.
    """
    if may_checkpoint and not last.checkpointing and (held <= ENOUGH_TOKENS or is_single):
        return Attempt(last.tokens, True)
    return None if is_single else Attempt(held // 2, last.checkpointing)


@dataclass
class TokenBudget:
    """Tokens in a minibatch, fewer whenever memory runs out. All that runs the model runs it within one of these."""

    tokens: int
    may_checkpoint: bool = False
    """Whether whoever runs the work checkpoints its activations once ``checkpointing`` is True."""
    checkpointing: bool = False
    num_backoffs: int = 0
    held: int = 0
    """Tokens, padding included, of the minibatch that was cut last: the one that fails, if any does."""
    num_held: int = 0
    """Items of that minibatch."""

    def cut(self, items: Iterable[T], length: Callable[[T], int], packed: bool = False) -> Iterator[list[T]]:
        """Items as minibatches that the budget allows, those that take most memory first."""
        for part in (packs_by_budget if packed else batches_by_budget)(items, length, self.tokens):
            lengths = [length(item) for item in part]
            self.held, self.num_held = sum(lengths) if packed else len(part) * max(lengths), len(part)
            yield part

    def attempt(self, run: Callable[[], T]) -> T | None:
        """What ``run`` returns; None where memory ran out: the budget is smaller then, and the work is to begin again.

        Raises:
            torch.OutOfMemoryError: nothing smaller can be tried (MemoryError or RuntimeError on a CPU).
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            smaller = self.smaller() if is_out_of_memory(error) else None
            if smaller is None:
                raise
        # Outside of the handler: within it, the error keeps the tensors of the minibatch that failed alive.
        self._take(smaller)
        return None

    def smaller(self) -> Attempt | None:
        """What is tried if the minibatch that was cut last does not fit."""
        last = Attempt(self.tokens, self.checkpointing)
        return next_attempt(last, self.held, self.num_held <= 1, self.may_checkpoint)

    def _take(self, attempt: Attempt) -> None:
        import torch

        self.tokens, self.checkpointing = attempt
        self.num_backoffs += 1
        work_counts.oom_backoffs += 1
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def pieces(
        self,
        items: Iterable[ItemT],
        length: Callable[[ItemT], int],
        run: Callable[[list[ItemT]], T],
        start_over: Callable[[], object] | None = None,
        packed: bool = False,
    ) -> Iterator[tuple[list[ItemT], T]]:
        """Minibatches of ``items``, longest first, each with what ``run`` returned of it, which is not None.

        Args:
            start_over: for work that adds up over all minibatches, such as a gradient: called before the first one,
                and again where memory ran out, after which every item is run again.

        Raises:
            torch.OutOfMemoryError: a single item does not fit.
        """
        left = list(items)
        while left:
            done: set[ItemT] = set()
            if start_over:
                start_over()
            for part in self.cut(left, length, packed):
                result = self.attempt(functools.partial(run, part))
                if result is None:
                    done = set() if start_over else done
                    break
                done.update(part)
                yield part, result
            left = [item for item in left if item not in done]
