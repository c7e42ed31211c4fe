"""8 bits for the weights alone: bitsandbytes stores int8 weights, and they are made floats again for each product.

LLM.int8 (Dettmers et al. 2022), which bitsandbytes computes with, makes the activations int8 too, but for columns with
outlying values, which it looks for over the whole minibatch. So what shares a minibatch with an example changes the
example's numbers: by 0.4 nats in a log-likelihood of SmolLM2, where float noise is 0.00001 (benchmarks/NOTES.md). With
int8 weights and float activations a row depends on itself alone, and is nearer to the unquantized model's.
"""

from __future__ import annotations

import torch
from bitsandbytes.nn import Linear8bitLt

from raylora.model.kernels import dequantize_int8
from raylora.model.weight_only import WeightOnly, replace_class


class WeightOnlyLinear(WeightOnly, Linear8bitLt):
    """A frozen linear layer of int8 weights, a scale for each output, that multiplies in its input's dtype.

    It is a ``Linear8bitLt``, so that PEFT and transformers treat it as one.
    """

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """See ``WeightOnly``."""
        return dequantize_int8(self.weight.data, scales_of(self), dtype)


def scales_of(layer: Linear8bitLt) -> torch.Tensor:
    """A layer's scales, float32 (out,): the largest absolute value of each row of the weight that was quantized.

    bitsandbytes keeps them at the weight until LLM.int8's first forward pass, and then in ``state``.
    """
    scales: torch.Tensor = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return scales


def make_weight_only(model: torch.nn.Module) -> None:
    """Make every ``Linear8bitLt`` of ``model`` a ``WeightOnlyLinear``, in place. Stored weights stay as they are."""
    replace_class(model, Linear8bitLt, WeightOnlyLinear)
