"""Tiny models of families whose layers have other names than Llama's, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as t

from raylora.model.adapters import LoadedModel
from tests.helpers.tiny import make_tokenizer

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FUSED = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")
SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "n_layer": 2,
    "n_head": 4, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16,
    "num_key_value_heads": 2, "ffn_dim": 128, "word_embed_proj_dim": 64, "n_embd": 64, "n_positions": 2048,
    "state_size": 8, "use_cache": False,
}  # fmt: skip
FAMILIES: dict[str, tuple[type[t.PretrainedConfig], tuple[str, ...], tuple[str, ...]]] = {
    "phi3": (t.Phi3Config, ("o_proj", "qkv_proj", "gate_up_proj", "down_proj"), ()),
    "opt": (t.OPTConfig, ("k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"), ()),
    "glm4": (t.Glm4Config, (*ATTENTION, "gate_up_proj", "down_proj"), ()),
    "gpt2": (t.GPT2Config, ("c_attn", "c_proj", "c_fc"), ()),
    "neox": (t.GPTNeoXConfig, FUSED, ()),
    "bloom": (t.BloomConfig, FUSED, ()),
    "falcon": (t.FalconConfig, FUSED, ()),
    "mamba": (t.MambaConfig, ("in_proj", "x_proj"), ("dt_proj", "out_proj")),
    "phi": (t.PhiConfig, ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"), ()),
    "mixtral": (t.MixtralConfig, ATTENTION, EXPERTS),
    "qwen3moe": (t.Qwen3MoeConfig, ATTENTION, EXPERTS),
    "gptoss": (t.GptOssConfig, ATTENTION, EXPERTS),
}
"""By family: its configuration, the names that ``auto`` means there, and those of what then gets no adapter."""


def family_config(name: str) -> t.PretrainedConfig:
    kind = FAMILIES[name][0]
    known = {*kind().to_dict(), *kind.attribute_map}
    sizes = {key: size for key, size in SIZES.items() if key in known and kind.attribute_map.get(key) not in SIZES}
    return kind(vocab_size=len(make_tokenizer()), **sizes)


def make_family(name: str) -> t.PreTrainedModel:
    torch.manual_seed(0)
    return t.AutoModelForCausalLM.from_config(family_config(name)).eval().requires_grad_(False)


def load_family(name: str) -> LoadedModel:
    return LoadedModel(make_family(name), make_tokenizer(), name, "none")


def save_family(name: str, folder: Path) -> Path:
    """A model and its tokenizer as a model folder."""
    make_family(name).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
