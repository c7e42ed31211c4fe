"""Numbers on their way from a GPU to the CPU, which reads them when the GPU has its next work: neither waits.

    GPU    pass 1    pass 2    pass 3
    CPU              reads 1   reads 2   reads 3

On a CPU the numbers are there at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")


class Fetched:
    """A tensor that is being copied to the CPU. One that lies there already is not copied: it must not be changed.

    Args:
        sizes: into how many of its first axis ``rows`` splits it, all of them together.
    """

    def __init__(self, tensor: torch.Tensor, sizes: Sequence[int] = ()) -> None:
        self._sizes = list(sizes)
        self._arrived: torch.cuda.Event | None = None
        # Without waiting, the copy is to pinned memory.
        self._on_cpu = tensor.detach().to("cpu", non_blocking=tensor.is_cuda)
        if tensor.is_cuda:
            self._arrived = torch.cuda.current_stream(tensor.device).record_event()

    def read(self) -> torch.Tensor:
        """Wait for the tensor. Call it when the next work is launched."""
        if self._arrived:
            self._arrived.synchronize()
        return self._on_cpu

    def rows(self) -> tuple[torch.Tensor, ...]:
        """``read``, split into ``sizes``."""
        return self.read().split(self._sizes)


def one_late(launched: Iterable[T]) -> Iterator[T]:
    """Each of ``launched`` once the next one is made, so that it can be read while a GPU is at the next."""
    before: list[T] = []
    for item in launched:
        yield from before
        before = [item]
    yield from before
