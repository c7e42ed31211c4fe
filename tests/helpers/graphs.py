"""What stands in for a CUDA graph on a CPU: the operations of a pass, recorded and run again on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class RecordedGraphs:
    """Captures by recording each operation of torch. A replay runs these alone: no Python of raylora's runs again.

    As with CUDA, what reads a number on the host cannot be captured, and results lie where they lay in the capture.
    """

    def __init__(self) -> None:
        self.num_captures = self.num_replays = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.num_captures += 1
        run()
        with _Recorder() as recorder:
            run()

        def replay() -> None:
            self.num_replays += 1
            with torch.no_grad():
                for operation, args, kwargs, outputs in recorder.operations:
                    _copy(outputs, tree_leaves(operation(*args, **kwargs)))

        return replay


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, tree_leaves(result)))
        return result


def _copy(outputs: list[Any], found: list[Any]) -> None:
    """Put results where those of the capture lie; views and what works in place are there already."""
    for old, new in zip(outputs, found, strict=True):
        if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)
