"""8-bit floats (float8_e4m3fn) for weights and activations, on GPUs that multiply them: twice bfloat16's rate.

A weight has a scale for each output, and each row of activations has one of its own (Micikevicius et al. 2022 describe
the format): a row does not depend on what shares its minibatch. The gradient of the input is a product in fp8, too,
with the same numbers: each gradient is multiplied by its output's scale before its row is made fp8. A GPU wants the
second factor of a product column by column, so that the gradient needs the weight transposed: once there is a backward
pass a weight takes two bytes, as in bfloat16, and one before that.
"""

from __future__ import annotations

from typing import Any

import torch

from raylora.errors import ErrorKind, UserError
from raylora.model.device import device_name
from raylora.model.kernel_inputs import E4M3
from raylora.model.kernels import quantize_rows
from raylora.model.weight_only import WeightOnly

MULTIPLE = 16
"""What the sizes of an fp8 product's matrices must be a multiple of; other layers stay as they are."""
CAPABILITY = (8, 9)
"""The first compute capability whose tensor cores multiply fp8: L4 and RTX 40, then H100."""


class Fp8Linear(WeightOnly, torch.nn.Linear):
    """A frozen linear layer of fp8 weights that makes its input fp8, too.

    It is a ``Linear``, so that PEFT treats it as one. The weight's bits are kept as uint8: PEFT would make an adapter
    of the weight's type if that were a float, and rounding its initial values to fp8 would change them.
    """

    scales: torch.Tensor
    """float32 (out,): the weight is its fp8 numbers times these."""
    transposed: torch.Tensor | None
    """The bits of the weight, uint8 (in, out), from the first backward pass on."""

    def float_weight(self, dtype: torch.dtype) -> torch.Tensor:
        """See ``WeightOnly``. It is for those that ask for the weight; no product needs it."""
        return (self.weight.view(E4M3).float() * self.scales[:, None]).to(dtype)

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``. The product is rounded to bfloat16, the only type that fp8 products of rows have."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        rows, scales = quantize_rows(x)
        product = _multiply(rows, scales, self.weight, self.scales[None]).to(dtype)
        return product if self.bias is None else product + self.bias.to(dtype)

    def multiply_back(self, gradient: torch.Tensor) -> torch.Tensor:
        """See ``FrozenLayer``."""
        if self.transposed is None:
            self.transposed = self.weight.t().contiguous()
        rows, scales = quantize_rows(gradient, self.scales)
        return _multiply(rows, scales, self.transposed, scales.new_ones(1, self.in_features)).to(gradient.dtype)


def _multiply(rows: torch.Tensor, scales: torch.Tensor, bits: torch.Tensor, bit_scales: torch.Tensor) -> torch.Tensor:
    """fp8 rows (N, in) times fp8 bits (out, in), each with a scale of its rows: bfloat16 (N, out)."""
    if not len(rows):
        return rows.new_empty(0, len(bits), dtype=torch.bfloat16)  # of an expert that got no token
    return torch._scaled_mm(
        rows, bits.view(E4M3).t(), scale_a=scales[:, None], scale_b=bit_scales, out_dtype=torch.bfloat16
    )


def make_fp8(model: Any) -> int:
    """Make the linear layers of ``model`` fp8 one by one, in place, each freed before the next; returns how many.

    The output head stays as it is, and so do layers whose sizes are no multiples of ``MULTIPLE``.
    """
    head, count = model.get_output_embeddings(), 0
    for module in model.modules():
        if (
            type(module) is torch.nn.Linear
            and module is not head
            and not any(n % MULTIPLE for n in module.weight.shape)
        ):
            _convert(module)
            count += 1
    return count


def _convert(layer: Any) -> None:
    numbers, scales = quantize_rows(layer.weight.detach())
    del layer.weight
    layer.__class__ = Fp8Linear
    layer.weight = torch.nn.Parameter(numbers.view(torch.uint8), requires_grad=False)
    layer.register_buffer("scales", scales, persistent=False)
    layer.register_buffer("transposed", None, persistent=False)


def check_fp8(device: torch.device) -> None:
    """Check that ``device`` multiplies fp8.

    Raises:
        UserError: it does not.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY:
        raise UserError(no_fp8(device_name() if device.type == "cuda" else "a CPU"), kind=ErrorKind.USAGE)


def no_fp8(device: str) -> str:
    """The line for a machine without fp8 products."""
    return (
        f"--quantization fp8: needs a GPU that multiplies fp8 (compute capability {'.'.join(map(str, CAPABILITY))} or "
        f"more, such as L4, RTX 40 or H100), and this is {device}: take 8bit"
    )
