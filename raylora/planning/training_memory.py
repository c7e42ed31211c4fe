"""Bytes that a training takes beside the base's weights."""

from __future__ import annotations

from raylora.config.method import Method
from raylora.model.forward import GPU_LOGITS
from raylora.model.lora_config import TAKES_PARTS
from raylora.planning.hardware import Hardware
from raylora.planning.shape import Shape

ADAPTER_BYTES = 16
"""Bytes of an adapter's parameter in training: itself, its gradient and AdamW's two moments, each in float32."""
SAVED_SHARE = 1.1
"""Numbers that a layer saves for the backward pass, over the number of its matrices' inputs and outputs. Counted with
``torch.autograd.graph.saved_tensors_hooks``: 1.04 for SmolLM2's shape, 1.08 for Llama-3-8B's."""
LOGIT_BYTES = 10
"""Bytes of a logit on a GPU while its loss is computed: 2 of itself, 4 in float32, 4 of its log probability."""
DORA_OUTPUTS = 2
"""Numbers that PEFT's DoRA keeps until the backward pass beside LoRA's, over the outputs of its layers: the product of
the base and LoRA's own. With dropout it keeps the layers' inputs too (benchmarks/NOTES.md)."""
DORA_MATRICES = 3
"""Matrices of a layer's size that PEFT's DoRA makes for the norms of its rows: the weight, B A, and their sum."""


def training_bytes(shape: Shape, method: Method, num_tokens: int, machine: Hardware, checkpointing: bool) -> int:
    """Bytes of an adapter's training beside the base's weights, with minibatches of ``num_tokens``.

    That is the adapter, its gradient and optimizer, the activations that are saved for the backward pass, and on a GPU
    a chunk of logits.
    """
    saved = num_tokens * activation_bytes(shape, method, machine, checkpointing)
    logits = LOGIT_BYTES * min(GPU_LOGITS, num_tokens * shape.vocabulary) if machine.on_gpu else 0
    if shape.trains_head:  # then the logits of all supervised tokens are saved, and no chunk of them at a time
        logits = LOGIT_BYTES * num_tokens * shape.vocabulary
    # Where parts of the weights are taken out of them, what they were is kept.
    kept = machine.dtype_bytes * shape.adapted_weights if method.init in TAKES_PARTS else 0
    if method.lora_variant == "dora":
        kept += DORA_MATRICES * machine.dtype_bytes * shape.largest_matrix
    return int(adapter_bytes(shape, method) + kept + saved + logits)


def adapter_bytes(shape: Shape, method: Method) -> int:
    """Bytes of an adapter in training, with its gradient and optimizer."""
    return ADAPTER_BYTES * shape.num_trained(method.lora_r)


def activation_bytes(shape: Shape, method: Method, machine: Hardware, checkpointing: bool) -> float:
    """Bytes that a token's activations take until the backward pass."""
    with_torch = machine.kernels == "torch"
    # Of torch's operations on a GPU norms save their input in float32: 4 bytes a number, two norms a layer.
    norms = 8 * shape.hidden_size * shape.num_layers if machine.on_gpu and with_torch else 0
    bytes_a_token = SAVED_SHARE * shape.widths * machine.dtype_bytes + norms
    # Dropout's mask, a byte for each input; Triton's kernel makes it again in the backward pass.
    bytes_a_token += shape.adapted_inputs if method.lora_dropout and with_torch else 0
    if method.lora_variant == "dora":
        inputs = shape.adapted_inputs if method.lora_dropout else 0
        outputs = shape.adapter_rows - shape.adapted_inputs
        bytes_a_token += (inputs + DORA_OUTPUTS * outputs) * machine.dtype_bytes
    if checkpointing:
        # Each layer's input is saved, and one layer's activations at a time are computed again.
        bytes_a_token = bytes_a_token / shape.num_layers + shape.hidden_size * shape.num_layers * machine.dtype_bytes
    return bytes_a_token
