"""What Triton's kernels compute on a GPU, each beside plain code that computes the same anywhere.

Dropout is a hash of a number's row, column and module (``model/dropout.py``): nothing of it is kept for the
backward pass, which makes it again. As torch's operations on int32 it was a third of the kernels of a training's pass,
and 60 to 90 of its 227 ms on an H200; as one kernel, 8 ms.

A kernel holds itself against the plain code on its first use on a card. One that differs, or does not compile, is left,
with a line in the log. Without triton (torch's builds for a CPU) the plain code runs.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raylora.errors import one_line
from raylora.model.kernel_inputs import E4M3, E4M3_LARGEST, LEAST_SCALED, Dropout

log = logging.getLogger("raylora")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def signed(number: int) -> int:
    """The low 32 bits of ``number``, as torch's int32 has them."""
    return (number & 0x7FFFFFFF) - (number & 0x80000000)


def scramble(h: torch.Tensor) -> torch.Tensor:
    """Hash each int32 of ``h`` in place: the finalizer of MurmurHash3 (Appleby 2011)."""
    # torch's shifts copy the sign bit, which the masks remove: without them 5% were dropped where 10% were asked for.
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    h *= signed(0x85EBCA6B)
    h ^= (h >> 13).bitwise_and_(0x7FFFF)
    h *= signed(0xC2B2AE35)
    h ^= (h >> 16).bitwise_and_(0xFFFF)
    return h


def spread_numbers(n: int) -> torch.Tensor:
    """int32 (n,): 0, 1, 2, ... times 2**32 over the golden ratio, which sets neighbours far apart."""
    return torch.arange(n, dtype=torch.int32) * signed(0x9E3779B9)


def kept(
    rows: torch.Tensor, columns: torch.Tensor, module_hash: int, thresholds: torch.Tensor | int, width: int
) -> torch.Tensor:
    """Which numbers dropout keeps, bool (N, width).

    Args:
        rows: a hash for each row, int32 (N,).
        columns: a hash for every two columns, int32 (width / 2 rounded up,).
        module_hash: as a signed int32.
        thresholds: 2^16 times the share of each row that is dropped, int32 (N,), below 2^16; a row with 0 keeps all. A
            number where it is that of all.
    """
    words = scramble(scramble(rows + module_hash)[:, None] + columns)
    # Each int32 is two int16, one for each of two columns: those below the threshold drop their number.
    numbers = words.view(torch.int16)[:, :width]
    if isinstance(thresholds, int):
        return numbers >= thresholds - 2**15
    return numbers >= (thresholds - 2**15).to(torch.int16)[:, None]


def _plain_drop(x: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    keep = kept(*dropout[:4], x.shape[1])
    return torch.where(keep, x * dropout.factors[:, None], 0).to(dtype)


def _plain_add_dropped(y: torch.Tensor, g: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    keep = kept(*dropout[:4], y.shape[1])
    return y.add_(torch.where(keep, g * dropout.factors[:, None], 0))


def _plain_dequantize_int8(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    factors = (scales / 127)[:, None]
    if integers.is_cuda:  # one kernel, in place of one that converts and one that multiplies
        return torch.mul(integers, factors, out=torch.empty_like(integers, dtype=dtype))
    return integers.to(dtype).mul_(factors)


def _plain_dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    from bitsandbytes.functional import dequantize_blockwise

    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    shape = tuple(state.shape)
    weight: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit.default(
        packed, scales, state.blocksize, state.quant_type, shape, dtype
    )
    return weight


def _plain_near_zero_share(x: torch.Tensor, below: float) -> torch.Tensor:
    magnitudes = x.abs().float()
    limits = torch.linalg.vector_norm(magnitudes, dim=1, keepdim=True) * (below / math.sqrt(x.shape[1]))
    return magnitudes.lt_(limits).mean(1)  # as floats, in place: a sum of bools takes four times as long on a CPU


def _plain_quantize_rows(
    x: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = x.float() if factors is None else x.float() * factors
    largest = numbers.abs().amax(1).clamp(min=LEAST_SCALED)
    return (numbers * (E4M3_LARGEST / largest)[:, None]).to(dtype), largest / E4M3_LARGEST


def _trials_of_dropout(device: torch.device) -> Iterator[tuple[Any, ...]]:
    """x (5, 1027), and dropout by hashes as a training has them, with thresholds and factors of each row."""
    random = torch.Generator().manual_seed(0)
    thresholds, factors = torch.tensor([0, 6554, 32768, 65535, 6554], dtype=torch.int32), torch.rand(5) + 0.5
    hashes = scramble(spread_numbers(5)), scramble(spread_numbers(514))
    for dtype in FLOATS:
        x = torch.randn(5, 1027, generator=random).to(device, dtype)
        rows, columns = (h.to(device) for h in hashes)
        yield x, Dropout(rows, columns, signed(0x9ABCDEF0), thresholds.to(device), factors.to(device))


def _trials_of_drop(device: torch.device) -> Iterator[tuple[Any, ...]]:
    yield from ((*given, dtype) for given in _trials_of_dropout(device) for dtype in FLOATS)


def _trials_of_adding(device: torch.device) -> Iterator[tuple[Any, ...]]:
    yield from ((given[0].flip(0).contiguous(), *given) for given in _trials_of_dropout(device))


def _trials_of_int8(device: torch.device) -> Iterator[tuple[Any, ...]]:
    integers = torch.randint(-127, 128, (3, 1027), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    yield from ((integers.to(device), torch.tensor([0.3, 1.0, 7e-3], device=device), dtype) for dtype in FLOATS)


def _trials_of_4bit(device: torch.device) -> Iterator[tuple[Any, ...]]:
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(330, 64, generator=torch.Generator().manual_seed(0)).to(device)  # 330 scales, in two blocks
    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    yield from ((packed, state, dtype) for dtype in FLOATS)


def _trials_of_shares(device: torch.device) -> Iterator[tuple[Any, ...]]:
    x = torch.randn(4, 2500, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e-4
    x[2] = 0
    yield from ((x.to(device, dtype), 0.1) for dtype in FLOATS)


def _trials_of_rows(device: torch.device) -> Iterator[tuple[Any, ...]]:
    random = torch.Generator().manual_seed(0)
    factors = (torch.rand(1040, generator=random) + 0.5).to(device)
    for dtype in FLOATS:
        x = torch.randn(4, 1040, generator=random)
        x[1] *= 1e-4
        x[2] = 0
        yield from ((x.to(device, dtype), given, E4M3) for given in (None, factors))


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel, the plain code that computes the same, and arguments to hold one against the other."""

    name: str
    launch: Callable[..., Any]
    plain: Callable[..., Any]
    trials: Callable[[torch.device], Iterator[tuple[Any, ...]]]

    def __call__(self, x: torch.Tensor, *rest: Any) -> Any:
        """What the kernel computes where it holds on the device of ``x``, else what the plain code does."""
        return (self.launch if holds(self, x.device) else self.plain)(x, *rest)


def fault_of(kernel: Kernel, device: torch.device) -> str:
    """What is wrong with ``kernel`` on ``device``, on its trials; "" where it computes what the plain code does."""
    try:
        for given in kernel.trials(device):
            found, expected = (f(given[0].clone(), *given[1:]) for f in (kernel.launch, kernel.plain))
            pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
            if not all(_agree(*pair) for pair in pairs):
                return "its results differ"
    except triton_errors() as error:
        return one_line(error)
    return ""


def triton_errors() -> tuple[type[Exception], ...]:
    """What a kernel's first run may raise: it does not compile, a compiler is missing or fails, the driver refuses."""
    from triton.errors import TritonError

    return (
        TritonError, RuntimeError, OSError, subprocess.SubprocessError, ImportError, AttributeError, TypeError,
        ValueError, LookupError, AssertionError,
    )  # fmt: skip


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tensors are equal but for one rounding: a GPU may round a product and a sum once, not twice."""
    rounding = torch.finfo(expected.dtype).eps
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    return torch.allclose(found.float(), expected.float(), rtol=rounding, atol=rounding)


@functools.cache
def holds(kernel: Kernel, device: torch.device) -> bool:
    """Whether ``kernel`` may run on ``device``: a GPU on which it computes what the plain code does.

    The first call for a device waits for it, so it must not come while a CUDA graph is captured: ``check_kernels``.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if fault := fault_of(kernel, device):
        log.warning("the kernel %s is not used on %s, which is slower: %s", kernel.name, device, fault)
    return not fault


def _of_triton(name: str) -> Callable[..., Any]:
    """The launcher ``name`` of ``triton_kernels``, which is imported when it is first called."""

    def launch(*given: Any) -> Any:
        return getattr(importlib.import_module("raylora.model.triton_kernels"), name)(*given)

    return launch


_DROP = Kernel("drop", _of_triton("drop"), _plain_drop, _trials_of_drop)
_ADD_DROPPED = Kernel("add_dropped", _of_triton("add_dropped"), _plain_add_dropped, _trials_of_adding)
_DEQUANTIZE_INT8 = Kernel("dequantize_int8", _of_triton("dequantize_int8"), _plain_dequantize_int8, _trials_of_int8)
_DEQUANTIZE_4BIT = Kernel("dequantize_4bit", _of_triton("dequantize_4bit"), _plain_dequantize_4bit, _trials_of_4bit)
_NEAR_ZERO_SHARE = Kernel("near_zero_share", _of_triton("near_zero_share"), _plain_near_zero_share, _trials_of_shares)
_QUANTIZE_ROWS = Kernel("quantize_rows", _of_triton("quantize_rows"), _plain_quantize_rows, _trials_of_rows)
KERNELS = (_DROP, _ADD_DROPPED, _DEQUANTIZE_INT8, _DEQUANTIZE_4BIT, _NEAR_ZERO_SHARE, _QUANTIZE_ROWS)


def check_kernels(device: torch.device, fp8: bool = False) -> None:
    """Hold the kernels against the plain code, on a GPU: some seconds, once in the life of a process.

    Args:
        fp8: whether fp8 is used, which not every GPU has.
    """
    for kernel in KERNELS:
        if fp8 or kernel is not _QUANTIZE_ROWS:
            holds(kernel, device)


def drop(x: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    """x (N, width) after dropout, in ``dtype``: what it keeps, times its row's factor, else 0."""
    result: torch.Tensor = _DROP(x, dropout, dtype)
    return result


def add_dropped(y: torch.Tensor, g: torch.Tensor, dropout: Dropout) -> None:
    """Add ``drop`` of g (N, width) to y (N, width, contiguous) in place. The sum is rounded to y's dtype once."""
    if not y.is_contiguous():
        raise ValueError("y is not contiguous")
    _ADD_DROPPED(y, g, dropout)


def dequantize_int8(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) that int8 ``integers`` stand for: 127 is the row's scale, float32 (out,). Rounded once."""
    weight: torch.Tensor = _DEQUANTIZE_INT8(integers.contiguous(), scales, dtype)
    return weight


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of bitsandbytes' ``Params4bit``: what its own ``dequantize_4bit`` makes, rounded once.

    Args:
        packed: uint8, two numbers a byte, the first in the high half.
        state: its ``QuantState``, with double quantization (Dettmers et al. 2023): a code of 16 numbers, a scale of one
            byte for each block of numbers, a code of 256 for the scales, and a float32 for each block of scales.
    """
    weight: torch.Tensor = _DEQUANTIZE_4BIT(packed, state, dtype)
    return weight


def near_zero_share(x: torch.Tensor, below: float) -> torch.Tensor:
    """float32 (N,): the share of the numbers of each row of x (N, width) that are smaller, in absolute value, than
    ``below`` times the row's root mean square. 0 for a row of zeros."""
    shares: torch.Tensor = _NEAR_ZERO_SHARE(x, below)
    return shares


def quantize_rows(x: torch.Tensor, factors: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """x (N, width), times ``factors`` (width,), as float8_e4m3fn (N, width), and each row's scale, float32 (N,).

    The largest absolute value of a row becomes 448, the largest of that type.
    """
    quantized: tuple[torch.Tensor, torch.Tensor] = _QUANTIZE_ROWS(x, factors, E4M3)
    return quantized
