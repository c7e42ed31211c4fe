"""4 bits: bitsandbytes' weights, products in their input's dtype, and the input's gradient without autograd.

bitsandbytes' own layer computes the same numbers on a CPU. Its forward pass is an autograd function of its own, to
which an adapter's gradient can only be added afterwards, and without gradients a small input takes another kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit as dequantize_any
from bitsandbytes.nn import Linear4bit

from raylora.model.kernels import FLOATS, dequantize_4bit
from raylora.model.weight_only import WeightOnly, replace_class


class WeightOnly4bit(WeightOnly, Linear4bit):
    """A frozen linear layer of 4-bit weights. It is a ``Linear4bit``, so that PEFT and transformers treat it as one."""

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """See ``WeightOnly``."""
        return dequantize(self.weight.data, self.weight.quant_state, dtype)


def dequantize(packed: torch.Tensor, state: Any, dtype: torch.dtype) -> torch.Tensor:
    """The weight (out, in) of a ``Params4bit`` and its ``QuantState``, whatever kind of 4 bits that is."""
    if state.nested and packed.dtype == torch.uint8 and dtype in FLOATS:
        return dequantize_4bit(packed, state, dtype)
    weight: torch.Tensor = dequantize_any(packed, state)
    return weight.to(dtype)


def make_weight_only(model: torch.nn.Module) -> None:
    """Make every ``Linear4bit`` of ``model`` a ``WeightOnly4bit``, in place. Stored weights stay as they are."""
    replace_class(model, Linear4bit, WeightOnly4bit)
