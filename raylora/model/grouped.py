"""Products of tokens with the matrix of the group that each belongs to: one launch for all groups.

T tokens, those of a group side by side; ``ends`` (G,), int32, says where each group's end. All T are in some group.
Where ``ends`` is on the host and the tokens are not, products are made group by group.
"""

from __future__ import annotations

import contextlib
import functools
import itertools

import torch
import torch.nn.functional as F

from raylora.model.device import waiting_is_refused

ALIGNMENT = 16
"""Bytes that rows of the matrices of a grouped product begin at multiples of."""


def aligned(rank: int, dtype: torch.dtype) -> int:
    """The least rank from ``rank`` on that a grouped product takes."""
    step = ALIGNMENT // dtype.itemsize
    return -(-rank // step) * step


def products(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """x (T, m) times each token's weight (n, m) of ``weights`` (G, n, m): (T, n), a new tensor."""
    if len(weights) == 1:
        return x @ weights[0].t()
    if _may_group(x, weights, ends):
        return F.grouped_mm(x.contiguous(), weights.transpose(1, 2), offs=ends)
    return torch.cat([x[a:b] @ w.t() for (a, b), w in zip(_bounds(ends), weights, strict=True)])


def products_back(gradient: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The gradient of x (T, m) from that of ``products`` (T, n)."""
    if len(weights) == 1:
        return gradient @ weights[0]
    if _may_group(gradient, weights, ends):
        return F.grouped_mm(gradient.contiguous(), weights, offs=ends)
    return torch.cat([gradient[a:b] @ w for (a, b), w in zip(_bounds(ends), weights, strict=True)])


def add_outer_products(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> None:
    """Add to ``total`` (G, n, m), group by group, the sum over its tokens of left (T, n) times right (T, m).

    That is the gradient of ``weights`` where ``left`` is that of the products and ``right`` is x. Added in float32.
    """
    if len(total) == 1:
        if left.dtype == total.dtype:
            total[0].addmm_(left.t(), right)
        else:
            total[0] += left.t() @ right
    elif _may_group(left, total, ends) and _may_group(right, total, ends):
        sums = F.grouped_mm(left.contiguous().t(), right.contiguous(), offs=ends)
        # Of a group without tokens some kernels leave the memory as it was.
        total += sums.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)
    else:
        for part, (a, b) in zip(total, _bounds(ends), strict=True):
            part += left[a:b].t() @ right[a:b]


def _bounds(ends: torch.Tensor) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *ends.tolist()]))


def _may_group(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> bool:
    """Whether torch takes this as one grouped product: the widths are aligned, and it works on this device."""
    widths = (*x.shape[1:], *weights.shape[1:])
    if x.device != ends.device or any(n * x.element_size() % ALIGNMENT for n in widths):
        return False
    return may_group(x.dtype, x.device)


@functools.cache
def may_group(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether grouped products of this type are, on this device, what single ones are; tried once.

    Not on a GPU that has no kernel for them: before compute capability 9 torch reads ``ends``, for which the CPU waits,
    and multiplies group by group.
    """
    if not hasattr(F, "grouped_mm") or dtype not in {torch.float32, torch.bfloat16}:
        return False
    generator = torch.Generator().manual_seed(0)
    x, y, w = (torch.randn(*s, generator=generator).to(device, dtype) for s in ((48, 32), (48, 16), (3, 16, 32)))
    ends = torch.tensor([16, 32, 48], dtype=torch.int32, device=device)
    try:
        with waiting_is_refused() if device.type == "cuda" else contextlib.nullcontext():
            found = [
                F.grouped_mm(x, w.transpose(1, 2), offs=ends), F.grouped_mm(y, w, offs=ends),
                F.grouped_mm(y.t(), x, offs=ends),
            ]  # fmt: skip
    except RuntimeError:
        return False
    parts = [slice(a, b) for a, b in ((0, 16), (16, 32), (32, 48))]
    expected = [
        torch.cat([x[p] @ v.t() for p, v in zip(parts, w, strict=True)]),
        torch.cat([y[p] @ v for p, v in zip(parts, w, strict=True)]),
        torch.stack([y[p].t() @ x[p] for p in parts]),
    ]
    return all(torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2) for a, b in zip(found, expected, strict=True))
