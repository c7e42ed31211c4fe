"""Which layers of a model get an adapter.

    auto          the seven names of Llama's layers where the model has them all, else as all-linear
    all-linear    every linear layer but the output head, as PEFT has it
    q_proj,...    layers whose name ends with one of these; of fused experts the parameter, such as experts.down_proj

What PEFT makes of them is tried on a skeleton: the model on torch's meta device, which has no numbers.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.config import ALL_LINEAR, AUTO, LORA_TARGETS
from raylora.errors import ErrorKind, UserError, one_line

log = logging.getLogger("raylora")
_OF_PEFT = (".base_layer", ".lora_")
"""Parts of the names of modules inside of PEFT's."""


@dataclass(frozen=True)
class Adapted:
    """What gets an adapter in a model, and what does not."""

    target_modules: tuple[str, ...]
    """The names that matched."""
    unmatched: tuple[str, ...]
    """The names that matched nothing."""
    modules: tuple[str, ...]
    """Whole names of the layers, and parameters of fused experts, that get an adapter."""
    without: tuple[str, ...]
    """Last parts of the names of all linear layers, and parameters of fused experts, that get none; the output head is
    not among them."""

    @property
    def summary(self) -> str:
        """All of it in one line."""
        without = f"; without one: {', '.join(self.without)}" if self.without else ""
        nothing = f"; no layer is called {' or '.join(self.unmatched)}" if self.unmatched else ""
        return f"{len(self.modules)} layers get an adapter ({', '.join(self.target_modules)}){without}{nothing}"

    @property
    def note(self) -> str:
        """The same where something of it is easily overlooked; else empty."""
        is_odd = self.unmatched or any("expert" in name for name in self.without)
        return f"--target-modules: {self.summary}" if is_odd else ""


def skeleton(source: str, trust_remote_code: bool = False) -> Any | None:
    """A model on torch's meta device, made from its configuration alone; None where that cannot be done."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a model's own code may raise anything; if something is wrong, loading the model reports it
        log.info("this model cannot be built from its configuration alone", exc_info=True)
        return None


def linear_layers(model: Any) -> dict[str, Any]:
    """The linear layers of a model by name, as PEFT's ``all-linear`` has them: without the output head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    named = [(name, m) for name, m in model.named_modules() if not any(part in name for part in _OF_PEFT)]
    layers = {name: getattr(m, "base_layer", m) for name, m in named}
    return {name: m for name, m in layers.items() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head}


def fused_experts(model: Any) -> dict[str, torch.nn.Parameter]:
    """Matrices of experts that lie in one parameter (experts, ..., ...), by name; these are no layers."""
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "expert" in name and ".lora_" not in name
    }


def short_name(name: str) -> str:
    """The last part of a layer's name that is no number, and what follows: ``q_proj``, ``experts.0``."""
    found = re.search(r"[^.]*[^.\d][^.]*(\.\d+)*$", name)
    return found[0] if found else name


def _shown(name: str) -> str:
    """A layer's short name; of a parameter of fused experts ``experts.down_proj``."""
    return ".".join(name.split(".")[-2:]) if re.search(r"experts?\.\D\w*$", name) else short_name(name)


def resolve(model: Any, target_modules: Sequence[str]) -> tuple[str, ...]:
    """Names in place of ``auto`` and ``all-linear``; others as they are.

    Args:
        model: loaded, or a skeleton.
    """
    if not {*target_modules} & {AUTO, ALL_LINEAR}:
        return tuple(target_modules)
    names = list(dict.fromkeys(map(short_name, linear_layers(model))))
    bare = _bare(model)
    has_all = AUTO in target_modules and {*LORA_TARGETS} <= {*names}
    if has_all and (not fused_experts(model) or _takes(bare, LORA_TARGETS)):  # a trial takes 1.5 s for a 70B model
        names = [*LORA_TARGETS]
    else:
        used = _used_names(bare) if bare is not None else {*names}
        names = [name for name in names if name in used]
        if not _takes(bare, names):  # some that PEFT refuses, as Mamba's out_proj, or takes for a name of fused experts
            names = [name for name in names if _takes(bare, [name])]
    others = [name for name in target_modules if name not in {AUTO, ALL_LINEAR}]
    return tuple(dict.fromkeys([*names, *others]))


def _bare(model: Any) -> Any | None:
    """A skeleton of a model; None where its class makes none."""
    if model.device.type == "meta":
        return model
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    except Exception:  # a model's own code may raise anything, and PEFT will say what it does not take
        log.info("no skeleton of %s", type(model).__name__, exc_info=True)
        return None


def _used_names(bare: Any) -> set[str]:
    """Short names of the layers whose own forward pass a skeleton runs.

    Of Mamba's ``dt_proj`` the model reads the weight, so that an adapter on it would do nothing.
    """
    layers = linear_layers(bare)
    used: set[str] = set()

    def hook(name: str) -> Any:
        return layers[name].register_forward_pre_hook(lambda *_: used.add(short_name(name)))

    handles = [hook(name) for name in layers]
    try:
        with torch.no_grad():
            bare(input_ids=torch.zeros(1, 4, dtype=torch.long, device="meta"), use_cache=False)
    except Exception:  # what a model does may depend on numbers, as routing to experts: no layer is left out then
        log.info("not every layer of %s is known to be used", type(bare).__name__, exc_info=True)
        return {*map(short_name, layers)}
    finally:
        for handle in handles:
            handle.remove()
    return used


def _takes(bare: Any | None, names: Sequence[str]) -> bool:
    """Whether PEFT adapts these layers, and them only, with any options: fused experts take no dropout."""
    if bare is None:
        return True
    try:
        adapt(bare, names, dropout=0.1)
    except UserError:
        return False
    return True


def lora_options(model: Any, target_modules: Iterable[str]) -> dict[str, Any]:
    """PEFT's ``target_modules`` and ``target_parameters`` for names that ``resolve`` returned."""
    layers, experts = [f".{name}" for name in linear_layers(model)], [f".{name}" for name in fused_experts(model)]
    names = dict.fromkeys(target_modules)
    parameters = [n for n in names if _ends(experts, n) and not _ends(layers, n)]
    modules = [name for name in names if name not in parameters]
    return {"target_modules": modules, **({"target_parameters": parameters} if parameters else {})}


def _ends(dotted: Iterable[str], *names: str) -> bool:
    """Whether one of these whole names, which begin with a dot, ends with one of ``names``."""
    return any(other.endswith(f".{name}") for other in dotted for name in names)


def adapt(model: Any, target_modules: Sequence[str], dropout: float) -> Adapted:
    """What gets an adapter in a skeleton, as PEFT itself does it on a copy.

    Args:
        target_modules: from ``resolve``.

    Raises:
        UserError: PEFT adapts nothing, or refuses a name; it says which layers there are.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    options = lora_options(model, target_modules)
    config = LoraConfig(lora_dropout=dropout, task_type="CAUSAL_LM", **options)
    try:
        wrapped = get_peft_model(copy.deepcopy(model), config, low_cpu_mem_usage=True)
    except ValueError as error:
        raise refusal(model, target_modules, error) from error
    found = []
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            own = getattr(module, "parameter_name", None)
            found.append(".".join(filter(None, [name.replace(".base_layer", ""), own])))
    # Names of earlier versions, such as w1, which PEFT takes for parameters of fused experts, match nothing themselves.
    is_converted = any(not _ends([f".{name}"], *target_modules) for name in found)
    unmatched = () if is_converted else tuple(n for n in target_modules if not _ends([f".{name}" for name in found], n))
    without = dict.fromkeys(
        _shown(name) for name in [*linear_layers(model), *fused_experts(model)] if name not in found
    )
    return Adapted(tuple(n for n in target_modules if n not in unmatched), unmatched, tuple(found), tuple(without))


def refusal(model: Any, target_modules: Sequence[str], error: Exception) -> UserError:
    """PEFT's refusal of target modules, in one line with what would fit."""
    names = ", ".join(dict.fromkeys(map(_shown, [*linear_layers(model), *fused_experts(model)]))) or "no linear layers"
    text = one_line(error)
    if "not found in the base model" in text:
        text = f"no layer is called {' or '.join(target_modules)}"
    if "ParamWrapper" in text and "dropout" in text:
        text = "its experts are one parameter, which PEFT adapts without dropout only: give --lora-dropout 0, or leave "
        text += "them out, as auto does"
    return UserError(f"--target-modules: {text.rstrip('.')}; there are {names}", kind=ErrorKind.TARGET_MODULES)
