"""The folder of an adapter in PEFT's format: what kind it is, which tensors it has, what it was trained on."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raylora.errors import ErrorKind, UserError
from raylora.model.adapter_checks import KINDS, check_against_file, check_types, tensors_of
from raylora.model.model_files import read_settings
from raylora.model.sources import model_hash
from raylora.records import digest
from raylora.storage.atomic import read_json
from raylora.storage.damage import check_adapter_of_run

ONLY_IN_LAYERS = "only adapters that change the model's layers (LoRA, IA3, ...) can be asked or merged"
_NOT_IN_LAYERS = {
    "PROMPT_TUNING": "prompt tuning",
    "MULTITASK_PROMPT_TUNING": "prompt tuning",
    "PREFIX_TUNING": "prefix tuning",
    "P_TUNING": "p-tuning",
    "CPT": "prompt tuning (CPT)",
    "CARTRIDGE": "prefix tuning (Cartridge)",
    "POLY": "Poly, which needs to be told a task",
    "XLORA": "X-LoRA, which mixes other adapters",
}
"""Kinds of adapters whose work is done outside of the model's layers, in the forward pass of PEFT's own wrapper."""
_PLAIN_OPTIONS = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern",
    "alpha_pattern", "use_rslora", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "base_model_name_or_path",
    "revision", "inference_mode", "peft_version", "auto_mapping", "eva_config",
}  # fmt: skip
"""Options of LoRA with which an adapter adds products of A and B to its modules' outputs, and changes nothing else."""
_INDEPENDENT_OF_WEIGHTS = {"gaussian", "orthogonal", "eva"}
"""Initial values of A and B that are no parts of the module's own weight."""
_PLAIN_VALUES = {"bias": "none", "init_lora_weights": True, "megatron_core": "megatron.core", "qalora_group_size": 16}
"""What other options are in such an adapter, where they are not empty."""


def check_adapter(folder: Path) -> None:
    """Check that ``folder`` has an adapter in PEFT's format, with weights as safetensors, of a kind that can be asked.

    Raises:
        UserError: a file is missing or unreadable, the weights are in a pickle file, which could run code when it is
            loaded, the adapter does its work outside of the model's layers, its configuration asks for more than its
            file has, or it is not what the run that made it wrote.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json in it; give the folder of a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors in it; adapters in pickle files are not loaded")
    check_adapter_of_run(folder)
    config = read_adapter_config(folder)
    kind = str(config.get("peft_type"))
    unknown = "" if kind in KINDS else f"of a kind that raylora does not know ({kind[:40]})"
    outside = _NOT_IN_LAYERS.get(kind.upper(), unknown)
    if config.get("alora_invocation_tokens"):
        outside = "activated LoRA, which begins at certain tokens"
    if config.get("megatron_config"):
        outside = "of Megatron, whose modules would be imported by name"
    if outside:
        raise UserError(f"{folder}: is {outside}: {ONLY_IN_LAYERS}")
    check_against_file(folder, config, tensors_of(folder / "adapter_model.safetensors"))


def adapter_in(folder: Path) -> Path:
    """The adapter's own folder, for it or for the folder of an experiment that holds it."""
    inner = folder / "adapter"
    return inner if inner.is_dir() and not (folder / "adapter_config.json").is_file() else folder


def adapter_name(folder: Path) -> str:
    """The name of an adapter's folder; of the folder around it, an experiment's, if its own name is ``adapter``."""
    folder = folder.resolve()
    return folder.parent.name if folder.name == "adapter" else folder.name


def is_plain_lora(folder: Path) -> bool:
    """Whether an adapter is LoRA and nothing more, as raylora's own are.

    Only such adapters come and go in one wrapper of PEFT without changing the base.
    """
    return is_plain_config(read_adapter_config(folder)) and all(".lora_" in name for name in tensor_names(folder))


def is_plain_config(config: Mapping[str, Any]) -> bool:
    """Whether options of an adapter, by PEFT's names, are those of LoRA and nothing more."""
    used = {key: value for key, value in config.items() if value and key not in _PLAIN_OPTIONS}
    if used.get("init_lora_weights") in _INDEPENDENT_OF_WEIGHTS:
        del used["init_lora_weights"]
    return config.get("peft_type") == "LORA" and all(_PLAIN_VALUES.get(key) == used[key] for key in used)


def tensor_names(folder: Path) -> list[str]:
    """The names of an adapter's tensors.

    Raises:
        UserError: the file is no whole safetensors file.
    """
    return list(tensors_of(folder / "adapter_model.safetensors"))


def overwritten_by(folder: Path) -> set[str]:
    """Names of the base's own parameters whose numbers loading an adapter changes, such as biases that were trained.

    Modules that were trained whole are none: PEFT loads them beside the originals. The weights of adapted modules are,
    where A and B began as parts of them (OLoRA, PiSSA), as PEFT takes these parts out again.
    """
    config = read_adapter_config(folder)
    whole = set(config.get("modules_to_save") or ())
    names = {name.removeprefix("base_model.model.").replace(".base_layer.", ".") for name in tensor_names(folder)}
    changed = {name for name in names if not whole & set(name.split("."))}
    if isinstance(init := config.get("init_lora_weights"), str) and init not in _INDEPENDENT_OF_WEIGHTS:
        changed |= {f"{name.split('.lora_')[0]}.weight" for name in names if ".lora_" in name}
    return changed


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter's weights and configuration, which says whether two adapters are the same."""
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest([read_adapter_config(folder), weights])


def note_on_base(folder: Path, source: str) -> str:
    """A warning where an adapter seems to have been trained on another base than ``source``; empty where not."""
    trained_on = _other_base(folder, source)
    return trained_on and f"was trained on {trained_on}: its score says little if {source} is another model"


def _other_base(folder: Path, source: str) -> str:
    """The name of the base that an adapter was trained on, if that seems to be another one than ``source``; else empty.

    A name on the hub and a folder of that name are taken for the same model, and so is a folder that has moved.
    """
    trained_on = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    if trained_on in ("", source):
        return ""
    if Path(trained_on).is_dir() and Path(source).is_dir():
        return "" if model_hash(trained_on) == model_hash(source) else trained_on
    return "" if _model_name(trained_on) == _model_name(source) else trained_on


def check_base(folder: Path, source: str) -> tuple[str, ...]:
    """Check that an adapter is not known to be of another base than ``source``.

    A run keeps the base's hash beside its adapters; others name a folder, which is compared where it is still there.

    Returns:
        Warnings, where nothing more than names can be compared, and they differ.

    Raises:
        UserError: it is of another base.
    """
    named = str(read_adapter_config(folder).get("base_model_name_or_path") or "")
    trained_on = _hash_of_run(folder) if Path(named).is_absolute() else None
    other = _other_base(folder, source)
    if Path(source).is_dir():  # a hub name's hash is of its commit: nothing to compare files with
        is_other = trained_on != model_hash(source) if trained_on else bool(other) and Path(other).is_dir()
        if is_other:
            text = f"{folder}: was trained on another model than {source}: their files differ: give its own (--model)"
            raise UserError(text, kind=ErrorKind.ADAPTER)
        if trained_on:
            return ()
    return (f"was trained on {other}: the merged model says little if {source} is another model",) if other else ()


def _hash_of_run(folder: Path) -> str | None:
    """The base's hash that a run has kept beside its adapter; None where it is no run's."""
    marker = read_json(folder.parent / "train.json") if folder.name == "adapter" else None
    origin = (marker or {}).get("origin")
    return origin.get("model") if isinstance(origin, dict) else None


def _model_name(source: str) -> str:
    """The last part of a model's path or name; of a folder in the hub's cache, the model's own name."""
    if in_cache := re.search(r"models--[^/\\]*?--([^/\\]+)", source):
        return in_cache[1].lower()
    return re.split(r"[/\\]", source.rstrip("/\\"))[-1].lower().removesuffix(".gguf")


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's ``adapter_config.json``.

    Raises:
        UserError: it is no JSON object, too large, or an option is of another type than PEFT's.
    """
    path = folder / "adapter_config.json"
    config = read_settings(path)
    check_types(path, config)
    return config
