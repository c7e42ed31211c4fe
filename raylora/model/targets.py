"""Which layers of a model get an adapter.

    auto          the seven names of Llama's layers where the model has them all, else as all-linear
    all-linear    every linear layer but the output head, as PEFT has it
    q_proj,...    layers whose name ends with one of these; of fused experts the parameter, such as experts.down_proj

What PEFT makes of them is tried on a skeleton: the model on torch's meta device, which has no numbers.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from raylora.config.method import ALL_LINEAR, AUTO, LORA_TARGETS
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model.adapter_checks import check_patterns
from raylora.model.model_files import check_source

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
    num_parameters: int = 0
    """Numbers that are trained: those of the adapter, and what is trained beside it."""
    whole: tuple[str, ...] = ()
    """Whole names of the modules that are trained whole."""
    trains_head: bool = False
    """Whether the output head is one of them."""
    remark: str = ""
    """What is odd about the other options; empty where nothing is."""

    @property
    def summary(self) -> str:
        """All of it in one line."""
        without = f"; without one: {', '.join(self.without)}" if self.without else ""
        nothing = f"; no layer is called {' or '.join(self.unmatched)}" if self.unmatched else ""
        whole = f"; trained whole: {', '.join(self.whole)}" if self.whole else ""
        return f"{len(self.modules)} layers get an adapter ({', '.join(self.target_modules)}){without}{nothing}{whole}"

    @property
    def note(self) -> str:
        """The same where something of it is easily overlooked; else empty."""
        is_odd = self.unmatched or any("expert" in name for name in self.without)
        return "; ".join(filter(None, [f"--target-modules: {self.summary}" if is_odd else "", self.remark]))


def skeleton(source: str, trust_remote_code: bool = False) -> Any | None:
    """A model on torch's meta device, made from its configuration alone; None where that cannot be done.

    Raises:
        UserError: see ``model_files.check_source``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_source(source, trust_remote_code)
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
    from peft import LoraConfig

    config = LoraConfig(lora_dropout=dropout, task_type="CAUSAL_LM", **lora_options(model, target_modules))
    return adapt_with(model, config, target_modules)


def adapt_with(model: Any, config: Any, target_modules: Sequence[str] = ()) -> Adapted:
    """``adapt`` with all options of PEFT's ``LoraConfig``.

    Args:
        target_modules: from ``resolve``; by default the names in ``config``.

    Raises:
        UserError: PEFT adapts nothing, or refuses a name, or no module has a name that ``config`` has for modules that
            are trained whole, or for other ranks.
    """
    from peft.tuners.lora import LoraLayer

    is_expression = not target_modules and isinstance(config.target_modules, str)
    target_modules = target_modules or ([] if is_expression else sorted(config.target_modules or ()))
    for option, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        _check_expressions(f"--{option}-pattern", pattern)
    with errors_are(ErrorKind.TARGET_MODULES):
        check_patterns("the options of the adapter", vars(config), [name for name, _ in model.named_modules()])
    try:
        wrapped = wrap(model, config)
    except (ValueError, RuntimeError) as error:
        raise refusal(model, target_modules, error) from error
    found = []
    for name, module in wrapped.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            own = getattr(module, "parameter_name", None)
            found.append(".".join(filter(None, [name.replace(".base_layer", ""), own])))
    _check_whole_modules(model, wrapped, config.modules_to_save or ())
    for option, pattern in (("rank", config.rank_pattern), ("alpha", config.alpha_pattern)):
        _check_pattern(f"--{option}-pattern", pattern, found)
    if is_expression:
        target_modules = list(dict.fromkeys(map(short_name, found)))
    # Names of earlier versions, such as w1, which PEFT takes for parameters of fused experts, match nothing themselves.
    is_converted = any(not _ends([f".{name}"], *target_modules) for name in found)
    whole = tuple(name for name, _ in _whole_modules(wrapped))
    every = [*linear_layers(model), *fused_experts(model)]
    trained = {*found, *(name for name in every for part in whole if f"{name}.".startswith(f"{part}."))}
    unmatched = () if is_converted else tuple(n for n in target_modules if not _ends([f".{n}" for n in trained], n))
    without = dict.fromkeys(_shown(name) for name in every if name not in trained)
    return Adapted(
        tuple(n for n in target_modules if n not in unmatched),
        unmatched,
        tuple(found),
        tuple(without),
        sum(p.numel() for p in wrapped.parameters() if p.requires_grad),
        whole,
        trains_head=_head_of(model) in whole,
        remark=_remark_on_bias(config.bias, wrapped),
    )


def _head_of(model: Any) -> str:
    """The whole name of the output head; empty where the model names none."""
    head = model.get_output_embeddings()
    return next((name for name, module in model.named_modules() if module is head), "") if head is not None else ""


def _remark_on_bias(bias: str, wrapped: Any) -> str:
    trained = (name for name, parameter in wrapped.named_parameters() if parameter.requires_grad)
    return (
        f"--bias {bias}: there is no bias to train" if bias != "none" and not any("bias" in n for n in trained) else ""
    )


def wrap(model: Any, config: Any) -> Any:
    """PEFT's wrapper around a copy of a skeleton, with an adapter that begins as the default does: other initial values
    are made from numbers, which a skeleton has none of."""
    from peft import get_peft_model

    trial = dataclasses.replace(config, init_lora_weights=True, eva_config=None)
    return get_peft_model(copy.deepcopy(model), trial, low_cpu_mem_usage=True)


def _whole_modules(wrapped: Any) -> list[tuple[str, Any]]:
    """The modules that are trained whole, by their names in the model."""
    from peft.utils import ModulesToSaveWrapper

    modules = wrapped.get_base_model().named_modules()
    return [(name, module) for name, module in modules if isinstance(module, ModulesToSaveWrapper)]


def _check_whole_modules(model: Any, wrapped: Any, names: Iterable[str]) -> None:
    found = [name for name, _ in _whole_modules(wrapped)]
    missing = [name for name in names if not any(whole.endswith(name) for whole in found)]
    if missing:
        named = [name for name, module in model.named_modules() if list(module.parameters())]
        parts = dict.fromkeys(name.rpartition(".")[2] for name in named if not name[-1:].isdigit())
        text = (
            f"--modules-to-save: no module is called {' or '.join(missing)}; there are {', '.join(filter(None, parts))}"
        )
        raise UserError(text, kind=ErrorKind.TARGET_MODULES)


def _check_expressions(option: str, pattern: Iterable[str]) -> None:
    """Check that each name is a regular expression, as which PEFT takes it."""
    for name in pattern:
        try:
            re.compile(name)
        except re.error as error:
            text = f"{option}: {name} is no name, and no regular expression: {one_line(error)}"
            raise UserError(text, kind=ErrorKind.TARGET_MODULES) from None


def _check_pattern(option: str, pattern: Iterable[str], found: Sequence[str]) -> None:
    """Check that each name is that of a layer with an adapter."""
    for name in pattern:
        matches = any(re.match(rf"(.*\.)?({name})$", layer) for layer in found)
        if not matches:
            layers = ", ".join(dict.fromkeys(map(_shown, found)))
            text = f"{option}: no layer with an adapter is called {name}; there are {layers}"
            raise UserError(text, kind=ErrorKind.TARGET_MODULES)


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
