"""The shape of Llama-3-8B, and the H200 on which it was measured."""

from __future__ import annotations

from pathlib import Path

from transformers import LlamaConfig

from raylora.config.run import load_config
from raylora.planning.hardware import Hardware, Kernels
from raylora.planning.shape import Shape, shape_of


def llama_3_8b(folder: Path) -> str:
    """Its configuration, as the name of a model's folder."""
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def shape_of_8b(folder: Path) -> Shape:
    """Its shape, with adapters on the default modules."""
    found = shape_of(llama_3_8b(folder), load_config(model="x").target_modules)
    assert found is not None
    return found


def h200(kernels: Kernels) -> Hardware:
    """785 TFLOP/s as torch measured them, 4.8 TB/s by the datasheet."""
    return Hardware("cuda", 2, 141 * 10**9, 785e12, 4.8e12, kernels)
