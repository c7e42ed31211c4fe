"""The numbers of an adapter: what they make of the base's weights, what they began as, how they are written to a file.

r ranks; a layer has ``in`` inputs and ``out`` outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from raylora.model.weight_only import WeightOnly

Factors = tuple[torch.Tensor, torch.Tensor]
"""A (r, in) and B (out, r)."""


@dataclass(frozen=True)
class Beginning:
    """What an adapter's training began with, as far as it tells what was changed."""

    factors: Mapping[str, Factors] = field(default_factory=dict)
    """By module, where A and B began as parts of its weight, which were taken out of that (PiSSA, OLoRA)."""
    beside: Sequence[tuple[torch.nn.Parameter, torch.Tensor]] = ()
    """Trained parameters beside A and B, such as biases and modules that are trained whole, and copies of them."""


def beginning_of(peft: Any, modules: Iterable[tuple[str, Any]], name: str, takes_parts: bool) -> Beginning:
    """What the adapter ``name`` is now.

    Args:
        modules: names and PEFT's modules of all layers with an adapter.
        takes_parts: whether its A and B are parts of the base's weights.
    """
    factors: dict[str, Factors] = {}
    for key, module in modules if takes_parts else ():
        if (found := factors_of(module, name)) is not None:
            factors[key] = found[0].detach().clone(), found[1].detach().clone()
    parts = (".lora_A.", ".lora_B.", ".lora_embedding_A.", ".lora_embedding_B.")
    trained = ((key, p) for key, p in peft.named_parameters() if p.requires_grad)
    beside = [p for key, p in trained if not any(part in key for part in parts)]
    # On the CPU: a whole output head of an 8B model is 2 GB.
    return Beginning(factors, [(p, p.detach().to("cpu", copy=True)) for p in beside])


def factors_of(module: Any, name: str) -> Factors | None:
    """A and B of a module's adapter; None where it has none by that name."""
    if name in module.lora_A:
        return module.lora_A[name].weight, module.lora_B[name].weight
    if name in module.lora_embedding_A:
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return None


def update_norm(module: Any, name: str, factors: Factors, began: Factors | None) -> float:
    """Frobenius norm of what an adapter adds to a module's weight: scaling * B A, less what was taken out of that."""
    a, b = (factor.detach().double() for factor in factors)
    # The rank's rows of each expert are side by side in A, its experts' columns of each rank in B, as in
    # ``ParamWrapper.get_delta_weight``; a layer that is no experts' is one.
    num_experts = getattr(module, "num_experts", 1)
    a, b = a.view(num_experts, -1, a.shape[1]), b.view(len(b), -1, num_experts).permute(2, 0, 1)
    if began is not None:
        a0, b0 = (factor.to(a).unsqueeze(0) for factor in began)
        a, b = torch.cat([a, a0], 1), torch.cat([b, -b0], 2)
    # ||B A||^2 is the sum of (B^T B) * (A A^T), two r x r matrices: B A itself would be as large as W.
    update = ((b.mT @ b) * (a @ a.mT)).sum().clamp(min=0).sqrt()
    return float(module.scaling[name] * update)


def base_norm(module: Any, name: str, began: Factors | None) -> float:
    """Frobenius norm of the weight that a module's adapter is added to, with what was taken out of it."""
    weight = _frozen_weight(module).float()
    if began is not None:
        taken = module.scaling[name] * began[1] @ began[0]
        weight = weight + (taken.T if module.fan_in_fan_out else taken)
    return float(torch.linalg.vector_norm(weight))


def changes_nothing(modules: Iterable[tuple[str, Any]], name: str, began: Beginning) -> bool:
    """Whether the model with an adapter is the base: in every module A or B is all zero, or as it was taken out of the
    base, and nothing beside them has changed."""
    for key, module in modules:
        if (factors := factors_of(module, name)) is None:
            continue
        if (first := began.factors.get(key)) is not None:
            if not all(torch.equal(new, old) for new, old in zip(factors, first, strict=True)):
                return False
        elif all(bool(factor.any()) for factor in factors):
            return False
    return all(torch.equal(parameter.detach().cpu(), numbers) for parameter, numbers in began.beside)


def save_difference(peft: Any, name: str, began: Beginning, folder: Path) -> None:
    """Write an adapter whose A and B were taken out of the base as one of the base itself, of twice the rank.

    With A0 and B0 at the beginning it is s (B A - B0 A0) = s [B, -B0] [A; A0], as in PEFT's
    ``subtract_mutated_init``, which leaves DoRA's magnitudes, biases and whole modules out.
    """
    from peft import get_peft_model_state_dict

    found = get_peft_model_state_dict(peft, adapter_name=name)
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in found.items()}
    for module, (a, b) in began.factors.items():
        name_a, name_b = f"{module}.lora_A.weight", f"{module}.lora_B.weight"
        state[name_a] = torch.cat([state[name_a], a.to(state[name_a])], 0)
        state[name_b] = torch.cat([state[name_b], -b.to(state[name_b])], 1)
    config = peft.peft_config[name]
    # The scaling is alpha / r, or alpha / sqrt(r): it must stay what it was.
    growth = math.sqrt(2) if config.use_rslora else 2
    values = {
        **config.to_dict(),
        "r": 2 * config.r,
        "lora_alpha": growth * config.lora_alpha,
        "rank_pattern": {key: 2 * rank for key, rank in config.rank_pattern.items()},
        "alpha_pattern": {key: growth * alpha for key, alpha in config.alpha_pattern.items()},
        "init_lora_weights": True,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    type(config)(**values).save_pretrained(str(folder))
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _frozen_weight(module: Any) -> torch.Tensor:
    """The floating-point numbers that one of PEFT's modules adapts: a linear layer's, or a parameter of experts."""
    if hasattr(module, "parameter_name"):
        parameter: torch.Tensor = module.get_param()
        return parameter
    return plain_weight(module.get_base_layer())


def plain_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight (out, in) as floating-point numbers."""
    from peft.utils.integrations import dequantize_bnb_weight

    if isinstance(layer, WeightOnly):
        return layer.float_weight(torch.float32)
    if type(layer.weight).__name__ not in {"Params4bit", "Int8Params"}:
        return layer.weight
    # Not peft's dequantize_module_weight: on a CPU it drops the scales of an 8-bit layer, which is broken afterwards.
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))
