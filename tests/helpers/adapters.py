"""Adapters of random weights, of the kinds that PEFT knows, for a tiny Qwen2, whose projections have biases."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from raylora.config.method import Method
from raylora.model.adapters import LoadedModel
from tests.helpers.tiny import tiny_config

TWO = ["q_proj", "v_proj"]


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": TWO, "task_type": "CAUSAL_LM", **options})


KINDS: dict[str, peft.PeftConfig] = {
    "plain": lora(),
    "ranks": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "DoRA": lora(use_dora=True),
    "bias of all": lora(bias="all"),
    "bias of LoRA's": lora(bias="lora_only"),
    "LoRA's own bias": lora(lora_bias=True),
    "modules to save": lora(modules_to_save=["lm_head"]),
    "norms and embeddings to save": lora(modules_to_save=["norm", "embed_tokens"]),
    "token": lora(trainable_token_indices=[5, 6, 7]),
    "embeddings": lora(target_modules=["q_proj", "embed_tokens", "lm_head"]),
    "a parameter": lora(target_parameters=["mlp.down_proj.weight"]),
    "PiSSA": lora(init_lora_weights="pissa"),
    "OLoRA": lora(init_lora_weights="olora"),
    "IA3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
    "LoHa": peft.LoHaConfig(target_modules=TWO, task_type="CAUSAL_LM"),
    "AdaLoRA": peft.AdaLoraConfig(target_modules=TWO, task_type="CAUSAL_LM", total_step=10),
    "OFT": peft.OFTConfig(target_modules=TWO, task_type="CAUSAL_LM"),
    "layer norms": peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "VeRA": peft.VeraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"),
}
"""Kinds that change a model's layers. Found alike, but too many for the default suite: benchmarks/NOTES.md."""
PROMPT_KINDS: dict[str, peft.PeftConfig] = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "activated LoRA": lora(alora_invocation_tokens=[9, 10]),
}
"""Kinds whose work is done in the forward pass of PEFT's own wrapper."""


def make_qwen2(seed: int = 0) -> Qwen2ForCausalLM:
    """A Qwen2 of random weights in float32, its output head tied to its embeddings."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(tiny_config(Qwen2Config)).eval().requires_grad_(False)


def save_kind(name: str, folder: Path) -> Path:
    """An adapter of that kind, as ``folder``."""
    torch.manual_seed(len(name))
    model = peft.get_peft_model(make_qwen2(), copy.deepcopy({**KINDS, **PROMPT_KINDS}[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    """A model's logits (2, 20, V) on a fixed input."""
    with torch.inference_mode():
        return model(input_ids=torch.arange(40).reshape(2, 20) * 7 % 500, use_cache=False).logits


def parts(model: Any) -> list[Any]:
    """What a model consists of: its modules, parameters and hooks, by identity, and its configuration."""
    modules = [(name, id(module), len(module._forward_hooks)) for name, module in model.named_modules()]
    parameters = [(name, id(p), p.data_ptr()) for name, p in model.named_parameters(remove_duplicate=False)]
    return [modules, parameters, model.config.to_dict(), hasattr(model, "peft_config")]


def attach_random(loaded: LoadedModel, seed: int, name: str, **settings: Any) -> None:
    """Attach an adapter whose weights are random, and move logits by much."""
    parameters = loaded.attach(Method(lora_dropout=0.3, **settings), seed, name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    loaded.activate(name)
