"""Forward and backward passes of fixed sizes, captured once and replayed: what a CUDA graph needs around it.

Below some 6,000 tokens a pass, Python launches kernels more slowly than an H200 runs them: a pass of 2,048 tokens of an
8B model takes 283 ms as it is launched and 133 ms as a graph (benchmarks/NOTES.md). A graph runs the same kernels on
the same memory each time, so a pass is copied into tensors that stay where they are.

    1st pass of a size     run as it is
    2nd                    run as it is; captured; replayed, and held against the one before
    from then on           copied into the tensors of the capture, and replayed
"""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar

import torch

from raylora.data.minibatch import send
from raylora.errors import one_line
from raylora.model.adapters import LoadedModel
from raylora.model.attention import REFUSALS
from raylora.model.device import waiting_is_refused
from raylora.model.memory import is_out_of_memory

log = logging.getLogger("raylora")

WARM_UPS = 1
"""Passes on the stream of a capture before it. Two passes of the size were run as they are by then, so that kernels are
compiled and chosen; what is left is what libraries keep for each stream, as cuBLAS its workspace."""
TOLERANCE = 2e-2
"""Relative difference of a replay from the pass as it is: kernels that add in another order each time differ in half
precision."""
Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Captures what a function does, and returns a function that does it again."""
SMALLEST = 512
"""Tokens of the smallest pass that is captured."""
LONGEST_BLOCKS = (512, 2048)
"""What the longest block of a captured pass is rounded up to. The kernel of attention is launched for blocks of that
length: of all 8,192 tokens, a million thread blocks would start in each layer to do nothing."""
TOKENS_A_BLOCK = 32
"""A captured pass has room for one block in so many tokens."""
T = TypeVar("T")


class Size(Hashable, Protocol):
    """The fixed size of a captured pass: passes of equal sizes have tensors of equal shapes."""

    @property
    def tokens(self) -> int: ...


class TensorRecord:
    """Of dataclasses: the tensors of one pass, in the fields of the record and of the records in it.

    Those that a record names in ``staying`` stay on the host.
    """

    def to(self: T, device: torch.device) -> T:
        """The same on a device."""
        return _with_tensors(self, lambda tensor: send(tensor, device))

    def fill(self, others: TensorRecord) -> None:
        """Copy the numbers of ``others``, which has the same size, into these tensors."""
        for mine, theirs in zip(_tensors(self), _tensors(others), strict=True):
            assert mine.shape == theirs.shape
            mine.copy_(theirs.pin_memory() if mine.is_cuda else theirs, non_blocking=True)


def fixed_size(num_tokens: int) -> int:
    """The least fixed size of a pass that holds so many tokens: four sizes in each doubling, from 512 on.

    A pass is then filled up by 10% on average. Each size is captured for itself.
    """
    base = SMALLEST
    while 2 * base < num_tokens:
        base *= 2
    return next(size for k in (4, 5, 6, 7, 8) if (size := base * k // 4) >= num_tokens)


def largest_size(num_tokens: int) -> int:
    """The largest fixed size of at most so many tokens; the smallest one if there is none."""
    size = SMALLEST
    while fixed_size(size + 1) <= num_tokens:
        size = fixed_size(size + 1)
    return size


_FAILED: list[torch.cuda.CUDAGraph] = []
"""Captures that CUDA refused, kept alive: torch's allocators may still ask one whether it is under way."""


class CudaCapture:
    """Captures on a GPU. The graphs of all sizes use the same memory, as none runs while another does.

    Warm-ups and captures are on one stream: a workspace that cuBLAS first made in a capture would lie in the graphs'
    memory, and keep it from being freed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        usual = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(usual)
        try:
            with torch.cuda.stream(self._stream), waiting_is_refused():
                for _ in range(WARM_UPS):
                    run()
        finally:  # what it added to must be complete before it is put back
            usual.wait_stream(self._stream)
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()  # torch takes none whose graphs are all gone
        graph = torch.cuda.CUDAGraph()
        try:
            # Of this thread alone: what others of the process do on the GPU meanwhile does not end the capture.
            with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                run()
        except REFUSALS as error:
            self._clean_up(graph)
            if is_out_of_memory(error) or error.__context__ is None:
                raise
            raise error.__context__ from None  # that of the end says only that there was one before it
        finally:
            torch.cuda.set_stream(usual)  # torch leaves its own where a capture ends in an error
        self._graphs.add(graph)
        replay: Callable[[], None] = graph.replay
        return replay

    def _clean_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Undo what torch leaves behind where CUDA refuses the end of a capture.

        Its allocator would go on as if one were under way, and free nothing when memory runs out; random numbers would
        be refused.
        """
        index = self._stream.device.index
        with contextlib.suppress(RuntimeError):  # it was ended by torch
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
            self._pool = torch.cuda.graph_pool_handle()
            _FAILED.append(graph)
        graph.reset()
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())


def capture_of(loaded: LoadedModel) -> Capture | None:
    """What captures the passes of a model; None on a CPU, on several devices, and where it is switched off."""
    if loaded.device.type != "cuda" or not loaded.graphs or len({p.device for p in loaded.model.parameters()}) > 1:
        return None
    if CudaCapture not in loaded.kept:
        loaded.kept[CudaCapture] = CudaCapture(loaded.device)
    capture: Capture = loaded.kept[CudaCapture]
    return capture


class KeptPasses(Protocol):
    """Passes of a model that are kept for the next training or evaluation."""

    graphed: GraphedPasses


def keep_passes(loaded: LoadedModel, kind: type, num_slots: int, num_groups: int, passes: KeptPasses) -> None:
    """Keep passes with room for so many adapters; ``kept_passes`` finds them.

    Those of other numbers of adapters, if several, are let go: their weights and gradients are gigabytes.
    """
    for other in [k for k in loaded.kept if isinstance(k, tuple) and 1 < k[1] != num_slots]:
        del loaded.kept[other]
    loaded.kept[kind, num_slots, num_groups] = passes


def kept_passes(loaded: LoadedModel, kind: type[T], num_slots: int, num_groups: int) -> T | None:
    """What ``keep_passes`` has kept."""
    found: T | None = loaded.kept.get((kind, num_slots, num_groups))
    return found


def _of(loaded: LoadedModel) -> dict[Any, GraphedPasses]:
    """The passes that are kept for the next trainings and evaluations of a model, by their keys."""
    found = {key: getattr(value, "graphed", None) for key, value in loaded.kept.items()}
    return {key: graphed for key, graphed in found.items() if isinstance(graphed, GraphedPasses)}


def make_room(loaded: LoadedModel, running: GraphedPasses) -> bool:
    """Drop what was captured, as memory ran out, and capture no passes as large again; whether there was anything.

    Of passes that are not running all is dropped: they hold the weights of adapters as well, and the keys of prefixes.
    """
    had_any = running.capture_less() or any(graphed.holds_any for graphed in _of(loaded).values())
    for key, graphed in _of(loaded).items():
        graphed.forget()
        if graphed is not running:
            del loaded.kept[key]
    running.forget()
    return had_any


def free_what_others_need(loaded: LoadedModel) -> None:
    """Keep captured passes for the next training only where as much memory is free as they hold.

    The held-out losses of a probe and MMLU run beside them. To capture a size again takes four passes.
    """
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(loaded.device)
    if free < torch.cuda.memory_reserved(loaded.device) - torch.cuda.memory_allocated(loaded.device):
        for graphed in _of(loaded).values():
            graphed.forget()
        torch.cuda.empty_cache()


class GraphedPasses:
    """Runs passes, captured where that is possible and comes to the same.

    Args:
        run: runs a pass whose tensors are on the device; adds to ``sums``, and reads and changes nothing else.
        capture: a ``CudaCapture``; None: passes are run as they are.
        sums: returns the tensors that ``run`` adds to.
    """

    def __init__(
        self, run: Callable[[Any], None], capture: Capture | None, sums: Callable[[], Sequence[torch.Tensor]]
    ) -> None:
        self._run, self._capture, self._sums = run, capture, sums
        self._seen: set[Size] = set()
        self._captured: dict[Size, tuple[TensorRecord, Callable[[], None]]] = {}
        self._most_tokens = 2**62
        self.num_replayed = 0
        """Passes that were replayed."""
        self.peak_bytes = 0
        """The most GPU memory that was held while a pass was captured: replays allocate nothing that is counted."""

    @property
    def are_wanted(self) -> bool:
        """Whether passes should be made of fixed sizes."""
        return self._capture is not None

    @property
    def holds_any(self) -> bool:
        """Whether a pass is captured."""
        return bool(self._captured)

    def capture_less(self) -> bool:
        """From now on capture passes of half the tokens of the largest that is captured; returns whether one is."""
        largest = max((size.tokens for size in self._captured), default=0)
        self._most_tokens = min(self._most_tokens, largest // 2) if largest else self._most_tokens
        return largest > 0

    def forget(self, above: int = 0) -> None:
        """Drop the captured passes of more than so many tokens."""
        self._captured = {size: held for size, held in self._captured.items() if size.tokens <= above}
        self._seen = {size for size in self._seen if size.tokens <= above}

    def run(self, inputs: TensorRecord, device: torch.device, size: Size | None) -> None:
        """Run a pass that is on the host.

        Args:
            size: of ``inputs``, which are filled up to it; None: they have no fixed size.

        Raises:
            torch.OutOfMemoryError: it does not fit (MemoryError or RuntimeError on a CPU).
        """
        if size is not None and self._capture is not None and size in self._captured:
            static, replay = self._captured[size]
            static.fill(inputs)
            replay()
            self.num_replayed += 1
            return
        on_device = inputs.to(device)
        if size is None or self._capture is None or size not in self._seen:
            self._run(on_device)
            if size is not None and size.tokens <= self._most_tokens:
                self._seen.add(size)
            return
        self._capture_size(on_device, size, self._capture)

    def _capture_size(self, inputs: TensorRecord, size: Size, capture: Capture) -> None:
        """Run a pass as it is, capture it, and keep the capture if its first replay adds the same."""
        before = [tensor.clone() for tensor in self._sums()]
        self._run(inputs)
        expected = [tensor.clone() for tensor in self._sums()]
        if not all(bool(tensor.isfinite().all()) for tensor in expected):
            return  # a training that diverges says nothing about a capture
        try:
            replay = capture(lambda: self._run(inputs))
            if (device := expected[0].device).type == "cuda":
                self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))
            _restore(self._sums(), before)
            replay()
            if reason := _difference(before, expected, self._sums()):
                self._give_up(size, reason)
            else:
                self._captured[size] = (inputs, replay)
        except REFUSALS as error:
            if is_out_of_memory(error):
                self._most_tokens = size.tokens - 1
                self.forget(self._most_tokens)
            else:
                self._give_up(size, one_line(error))
        _restore(self._sums(), expected)

    def _give_up(self, size: Size, reason: str) -> None:
        log.warning("passes are not captured as CUDA graphs: of %d tokens, %s", size.tokens, reason)
        self._capture = None
        self.forget()


def _restore(tensors: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)


def _difference(before: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], found: Sequence[torch.Tensor]) -> str:
    """Why what was added to ``before`` is not what was expected; "" if it is. ``before`` and ``found`` are changed."""
    for old, right, new in zip(before, expected, found, strict=True):
        # In place: gradients of 16 adapters of an 8B model are 2.7 GB. What is in ``found`` is overwritten anyway.
        difference, size = float(new.sub_(right).norm()), float(old.sub_(right).norm())
        if not difference <= TOLERANCE * size:
            return f"its first replay gives other numbers (by {difference:.2g}, of {size:.2g})"
    return ""


def _tensors(record: Any) -> list[torch.Tensor]:
    """All tensors of a dataclass, those of the dataclasses in it too."""
    values = [getattr(record, field.name) for field in fields(record)]
    found = [_tensors(value) if is_dataclass(value) else [value] for value in values]
    return [value for part in found for value in part if isinstance(value, torch.Tensor)]


def _with_tensors(record: T, change: Callable[[torch.Tensor], torch.Tensor]) -> T:
    """A dataclass with each of its tensors changed, those of the dataclasses in it too."""
    changed: dict[str, Any] = {}
    for field in fields(record):  # type: ignore[arg-type]
        value = getattr(record, field.name)
        if field.name in getattr(record, "staying", ()):
            continue
        if is_dataclass(value):
            changed[field.name] = _with_tensors(value, change)
        elif isinstance(value, torch.Tensor):
            changed[field.name] = change(value)
    return replace(record, **changed)  # type: ignore[type-var]
