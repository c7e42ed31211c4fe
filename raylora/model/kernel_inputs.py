"""What Triton's kernels and the plain code beside them are both told."""

from __future__ import annotations

from typing import NamedTuple

import torch

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
LEAST_SCALED = 1e-30
"""Stands for the largest absolute value of a row of zeros."""


class Dropout(NamedTuple):
    """Which numbers of a matrix (N, width) dropout keeps, by hashes, and what it multiplies them with."""

    rows: torch.Tensor
    """A hash for each row, int32 (N,)."""
    columns: torch.Tensor
    """A hash for every two columns, int32 (width / 2 rounded up,)."""
    module_hash: int
    """As a signed int32."""
    thresholds: torch.Tensor
    """2^16 times the share of each row that is dropped, int32 (N,), below 2^16; a row with 0 keeps all."""
    factors: torch.Tensor
    """Of each row, float32 (N,)."""
