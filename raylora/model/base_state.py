"""A fingerprint of the base's weights: unequal ones mean that something has changed the base.

Logits on a fixed input say the same of what that input goes through, and not of the embeddings of other tokens. Here
all weights count, by sums of their bits: no copy of them is kept, and it takes as long as reading them does, 20 GB a
second on one core of a CPU (sha256: 1.7).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

ROW = 4096
"""Numbers of eight bytes that are summed to one; within them their order does not count."""


def weights_hash(model: Any) -> str:
    """SHA-256 in hex over names, shapes and sums of bits of a model's weights, without those of plain LoRA.

    Weights that accelerate keeps on a disk are left out: nothing that is attached reaches them.
    """
    sums: dict[torch.device, list[torch.Tensor]] = {}
    names = []
    for name, tensor in sorted(_weights(model), key=lambda item: item[0]):
        if tensor.device.type == "meta":
            continue
        names.append((name, tuple(tensor.shape), str(tensor.dtype)))
        sums.setdefault(tensor.device, []).append(_sum_of_bits(tensor))
    found = [torch.stack(of_device).tolist() for of_device in sums.values()]  # one wait for each device
    return hashlib.sha256(repr([names, found]).encode()).hexdigest()


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, buffers of quantized layers, and the scales that bitsandbytes keeps beside its weights.

    Other buffers are none: some models compute theirs anew with the length of a text.
    """
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter
    for name, module in model.named_modules():
        own = name.replace(".base_layer", "")
        if (scales := vars(module).get("_buffers", {}).get("scales")) is not None:
            yield f"{own}.scales", scales
        weight = getattr(module, "weight", None)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            yield f"{own}.absmax", state.absmax
            if state.nested:
                yield f"{own}.nested_absmax", state.state2.absmax
        if (scales := getattr(weight, "SCB", None)) is not None:
            yield f"{own}.SCB", scales


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """An int64 of a tensor's bits, on its device: the sum of rows of ``ROW`` words, each times its own odd number."""
    flat = tensor.detach().contiguous().view(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # words of eight bytes begin at a multiple of eight
    flat = flat.view(torch.uint8)
    whole = len(flat) // (8 * ROW) * 8 * ROW
    rest = flat[whole:].to(torch.int64)
    total = (rest * torch.arange(1, len(rest) + 1, device=rest.device)).sum()
    if whole:
        rows = flat[:whole].view(torch.int64).view(-1, ROW).sum(1)
        total = total + (rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum()
    return total
