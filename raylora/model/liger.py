"""liger-kernel's norms, rotations and activations in place of torch's, on a GPU where the extra ``gpu`` is installed.

In eager torch norms, rotary embeddings, SwiGLU and casts to float32 are most of what a pass takes beside its products:
scoring on an H200 went from a share of 0.41 to 0.72 of the card's rate with them, a captured pass of training over
2,048 tokens from 163 ms to 133 (benchmarks/NOTES.md).

liger puts its norms and activations into a model's modules. It also replaces classes and functions in the module of
transformers that the model's code is in, for all models, of which those on a CPU could not run any more: that is taken
back. What a layer calls from there, the rotation, is given to this model's layers alone.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

import torch

from raylora.errors import one_line
from raylora.model.kernels import triton_errors

log = logging.getLogger("raylora")
TOLERANCE = 5e-2
"""How far logits and a gradient may be from those without liger, as a share of their norm, in half precision; in
float32 a thousandth of it."""


def use_liger(model: Any) -> bool:
    """Let ``model`` compute with liger's kernels, if they compute what it does without; returns whether it does.

    A model that liger does not know stays as it is. One whose logits on a fixed input, or their gradient, come out
    different is what it was before, and a line in the log says so.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        return False
    try:
        before = _results(model)
    except triton_errors() as error:
        log.info("liger is not tried for %s: %s", type(model).__name__, one_line(error))
        return False
    undo = _patch(model)
    if undo is None:
        return False
    try:
        fault = "" if _agree(before, _results(model), model.dtype) else "its results differ"
    except triton_errors() as error:
        fault = one_line(error)
    if fault:
        undo()
        log.warning("liger's kernels are not used for %s, which is slower: %s", type(model).__name__, fault)
    return not fault


def _patch(model: Any) -> Callable[[], None] | None:
    """Put liger's kernels into ``model``, and into nothing else; returns what takes them out. None: it knows none."""
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    has_hooks = any("_old_forward" in vars(module) for module in model.modules())  # accelerate's, of several devices
    if has_hooks or model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return None
    code = vars(sys.modules[type(model).__module__])
    own_names, own_attributes = dict(code), {module: dict(vars(module)) for module in model.modules()}

    def restore_code() -> None:
        for name in code.keys() - own_names.keys():
            del code[name]
        code.update(own_names)

    def undo() -> None:
        for module, attributes in own_attributes.items():
            vars(module).clear()
            vars(module).update(attributes)

    try:
        _apply_liger_kernel_to_instance(
            model=model, rope=True, rms_norm=True, swiglu=True, geglu=True, cross_entropy=False,
            fused_linear_cross_entropy=False,
        )  # fmt: skip
    except triton_errors() as error:
        log.info("liger does not take %s: %s", type(model).__name__, one_line(error))
        restore_code()
        undo()
        return None
    replaced = {name: value for name, value in code.items() if own_names.get(name) is not value}
    restore_code()
    functions = {name: value for name, value in replaced.items() if isinstance(value, FunctionType)}
    for module in model.modules():
        forward = type(module).forward
        called = functions.keys() & set(forward.__code__.co_names) if isinstance(forward, FunctionType) else set()
        if called and "forward" not in vars(module) and forward.__globals__ is code:
            theirs = {**code, **{name: functions[name] for name in called}}
            module.forward = MethodType(_with_globals(forward, theirs), module)
    return undo


def _with_globals(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """A copy of ``function`` that finds these names where it looks for its module's."""
    copy = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _results(model: Any) -> list[torch.Tensor]:
    """Logits of two rows of 16 tokens, and the gradient of their loss by the embeddings."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    embeddings = model.get_input_embeddings()
    ids = (torch.arange(32, device=embeddings.weight.device) * 7919 % vocabulary).reshape(2, 16)
    inputs = embeddings(ids).detach().requires_grad_()
    with torch.enable_grad():
        result = model(inputs_embeds=inputs, labels=ids, use_cache=False)
        gradient = torch.autograd.grad(result.loss, inputs)[0]
    return [result.logits.detach().float(), gradient.float()]


def _agree(before: list[torch.Tensor], after: list[torch.Tensor], dtype: torch.dtype) -> bool:
    share = TOLERANCE if dtype.itemsize == 2 else TOLERANCE / 1000
    return all(bool((new - old).norm() <= share * old.norm()) for old, new in zip(before, after, strict=True))
