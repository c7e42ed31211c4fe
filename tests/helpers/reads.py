"""Where the CPU reads what a GPU would have to compute first: seen on a CPU too."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
ASKS = {getattr(torch.Tensor, name) for name in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__")}
"""In inference mode ``READS`` are not seen, nor is ``tolist`` ever."""
BEFORE_SENDING = ("raylora/data/minibatch.py",)
"""Where tensors are still on the CPU, whatever the model's device is."""
ONLY_ON_A_CPU = ("torch/optim/",)
"""The fused AdamW of a GPU keeps its counters there."""


def frames() -> Iterator[str]:
    frame = sys._getframe(2)
    while frame is not None:
        yield frame.f_code.co_filename
        frame = frame.f_back


class Asks(TorchFunctionMode):
    def __init__(self, note):
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in ASKS:
            self.note(func)
        return func(*args, **(kwargs or {}))


class Reads(TorchDispatchMode):
    """Notes where the CPU asks for the numbers in a tensor: on a GPU it would wait there.

    Args:
        within: only what this file has called.
    """

    def __init__(self, within: str = ""):
        super().__init__()
        self.within = within
        self.places: list[str] = []
        self.asks = Asks(self.note)

    def __enter__(self):
        self.asks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.asks.__exit__(*error)

    def note(self, func):
        files = list(frames())
        known = any(known in file for file in files for known in (*BEFORE_SENDING, *ONLY_ON_A_CPU))
        if not known and any(self.within in file for file in files):
            self.places.append(f"{func}: {files[:6]}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is aten.index.Tensor and any(t is not None and t.dtype == torch.bool for t in args[1])
        if func in READS or by_mask:
            self.note(func)
        return func(*args, **(kwargs or {}))
