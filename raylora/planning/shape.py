"""A model's shape: counts of its weights and activations, by which its memory and its time are estimated.

They are counted on a model on torch's meta device, which needs its configuration but none of its weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

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
    """Weights of embeddings, norms and output head."""
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


def shape_of(source: str, target_modules: Sequence[str], trust_remote_code: bool = False) -> Shape | None:
    """The shape of a model, from its configuration alone; None where that does not say enough."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        if getattr(config, "quantization_config", None):
            return None  # stored quantized: its weights take fewer bytes than the model built here would have
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return _count_weights(model, config.get_text_config(), target_modules)
    except Exception:  # a model's own code may raise anything; if something is wrong, loading the model reports it
        log.info("no estimate: this model cannot be built from its configuration alone", exc_info=True)
        return None


def _count_weights(model: Any, config: Any, target_modules: Sequence[str]) -> Shape | None:
    """The shape of a model; None where most weights are not in ``Linear`` modules, as in fused experts.

    Such weights are neither quantized nor multiplied with every token, so that no estimate would be right.
    """
    head = model.get_output_embeddings()
    matrices = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    adapted = [m for name, m in matrices.items() if name.rpartition(".")[2] in target_modules]
    in_layers = sum(m.weight.numel() for m in matrices.values())
    num_all = sum(p.numel() for p in model.parameters())
    # By identity, as input embeddings and output head may be one tensor, which is then counted once.
    embeddings = {id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), head) if m is not None}
    if in_layers < (num_all - sum(embeddings.values())) / 2:
        return None
    return Shape(
        layer_weights=in_layers,
        largest_matrix=max(m.weight.numel() for m in matrices.values()),
        other_weights=num_all - in_layers,
        adapter_rows=sum(m.in_features + m.out_features for m in adapted),
        adapted_inputs=sum(m.in_features for m in adapted),
        widths=sum(m.in_features + m.out_features for m in matrices.values()),
        num_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocabulary=int(config.vocab_size),
        kept_numbers=2 * int(config.num_hidden_layers) * _key_width(config),
    )


def _key_width(config: Any) -> int:
    """Numbers in a token's keys of one layer; 0 where the configuration knows of no heads."""
    num_heads = getattr(config, "num_attention_heads", None) or 0
    if not num_heads:
        return 0
    width = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return int((getattr(config, "num_key_value_heads", None) or num_heads) * width)
