"""A model's shape: counts of its weights and activations, by which its memory and its time are estimated.

They are counted on a model on torch's meta device, which needs its configuration but none of its weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.model.targets import fused_experts, linear_layers, resolve, skeleton
from raylora.planning.hardware import Hardware

log = logging.getLogger("raylora")
LLM_INT8 = "LLM.int8"
"""``8bit`` with int8 activations, beside ``--quantization``'s own names: it takes other passes, and other memory."""
BYTES_A_WEIGHT = {"8bit": 1.0, LLM_INT8: 1.0, "4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "fp8": 2.0}
"""Bytes of a weight in a quantized matrix. nf4: half a byte, a scale of one byte for each 64 weights, and a float32 for
each 256 scales (double quantization, Dettmers et al. 2023). fp8: a byte in each of two layouts."""


@dataclass(frozen=True)
class Shape:
    """Counts of a causal language model's weights and activations."""

    layer_weights: int
    """Weights of the matrices in its layers: those that are quantized, and that every token is multiplied with."""
    largest_matrix: int
    """Weights of the largest of these matrices."""
    other_weights: int
    """Weights of embeddings, norms, output head and fused experts."""
    adapter_rows: int
    """Inputs plus outputs of the matrices that get an adapter: an adapter of rank r has r times as many parameters."""
    adapted_inputs: int
    """Inputs of the matrices that get an adapter."""
    widths: int
    """Inputs plus outputs of all matrices in its layers."""
    num_layers: int
    hidden_size: int
    vocabulary: int
    """Outputs of the output head."""
    kept_numbers: int
    """Numbers in a token's keys and values, of all layers."""
    expert_weights: int = 0
    """Weights of fused experts, which are among ``other_weights``: they are not quantized."""
    used_expert_weights: int = 0
    """Those of them that one token is multiplied with."""
    adapted_weights: int = 0
    """Weights of the matrices that get an adapter."""
    other_trained: int = 0
    """Trained parameters beyond rank times ``adapter_rows``: of other ranks (where these are less, negative), biases,
    whole modules, DoRA's magnitudes."""
    trains_head: bool = False
    """Whether the output head is trained whole."""

    def num_trained(self, rank: int) -> int:
        """Parameters that are trained with adapters of this rank."""
        return rank * self.adapter_rows + self.other_trained


def shape_of(source: str, target_modules: Sequence[str], trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model, from its configuration alone; None where that does not say enough."""
    model = skeleton(source, trust_remote_code)
    return None if model is None else shape_of_skeleton(model, target_modules)


def shape_of_skeleton(model: Any, target_modules: Sequence[str]) -> Shape | None:
    """The shape of a model that lies on torch's meta device; None where its weights cannot be counted."""
    if getattr(model.config, "quantization_config", None):
        return None  # stored quantized: its weights take fewer bytes than the model built here would have
    try:
        return _count_weights(model, model.config.get_text_config(), resolve(model, target_modules))
    except (AttributeError, TypeError, ValueError, ArithmeticError):  # a configuration without the usual names
        log.info("no estimate: the configuration of this model does not say enough", exc_info=True)
        return None


def weight_bytes(shape: Shape, quantization: str, machine: Hardware) -> int:
    """Bytes of the base's weights. Quantization makes only the matrices in its layers smaller."""
    return int(
        shape.layer_weights * BYTES_A_WEIGHT.get(quantization, machine.dtype_bytes)
        + shape.other_weights * machine.dtype_bytes
    )


def base_bytes(shape: Shape, quantization: str, machine: Hardware) -> int:
    """Bytes of the base while it runs: its weights, and one quantized matrix at a time as floats for its product."""
    floats = 0 if quantization in {"none", "fp8"} else shape.largest_matrix * machine.dtype_bytes
    return weight_bytes(shape, quantization, machine) + floats


def _count_weights(model: Any, config: Any, target_modules: Sequence[str]) -> Shape | None:
    """The shape of a model; None where most weights are neither in linear layers nor in experts."""
    head = model.get_output_embeddings()
    matrices = {name: (1, *_size_of(m)) for name, m in linear_layers(model).items()}
    experts = {name: tuple(p.shape) for name, p in fused_experts(model).items()}
    both = matrices | experts
    adapted = [size for name, size in both.items() if f".{name}".endswith(tuple(f".{n}" for n in target_modules))]
    in_layers, in_experts = (sum(math.prod(size) for size in sizes.values()) for sizes in (matrices, experts))
    num_all = sum(p.numel() for p in model.parameters())
    # By identity, as input embeddings and output head may be one tensor, which is then counted once.
    tables = [head, *(m for m in model.modules() if isinstance(m, torch.nn.Embedding))]
    embeddings = {id(m.weight): m.weight.numel() for m in tables if m is not None}
    if in_layers + in_experts < (num_all - sum(embeddings.values())) / 2:
        return None
    # Each token goes through some of the experts.
    num_used = int(config.num_experts_per_tok) if experts else 0
    used = [*matrices.values(), *((min(num_used, num), *size) for num, *size in experts.values())]
    return Shape(
        layer_weights=in_layers,
        largest_matrix=max(math.prod(size[1:]) for size in both.values()),
        other_weights=num_all - in_layers,
        adapter_rows=sum(num * (inputs + outputs) for num, inputs, outputs in adapted),
        adapted_inputs=sum(inputs for _, inputs, _ in adapted),
        widths=sum(num * (inputs + outputs) for num, inputs, outputs in used),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        kept_numbers=2 * int(config.num_hidden_layers) * _key_width(config),
        expert_weights=in_experts,
        used_expert_weights=sum(math.prod(size) for size in used) - in_layers,
        adapted_weights=sum(math.prod(size) for size in adapted),
    )


def _size_of(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer: a ``Linear`` has weights (out, in), GPT-2's ``Conv1D`` (in, out)."""
    rows, columns = layer.weight.shape
    return (columns, rows) if isinstance(layer, torch.nn.Linear) else (rows, columns)


def _key_width(config: Any) -> int:
    """Numbers in a token's keys of one layer; 0 where the configuration knows of no heads."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    if not num_heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int((getattr(config, "num_key_value_heads", None) or num_heads) * width)
