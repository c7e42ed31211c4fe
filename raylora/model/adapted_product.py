"""One adapted matrix: the product of its base and of LoRA's A and B as one function, forward and backward.

T tokens in a pass, of K adapters and G groups; r is the largest rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from raylora.model.dropout import column_hashes, module_hash
from raylora.model.frozen import FrozenLayer
from raylora.model.grouped import add_outer_products, products, products_back
from raylora.model.kernel_inputs import Dropout
from raylora.model.kernels import add_dropped, drop, kept


@dataclass(frozen=True)
class PassRows:
    """Whose tokens a pass holds, T of them, those of an adapter side by side, and within it those of a group."""

    hashes: torch.Tensor
    """int32 (T,): of each token, for dropout."""
    thresholds: torch.Tensor
    """int32 (T,): dropout of each token's adapter, as ``threshold_of`` has it."""
    scales: torch.Tensor
    """float32 (T,): LoRA's scaling of each token's adapter, divided by the share of numbers that dropout keeps."""
    adapter_ends: torch.Tensor
    """int32 (K,): where the tokens of each adapter end."""
    group_ends: torch.Tensor
    """int32 (G,): where the tokens of each group end. Where they are on the host, products are made group by group."""
    drops: bool
    """Whether an adapter has dropout."""
    slices: tuple[tuple[int, int, int], ...] | None
    """Start, end and threshold of runs of tokens with the same dropout, where the host makes masks and keeps them; None
    where masks are made again in the backward pass."""
    ends_on_host: bool = False
    """Whether the ends stay on the host, as the device has no one product for all groups."""

    @property
    def staying(self) -> tuple[str, ...]:
        """See ``TensorRecord``."""
        return ("adapter_ends", "group_ends") if self.ends_on_host else ()

    def on(self, device: torch.device) -> PassRows:
        """The same on another device, where the layers of a model lie on several."""
        if self.hashes.device == device:
            return self
        names = ["hashes", "thresholds", "scales"]
        if self.group_ends.device == self.hashes.device:
            names += ["adapter_ends", "group_ends"]
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    def mask(self, module: int, width: int) -> torch.Tensor:
        """uint8 (T, width): 0 where dropout drops a number of a module's input, else 1."""
        assert self.slices is not None
        masks = []
        for start, stop, threshold in self.slices:
            columns = column_hashes(width, self.hashes.device)
            masks.append(kept(self.hashes[start:stop], columns, module_hash(module), threshold, width))
        return (masks[0] if len(masks) == 1 else torch.cat(masks)).view(torch.uint8)

    def dropout(self, module: int, width: int) -> Dropout:
        """Of a module's input; what it keeps is multiplied with LoRA's scaling too."""
        columns = column_hashes(width, self.hashes.device)
        return Dropout(self.hashes, columns, module_hash(module), self.thresholds, self.scales)


class AdaptedMatrix:
    """One module's A (K, r, in) and B (K, out, r) of all adapters, and their gradients (G, ...) of all groups."""

    def __init__(self, module: Any, index: int, example: str) -> None:
        self.module, self.index = module, index
        a, b = module.lora_A[example].weight, module.lora_B[example].weight
        self.num_inputs, self.num_outputs, self.device = int(a.shape[1]), int(b.shape[0]), a.device
        self.a = self.b = self.a_gradient = self.b_gradient = torch.zeros(0)
        self.has_gradient = False
        """Whether its gradient was ever computed here: replays of captured passes do not say so again."""

    def shapes(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Of A and B."""
        return (rank, self.num_inputs), (self.num_outputs, rank)


def add_adapters(out: torch.Tensor, x: torch.Tensor, matrix: AdaptedMatrix, rows: PassRows) -> torch.Tensor:
    """Add scale * B A x, each token with its adapter's A and B, to out (T, out) in place; returns A x (T, r).

    Args:
        x: (T, in), in the dtype of A and B; dropout, if any, may have scaled it.
    """
    h = products(x, matrix.a, rows.adapter_ends)
    if not _is_scaled(rows):
        h.mul_(rows.scales[:, None])
    if len(matrix.b) == 1 and out.dtype == h.dtype:
        out.addmm_(h, matrix.b[0].t())
    else:  # a base in half precision on a CPU has adapters in float32
        out += products(h, matrix.b, rows.adapter_ends)
    return h


class AdaptedProduct(torch.autograd.Function):
    """base(x) + scale * B A (mask * x), each token with its adapter's A and B: x (..., in), the result (T, out).

    Models may add to a layer's output in place, as Falcon does: autograd allows that only where it is no view.

    The base is that of ``layer``; where there is none, ``base`` is its product. The gradients of A and B are added to
    those of the token's group. Saved for the backward pass are x, which other modules save as well, A x, and the mask
    where it is not made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor | None,
        anchor: torch.Tensor,
        layer: FrozenLayer | None,
        matrix: AdaptedMatrix,
        rows: PassRows,
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if layer is not None:
            out = layer.multiply(flat)
        else:
            assert base is not None
            out, ctx.base_shape = base.reshape(-1, base.shape[-1]).clone(), base.shape
        # In one dtype: autocast would lower the precision of some of these products and not of others.
        with torch.autocast(out.device.type, enabled=False):
            dropped, mask = _drop(flat, matrix, rows, matrix.a.dtype)
            h = add_adapters(out, dropped, matrix, rows)
        ctx.save_for_backward(x, h, *([] if mask is None else [mask]))
        ctx.layer, ctx.matrix, ctx.rows = layer, matrix, rows
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, h, *masks = ctx.saved_tensors
        layer, matrix, rows = ctx.layer, ctx.matrix, ctx.rows
        flat, d_base = x.reshape(-1, x.shape[-1]), gradients[0]
        d_out = d_base.to(h.dtype)
        d_h = products_back(d_out, matrix.b, rows.adapter_ends)
        if not _is_scaled(rows):
            d_h.mul_(rows.scales[:, None])
        dropped = flat.to(h.dtype) * masks[0] if masks else _drop(flat, matrix, rows, h.dtype)[0]
        add_outer_products(matrix.a_gradient, d_h, dropped, rows.group_ends)
        add_outer_products(matrix.b_gradient, d_out, h, rows.group_ends)
        matrix.has_gradient = True
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = layer.multiply_back(d_base) if layer is not None else torch.zeros_like(flat, dtype=h.dtype)
            if not rows.drops and len(matrix.a) == 1 and d_x.dtype == h.dtype:
                d_x.addmm_(d_h, matrix.a[0])
            else:
                d_dropped = products_back(d_h, matrix.a, rows.adapter_ends)
                if _is_scaled(rows):
                    add_dropped(d_x, d_dropped, rows.dropout(matrix.index, flat.shape[1]))
                else:
                    d_x += d_dropped.mul_(masks[0]) if masks else d_dropped
            d_x = d_x.to(x.dtype).view(x.shape)
        return d_x, d_base.view(ctx.base_shape) if layer is None else None, None, None, None, None


def _is_scaled(rows: PassRows) -> bool:
    """Whether dropout scales what it keeps by LoRA's scaling too: it does where it is made again."""
    return rows.drops and rows.slices is None


def _drop(
    x: torch.Tensor, matrix: AdaptedMatrix, rows: PassRows, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x (T, in) after dropout, in ``dtype``, and the mask, uint8 (T, in), where it is kept."""
    if not rows.drops:
        return x.to(dtype), None
    if _is_scaled(rows):
        return drop(x, rows.dropout(matrix.index, x.shape[1]), dtype), None
    mask = rows.mask(matrix.index, x.shape[1])
    return x.to(dtype) * mask, mask
