"""Linear layers that multiply with oneDNN, their weights laid out as its kernels want them, on a CPU.

PyTorch multiplies float32 matrices with MKL. oneDNN is faster, most of all on weights in its own blocked layout, and
putting them there takes half a second (benchmarks/NOTES.md). It has no backward pass of its own: where one is wanted,
the transposed weights are packed too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch

from raylora.model.memory import COPIES_MEMORY_SHARE

MIN_FEATURES = 128
"""Smaller layers, such as those of adapters, gain nothing."""


@contextlib.contextmanager
def onednn_linears(model: Any, num_tokens: int, with_backward: bool = False, with_head: bool = False) -> Iterator[int]:
    """Inside, ``model`` multiplies with copies of its weights, which are gone afterwards.

    Where the copies would not fit the memory the weights are used as they lie.

    Args:
        num_tokens: rows that are multiplied together most of the time: the layout is chosen for so many.
        with_backward: gradients go through these layers, to what is below them; else there are none inside.
        with_head: the output head, too, sees most tokens.

    Yields:
        The number of such layers; 0 on a GPU and for quantized models.
    """
    layers = _layers(model, with_head) if torch.device(model.device).type == "cpu" else []
    size = sum(layer.weight.nbytes for layer in layers) * (2 if with_backward else 1)
    room = size <= COPIES_MEMORY_SHARE * psutil.virtual_memory().available
    try:
        for layer in layers:
            weights = [layer.weight.detach()]
            if with_backward:
                weights.append(weights[0].t().contiguous() if room else weights[0].t())
            if room:
                weights = [torch.ops.mkldnn._reorder_linear_weight(w, num_tokens) for w in weights]
            multiply: Callable[..., torch.Tensor] = _multiply_both_ways if with_backward else _multiply
            layer.forward = functools.partial(multiply, *weights, layer.bias)  # type: ignore[method-assign]
        yield len(layers)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _layers(model: Any, with_head: bool) -> list[torch.nn.Linear]:
    """Frozen float32 layers that nothing else stands in front of."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return []
    return [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and (with_head or module is not model.get_output_embeddings())
        and module.weight.dtype == torch.float32
        and not module.weight.requires_grad
        and min(module.weight.shape) >= MIN_FEATURES
        and "forward" not in module.__dict__  # accelerate's hooks, where weights lie on several devices
    ]


def _multiply(weight: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")
    return product


def _multiply_both_ways(
    weight: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None, states: torch.Tensor
) -> torch.Tensor:
    product: torch.Tensor = _BothWays.apply(states, weight, transposed, bias)
    return product


class _BothWays(torch.autograd.Function):
    """A frozen linear layer: its states have a gradient, its weight has none."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, transposed: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.transposed = transposed
        return _multiply(weight, bias, states)

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _multiply(ctx.transposed, None, slopes[0]), None, None, None
