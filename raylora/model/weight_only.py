"""Quantized weights that are made floats again for each product: activations stay floats.

The floats are not kept: memory is why a model is quantized. Making them takes some 5% of a product of 512 tokens on a
CPU; on an H200 6 ms for 8 billion weights, where a pass over 2,048 tokens takes 130.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from raylora.model.frozen import frozen_product


class WeightOnly:
    """What a frozen linear layer of quantized weights does, whatever they are stored as. A ``FrozenLayer``."""

    bias: Any
    """A tensor (out,), or None."""

    float_weight: Callable[[torch.dtype], torch.Tensor]
    """Of each subclass: the weight (out, in) that the stored numbers stand for, in a dtype, made anew at each call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) times the weight (out, in), plus bias: (..., out). Only x gets a gradient."""
        return frozen_product(x, self)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``. It computes in x's dtype, or in autocast's where that is on."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, self.float_weight(x.dtype), bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``. No float weight was saved: it is made again."""
        return gradient @ self.float_weight(gradient.dtype)


def replace_class(model: torch.nn.Module, old: type, new: Any) -> None:
    """Make every layer that is an ``old``, and no subclass of it, a ``new``, in place. Its weights stay as they are."""
    for module in model.modules():
        if type(module) is old:
            module.__class__ = new
            if "_old_forward" in vars(module):  # what accelerate's hooks call, where a model lies on several devices
                module._old_forward = new.forward.__get__(module)
