"""Triton kernels, and how each is launched. ``kernels`` alone imports this: triton comes with torch's CUDA build only.

A launcher takes what the plain function of the same name in ``kernels`` takes, and computes the same. Offsets are
64-bit: a minibatch of 16,384 tokens with 2^17 features has 2^31 numbers.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from raylora.model.kernel_inputs import E4M3_LARGEST, LEAST_SCALED, Dropout

BLOCK = 1024
"""Numbers, or packed bytes, that one program of a kernel handles at a time."""


@triton.jit
def _scramble(h):  # type: ignore[no-untyped-def]
    h ^= h >> 16
    h *= 0x85EBCA6B
    h ^= h >> 13
    h *= 0xC2B2AE35
    h ^= h >> 16
    return h


@triton.jit
def _kept(rows_ptr, columns_ptr, thresholds_ptr, row, pairs, num_pairs, module_hash):  # type: ignore[no-untyped-def]
    """For two numbers of each of ``pairs``: whether dropout keeps them. One hash has both, the low half first."""
    row_hash = tl.load(rows_ptr + row).to(tl.uint32, bitcast=True) + module_hash.to(tl.uint32, bitcast=True)
    columns = tl.load(columns_ptr + pairs, mask=pairs < num_pairs, other=0).to(tl.uint32, bitcast=True)
    words = _scramble(_scramble(row_hash) + columns)
    # The halves are compared as int16 on a CPU: its sign bit is turned over, and the threshold moved by 2^15.
    numbers = tl.interleave((words & 0xFFFF) ^ 0x8000, (words >> 16) ^ 0x8000).to(tl.int32)
    return numbers >= tl.load(thresholds_ptr + row)


@triton.jit(do_not_specialize=["module_hash"])
def _drop(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, rows_ptr, columns_ptr, thresholds_ptr, factors_ptr, width, module_hash, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    pairs = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    kept = _kept(rows_ptr, columns_ptr, thresholds_ptr, row, pairs, (width + 1) // 2, module_hash)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    x = tl.load(x_ptr + at, mask=inside & kept, other=0.0)
    tl.store(y_ptr + at, (x * tl.load(factors_ptr + row)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["module_hash"])
def _add_dropped(  # type: ignore[no-untyped-def]
    y_ptr, g_ptr, rows_ptr, columns_ptr, thresholds_ptr, factors_ptr, width, module_hash, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    pairs = tl.program_id(1) * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
    kept = _kept(rows_ptr, columns_ptr, thresholds_ptr, row, pairs, (width + 1) // 2, module_hash)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row.to(tl.int64) * width + column
    changed = (column < width) & kept
    y = tl.load(y_ptr + at, mask=changed, other=0.0)
    g = tl.load(g_ptr + at, mask=changed, other=0.0)
    tl.store(y_ptr + at, (y + g * tl.load(factors_ptr + row)).to(y_ptr.dtype.element_ty), mask=changed)


@triton.jit
def _dequantize_int8(integers_ptr, scales_ptr, y_ptr, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row.to(tl.int64) * width + column
    numbers = tl.load(integers_ptr + at, mask=inside, other=0).to(tl.float32)
    # A plain division is off by up to two roundings in Triton.
    factor = tl.div_rn(tl.load(scales_ptr + row), tl.full([], 127.0, tl.float32))
    tl.store(y_ptr + at, (numbers * factor).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dequantize_4bit(  # type: ignore[no-untyped-def]
    packed_ptr, code_ptr, scales_ptr, scale_code_ptr, blocks_ptr, offset_ptr, y_ptr, size,
    BLOCKSIZE: tl.constexpr, SCALES_A_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first + tl.arange(0, BLOCK)
    inside = 2 * at < size
    # As int32: a pointer's offset of 8 bits would be taken as signed.
    packed = tl.load(packed_ptr + at, mask=inside, other=0).to(tl.int32)
    scale_at = at // (BLOCKSIZE // 2)
    scale = tl.load(scale_code_ptr + tl.load(scales_ptr + scale_at, mask=inside, other=0).to(tl.int32))
    scale = scale * tl.load(blocks_ptr + scale_at // SCALES_A_BLOCK, mask=inside, other=0.0) + tl.load(offset_ptr)
    high, low = tl.load(code_ptr + (packed >> 4)) * scale, tl.load(code_ptr + (packed & 0xF)) * scale
    y_at = 2 * first + tl.arange(0, 2 * BLOCK)
    tl.store(y_ptr + y_at, tl.interleave(high, low).to(y_ptr.dtype.element_ty), mask=y_at < size)


@triton.jit
def _near_zero_share(x_ptr, shares_ptr, width, below, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * width
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        squares += x * x
    size = tl.full([], width, tl.float32)
    limit = below * tl.sqrt_rn(tl.div_rn(tl.sum(squares, 0), size))
    small = tl.zeros([BLOCK], tl.int32)
    for start in range(0, width, BLOCK):  # a row of 14,336 bfloat16, 28 kB, is still in the cache
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < width, other=float("inf")).to(tl.float32)
        small += (tl.abs(x) < limit).to(tl.int32)
    tl.store(shares_ptr + row, tl.div_rn(tl.sum(small, 0).to(tl.float32), size))


@triton.jit
def _quantize_rows(  # type: ignore[no-untyped-def]
    x_ptr, factors_ptr, y_ptr, scales_ptr, width,
    HAS_FACTORS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    x_ptr += row.to(tl.int64) * width
    y_ptr += row.to(tl.int64) * width
    largest = tl.zeros([BLOCK], tl.float32) + LEAST
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            x *= tl.load(factors_ptr + column, mask=column < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
    most = tl.max(largest, 0)
    largest_number = tl.full([], LARGEST, tl.float32)
    tl.store(scales_ptr + row, tl.div_rn(most, largest_number))
    shrink = tl.div_rn(largest_number, most)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + column, mask=column < width, other=0.0).to(tl.float32)
        if HAS_FACTORS:
            x *= tl.load(factors_ptr + column, mask=column < width, other=0.0)
        tl.store(y_ptr + column, (x * shrink).to(y_ptr.dtype.element_ty), mask=column < width)


def drop(x: torch.Tensor, dropout: Dropout, dtype: torch.dtype) -> torch.Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _for_rows(_drop, x, y, *_given(dropout), x.shape[1], dropout.module_hash)
    return y


def add_dropped(y: torch.Tensor, g: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    _for_rows(_add_dropped, y, g.contiguous(), *_given(dropout), y.shape[1], dropout.module_hash)
    return y


def _given(dropout: Dropout) -> tuple[torch.Tensor, ...]:
    return dropout.rows, dropout.columns, dropout.thresholds, dropout.factors


def dequantize_int8(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(integers, dtype=dtype)
    _for_rows(_dequantize_int8, integers, scales, y, integers.shape[1])
    return y


def dequantize_4bit(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty(tuple(state.shape), dtype=dtype, device=packed.device)
    tensors = (packed, state.code, state.absmax, state.state2.code, state.state2.absmax, state.offset, y)
    with torch.cuda.device_of(packed):
        # Without fusion: bitsandbytes rounds a scale's product before it adds the offset.
        _dequantize_4bit[triton.cdiv(y.numel(), 2 * BLOCK),](
            *tensors, y.numel(), state.blocksize, state.state2.blocksize, BLOCK, enable_fp_fusion=False
        )
    return y


def near_zero_share(x: torch.Tensor, below: float) -> torch.Tensor:
    x = x.contiguous()
    shares = x.new_empty(len(x), dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            _near_zero_share[len(x),](x, shares, x.shape[1], below, BLOCK)
    return shares


def quantize_rows(
    x: torch.Tensor, factors: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.contiguous()
    y, scales = torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(len(x), dtype=torch.float32)
    constants = (factors is not None, E4M3_LARGEST, LEAST_SCALED, BLOCK)
    if not x.numel():
        return y, scales.fill_(LEAST_SCALED / E4M3_LARGEST)
    with torch.cuda.device_of(x):
        _quantize_rows[len(x),](x, x if factors is None else factors, y, scales, x.shape[1], *constants)
    return y, scales


def _for_rows(kernel: Any, matrix: torch.Tensor, *rest: Any) -> None:
    """Launch a program for each row and each ``BLOCK`` columns of ``matrix``. Rows first: that axis may have 2^31."""
    if matrix.numel():
        with torch.cuda.device_of(matrix):
            kernel[len(matrix), triton.cdiv(matrix.shape[1], BLOCK)](matrix, *rest, BLOCK=BLOCK)
