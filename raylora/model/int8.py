"""8 bits for the weights alone: bitsandbytes stores int8 weights, and they are made floats again for each product.

LLM.int8 (Dettmers et al. 2022), which bitsandbytes computes with, makes the activations int8 too, but for columns with
outlying values, which it looks for over the whole minibatch. So what shares a minibatch with an example changes the
example's numbers: by 0.4 nats in a log-likelihood of SmolLM2, where float noise is 0.00001 (benchmarks/NOTES.md). With
int8 weights and float activations a row depends on itself alone, and is nearer to the unquantized model's.

The floats are not kept: memory is why a model is quantized. Making them takes some 5% of a product of 512 tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bitsandbytes.nn import Linear8bitLt

from raylora.model.frozen import FrozenProduct


class WeightOnlyLinear(Linear8bitLt):
    """A frozen linear layer of int8 weights, a scale for each output, that multiplies in its input's dtype.

    It is a ``Linear8bitLt``, so that PEFT and transformers treat it as one.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) times the weight (out, in), plus bias: (..., out). Only x gets a gradient."""
        product: torch.Tensor = FrozenProduct.apply(x, self)
        return product

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = self.bias.to(x.dtype) if self.bias is not None else None
        return F.linear(x, dequantize(self.weight.data, scales_of(self), x.dtype), bias)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``. No float weight was saved: it is made again."""
        return gradient @ dequantize(self.weight.data, scales_of(self), gradient.dtype)


def scales_of(layer: Linear8bitLt) -> torch.Tensor:
    """A layer's scales, float32 (out,): the largest absolute value of each row of the weight that was quantized.

    bitsandbytes keeps them at the weight until LLM.int8's first forward pass, and then in ``state``.
    """
    scales: torch.Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scales


def dequantize(integers: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) that int8 ``integers`` stand for: 127 is the row's scale. Rounded to ``dtype`` once."""
    factors = (scales / 127)[:, None]
    if integers.is_cuda:  # one kernel, in place of one that converts and one that multiplies
        return torch.mul(integers, factors, out=torch.empty_like(integers, dtype=dtype))
    return integers.to(dtype).mul_(factors)


def make_weight_only(model: torch.nn.Module) -> None:
    """Make every ``Linear8bitLt`` of ``model`` a ``WeightOnlyLinear``, in place. Stored weights stay as they are."""
    for module in model.modules():
        if type(module) is Linear8bitLt:
            module.__class__ = WeightOnlyLinear
            if "_old_forward" in vars(module):  # what accelerate's hooks call, where a model lies on several devices
                module._old_forward = WeightOnlyLinear.forward.__get__(module)
