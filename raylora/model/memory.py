"""How many tokens a minibatch may have, and what is tried next when memory runs out.

    |----------- 4096 -----------|            out of memory: a minibatch of more than 2048 tokens is halved
    |---- 2048 ----|                          out of memory: gradient checkpointing is switched on (in training)
    |---- 2048 ----| checkpointing            out of memory: with checkpointing, small minibatches are halved too
    |- 1024 -| checkpointing                  it fits

torch is imported inside functions only: the processes that watch workers read the constants and never run a model.
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
"""Tokens in a minibatch on a CPU, in training, features and MMLU alike. Larger ones are no faster, as their activations
do not stay in the caches. In training they also take 2 GB for each 1000 tokens of a model of 135 million parameters
(benchmarks/NOTES.md), and on a CPU the system kills the process before an allocation fails, so nothing backs off."""
GPU_TOKEN_BUDGET = 16384
"""Most tokens in a minibatch on a GPU."""
GPU_FEATURE_TOKENS = 8192
"""Tokens in a minibatch on a GPU whose features are measured."""
LEAST_GPU_TOKENS = 256
"""A minibatch on a GPU may always have this many tokens, however little memory was measured to be free."""
ENOUGH_TOKENS = 2048
"""Tokens in a training's minibatch on a GPU until the memory of a token has been measured. Smaller minibatches are
slower on a GPU: from here down, gradient checkpointing is tried before halving. It runs the forward pass twice, which
takes half as long again."""
MINIBATCH_MEMORY_SHARE = 0.8
"""Share of a GPU's free memory that a minibatch may take."""
CAPTURED_MEMORY_SHARE = 0.5
"""What a minibatch may take of that where passes are captured as CUDA graphs: these keep the memory of the largest one,
and beside them one of another size is run as it is."""
COPIES_MEMORY_SHARE = 0.25
"""Share of a CPU's free memory that the copies of the weights in oneDNN's layout may take."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    import torch

    text = str(error).lower()
    # torch on a CPU and the CUDA libraries raise a plain RuntimeError, which only its message tells apart.
    phrases = ("out of memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
    )


def free_gpu_bytes(device: Any) -> int:
    """Bytes that a minibatch can allocate on a GPU: free at the driver, plus reserved by torch but not in use.

    Without the memory of captured CUDA graphs, which nothing else may use as long as there is one of them, and without
    what is beyond this process's share (``device.keep_to_share``).
    """
    import torch

    free, total = torch.cuda.mem_get_info(device)
    share = torch.cuda.get_per_process_memory_fraction(device)
    free = min(free, max(0, int(share * total) - torch.cuda.memory_reserved(device)))
    index = torch.device(device).index
    of_graphs = sum(
        segment["total_size"] - segment["allocated_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["device"] == (torch.cuda.current_device() if index is None else index)
        and tuple(segment["segment_pool_id"]) != (0, 0)
    )
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - of_graphs


def tokens_that_fit(bytes_a_token: float, free_bytes: float, captured: bool = False) -> int:
    """Tokens that a minibatch on a GPU may have, between ``LEAST_GPU_TOKENS`` and ``GPU_TOKEN_BUDGET``.

    Args:
        captured: passes are captured as CUDA graphs.
    """
    share = MINIBATCH_MEMORY_SHARE * (CAPTURED_MEMORY_SHARE if captured else 1.0)
    fitting = int(share * free_bytes / max(1.0, bytes_a_token))
    return max(LEAST_GPU_TOKENS, min(GPU_TOKEN_BUDGET, fitting))


def batches_by_budget(items: Iterable[T], length: Callable[[T], int], token_budget: int) -> Iterator[list[T]]:
    """Minibatches of at most ``token_budget`` padded tokens, longest first: if one runs out of memory, the first does.

    An item longer than the budget is a minibatch of its own.
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
    """Packs of at most ``token_budget`` tokens, the fullest first, by best-fit decreasing.

    Items are taken longest first; each goes into the fullest pack that has room for it. An item longer than the budget
    is a pack of its own.
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
    """How work is tried: the most tokens in a minibatch, and whether with gradient checkpointing."""

    tokens: int
    checkpointing: bool = False


def next_attempt(last: Attempt, held: int, is_single: bool, may_checkpoint: bool = False) -> Attempt | None:
    """What to try after a minibatch ran out of memory; None where there is nothing smaller to try.

    Args:
        last: how that minibatch was tried.
        held: tokens it had, which may be far fewer than ``last.tokens``.
        is_single: it had one item, so that it cannot be halved.
        may_checkpoint: the work has a backward pass, so that gradient checkpointing saves memory.
    """
    if may_checkpoint and not last.checkpointing and (held <= ENOUGH_TOKENS or is_single):
        return Attempt(last.tokens, True)
    return None if is_single else Attempt(held // 2, last.checkpointing)


@dataclass
class TokenBudget:
    """Most tokens in a minibatch, lowered whenever memory runs out. Training, features and MMLU each run the model with
    one."""

    tokens: int
    may_checkpoint: bool = False
    """Whether the caller switches gradient checkpointing on once ``checkpointing`` is True."""
    checkpointing: bool = False
    num_backoffs: int = 0
    """How often memory ran out and something smaller was tried."""
    held: int = 0
    """Tokens, padding included, of the minibatch that was cut last, the only one that can be running."""
    num_held: int = 0
    """Items of that minibatch."""

    def cut(
        self, items: Iterable[T], length: Callable[[T], int], packed: bool = False, reserve: int = 0
    ) -> Iterator[list[T]]:
        """Items as minibatches that the budget allows, those that take the most memory first.

        Args:
            reserve: tokens of each that stay free, up to a quarter of them.
        """
        tokens = self.tokens - min(reserve, self.tokens // 4)
        for part in (packs_by_budget if packed else batches_by_budget)(items, length, tokens):
            lengths = [length(item) for item in part]
            self.held, self.num_held = sum(lengths) if packed else len(part) * max(lengths), len(part)
            yield part

    def attempt(self, run: Callable[[], T], make_room: Callable[[], bool] | None = None) -> T | None:
        """What ``run`` returns; None where memory ran out: the budget is then smaller, and the caller tries again.

        Args:
            make_room: frees what can be done without; where it returns True, the budget stays what it is.

        Raises:
            torch.OutOfMemoryError: nothing smaller can be tried (MemoryError or RuntimeError on a CPU).
        """
        try:
            return run()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            has_room = make_room is not None and make_room()
            smaller = Attempt(self.tokens, self.checkpointing) if has_room else self.smaller()
            if smaller is None:
                raise
        # After the handler, not in it: the error's traceback keeps the failed minibatch's tensors alive until it ends.
        self._back_off(smaller)
        return None

    def smaller(self) -> Attempt | None:
        """What to try if the minibatch that was cut last does not fit; None where nothing smaller can be tried."""
        last = Attempt(self.tokens, self.checkpointing)
        return next_attempt(last, self.held, self.num_held <= 1, self.may_checkpoint)

    def _back_off(self, attempt: Attempt) -> None:
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
        make_room: Callable[[], bool] | None = None,
    ) -> Iterator[tuple[list[ItemT], T]]:
        """Run ``items`` in minibatches, longest first; where memory runs out, the rest is cut smaller and run.

        Args:
            run: called with the items of a minibatch; must not return None.
            start_over: for work that adds up over all minibatches, such as a gradient: called before the first one,
                and again where memory ran out, after which every item is run again.
            make_room: see ``attempt``.

        Yields:
            The items of each minibatch, and what ``run`` returned. With ``start_over``, a minibatch may come twice.

        Raises:
            torch.OutOfMemoryError: a single item does not fit (MemoryError or RuntimeError on a CPU).
        """
        remaining = list(items)
        while remaining:
            done: set[ItemT] = set()
            if start_over:
                start_over()
            for part in self.cut(remaining, length, packed):
                result = self.attempt(functools.partial(run, part), make_room)
                if result is None:
                    done = set() if start_over else done
                    break
                done.update(part)
                yield part, result
            remaining = [item for item in remaining if item not in done]
