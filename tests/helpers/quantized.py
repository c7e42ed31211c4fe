"""What holds of every quantized base whose activations stay floats."""

from __future__ import annotations

from pathlib import Path

import torch

from raylora.config.method import Method
from raylora.model.adapter_weights import plain_weight
from tests.helpers.tiny import load


def assert_is_float_model(folder: Path, quantization: str, kind: type) -> None:
    """Loss and gradients of an adapter are those of the float model whose weights are what the stored ones stand for.

    Args:
        kind: of the model's quantized layers, of which there are 14.
    """
    ours, plain = load(folder, quantization), load(folder, "none")
    layers = {name: m for name, m in ours.model.named_modules() if isinstance(m, kind)}
    assert len(layers) == 14
    for name, layer in layers.items():
        plain.model.get_submodule(name).weight.data = plain_weight(layer)
    ids, results = torch.arange(3, 35).reshape(2, 16), []
    for loaded in (ours, plain):
        parameters = loaded.attach(Method(lora_dropout=0.0), 0)
        torch.manual_seed(0)
        for parameter in parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        loss = loaded.model(input_ids=ids, labels=ids).loss
        results.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
