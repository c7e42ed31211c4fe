"""Linear layers on a CPU that multiply with oneDNN, on weights reordered to its blocked layout.

PyTorch multiplies float32 matrices with MKL. An evaluation of MMLU with SmolLM2-135M makes 593 to 657 tokens a second
with MKL, 739 with oneDNN, and 776 on reordered weights, which takes half a second once (benchmarks/NOTES.md). oneDNN's
operator has no backward pass: where gradients are needed the transposed weights are reordered too, to compute them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import psutil
import torch

from raylora.model.frozen import frozen_product
from raylora.model.memory import COPIES_MEMORY_SHARE

MIN_FEATURES = 128
"""Smaller layers, such as those of adapters, gain nothing."""


@contextlib.contextmanager
def onednn_linears(model: Any, num_tokens: int, with_backward: bool = False, with_head: bool = False) -> Iterator[int]:
    """Inside, the frozen linear layers of ``model`` multiply with oneDNN on reordered copies, freed afterwards.

    Where the copies would take more than ``COPIES_MEMORY_SHARE``, oneDNN multiplies with the weights as they lie.

    Args:
        num_tokens: the usual number of tokens in a forward pass; the layout is chosen for it.
        with_backward: whether there are backward passes through these layers; without it none is possible inside.
        with_head: include the output head; of use if it computes logits of most tokens.

    Yields:
        The number of these layers; 0 on a GPU and for quantized models.
    """
    layers = _layers(model, with_head) if torch.device(model.device).type == "cpu" else []
    size = sum(layer.weight.nbytes for layer in layers) * (2 if with_backward else 1)
    fits = size <= COPIES_MEMORY_SHARE * psutil.virtual_memory().available
    try:
        for layer in layers:
            weights = [layer.weight.detach()]
            if with_backward:
                weights.append(weights[0].t().contiguous() if fits else weights[0].t())
            if fits:
                weights = [torch.ops.mkldnn._reorder_linear_weight(w, num_tokens) for w in weights]
            _replace(layer, *weights)
        yield len(layers)
    finally:
        for layer in layers:
            for name in ("forward", "multiply", "multiply_back"):
                layer.__dict__.pop(name, None)


def _layers(model: Any, with_head: bool) -> list[torch.nn.Linear]:
    """Frozen float32 linear layers whose forward pass nothing else has replaced."""
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


def _replace(layer: Any, weight: torch.Tensor, transposed: torch.Tensor | None = None) -> None:
    """Make ``layer`` multiply with ``weight``; with its ``transposed``, as a ``FrozenLayer``."""
    layer.multiply = functools.partial(_multiply, weight, layer.bias)
    layer.forward = layer.multiply
    if transposed is not None:
        layer.multiply_back = functools.partial(_multiply, transposed, None)
        layer.forward = lambda states: frozen_product(states, layer)
