"""Frozen matrices: their product and their input's gradient, however the weights are stored.

A layer of quantized or reordered weights has two methods, ``multiply`` and ``multiply_back``, which know nothing of
autograd: its forward pass is ``frozen_product``, and a training puts both into one autograd function with an adapter's
products, whose gradient is then added in place (``model/adapter_products.py``).

N tokens; a matrix has ``in`` inputs and ``out`` outputs.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F


@runtime_checkable
class FrozenLayer(Protocol):
    """A linear layer that no gradient changes."""

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, in) times the weight (out, in), plus the bias: (N, out), in the dtype that the layer computes in."""

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """The gradient of x (N, in), a new tensor, from that of the product (N, out)."""


def frozen_product(x: torch.Tensor, layer: FrozenLayer) -> torch.Tensor:
    """x (..., in) times a frozen layer's weight, plus its bias: (..., out)."""
    product: torch.Tensor = FrozenProduct.apply(x, getattr(layer, "bias", None), layer)
    return product.view(*x.shape[:-1], product.shape[-1])


class FrozenProduct(torch.autograd.Function):
    """The same as (N, out). Nothing is saved but the layer itself. A bias that is trained gets its gradient.

    The view is made outside, as models add to a layer's output in place (Falcon), which autograd refuses for a view
    that a function returns.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: FrozenLayer) -> torch.Tensor:
        ctx.layer, ctx.dtype, ctx.shape = layer, x.dtype, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return layer.multiply(x.reshape(-1, x.shape[-1]))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        of_x = ctx.layer.multiply_back(gradients[0]).to(ctx.dtype).view(ctx.shape) if ctx.needs_input_grad[0] else None
        of_bias = gradients[0].sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_bias, None


class PlainLinear:
    """A ``torch.nn.Linear`` with floating-point weights as a ``FrozenLayer``."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        self._layer = layer

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self._layer.weight.dtype), self._layer.weight, self._layer.bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        # The gradient has the product's dtype, which is autocast's where that was on.
        return gradient @ self._layer.weight.to(gradient.dtype)


def frozen_layer(module: Any) -> FrozenLayer | None:
    """The products of a module; None where only its own forward pass knows them.

    That is so for quantizations that are not raylora's, for LLM.int8, and where something has replaced the module's
    forward pass, as accelerate does for a model on several devices.
    """
    if "forward" in vars(module) and "multiply_back" not in vars(module):
        return None
    if hasattr(module, "multiply_back"):
        layer: FrozenLayer = module
        return layer
    if type(module) is torch.nn.Linear and not module.weight.requires_grad:
        return PlainLinear(module)
    return None
