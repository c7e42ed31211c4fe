"""An adapter's configuration and file, held against each other and against the model, before PEFT builds anything.

Both come from strangers: a pattern may take hours to match, a rank may ask for more memory than there is, tensors may
be of another kind, or no numbers.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from raylora.errors import UserError, one_line

KINDS = (
    "LORA", "ADALORA", "BOFT", "BONE", "C3A", "DELORA", "FOURIERFT", "GRALORA", "HRA", "IA3", "LN_TUNING", "LOHA",
    "LOKR", "MISS", "OFT", "OSF", "RANDLORA", "SHIRA", "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
)  # fmt: skip
"""PEFT's kinds of adapters that were found to act in a model's layers alone, and to leave the base as it was
(benchmarks/NOTES.md)."""
NO_ADAPTER_OF_IT = (
    ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError,
    SafetensorError,
)  # fmt: skip
"""What PEFT, torch and a model's code raise where an adapter does not belong to the model."""
PATTERN_SECONDS = 10
"""What matching all patterns of an adapter may take: those of a model with 30,000 modules take less than one."""
FEW = 1_000
"""Patterns that an adapter may have however few tensors it has: PEFT tries each of them on each module."""
_TEXTS = (str, list, type(None))
_TYPES: Mapping[str, tuple[type, ...]] = {
    "target_modules": _TEXTS,
    "exclude_modules": _TEXTS,
    "feedforward_modules": _TEXTS,
    "layers_pattern": _TEXTS,
    "modules_to_save": _TEXTS,
    "target_parameters": (list, type(None)),
    "layers_to_transform": (int, list, type(None)),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "layer_replication": (list, type(None)),
    "init_lora_weights": (bool, str, type(None)),
    "bias": (str,),
    "lora_alpha": (int, float),
    "r": (int,),
}
"""Of options that are looked at before PEFT reads them, what they may be."""
_SHOWN = {str: "a text", list: "a list", dict: "an object", int: "an integer", float: "a number", bool: "true or false"}
_RANKS = ("r", "init_r", "target_r", "num_vectors", "vector_length", "n_frequency", "block_size", "oft_block_size",
          "boft_block_size", "boft_block_num")  # fmt: skip
"""Options that are an axis of the adapter's tensors."""
_NEEDS_NO_TIME = re.compile(r"[^*+?{(|]*")
"""What an expression without repetition looks like: it takes as long as comparing texts."""
_MATCH = """
import json, re, sys
expressions, names = json.load(sys.stdin)
for number, (expression, whole) in enumerate(expressions):
    print(number, flush=True)
    compiled = re.compile(expression)
    for name in names:
        (compiled.fullmatch if whole else compiled.match)(name)
"""


@dataclass(frozen=True)
class Tensor:
    """What a safetensors file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as ``F32``, ``BF16``."""


def tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of an adapter's file by name.

    Raises:
        UserError: it is no whole safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: Tensor(tuple(s.get_shape()), str(s.get_dtype())) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def check_types(path: Path, config: Mapping[str, Any]) -> None:
    """Check the types of the options that are looked at before PEFT reads them.

    Raises:
        UserError: one is of another type.
    """
    for key, types in _TYPES.items():
        value = config.get(key)
        allowed = key not in config or (isinstance(value, types) and (bool in types or not isinstance(value, bool)))
        texts = _texts_of(key, value) if allowed else []
        if not allowed or not all(isinstance(text, str) for text in texts):
            wanted = " or ".join(_SHOWN[t] for t in types if t in _SHOWN)
            of_texts = " of texts" if list in types and texts else ""
            raise UserError(f"{path}: {key} must be {wanted}{of_texts}, and is {_shortened(value)}")
    # AdaLoRA's say of each rank whether it is left.
    for key in ("rank_pattern", "alpha_pattern") if config.get("peft_type") != "ADALORA" else ():
        for name, value in (config.get(key) or {}).items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise UserError(f"{path}: {key} must name a number for {_shortened(name)}, and has {_shortened(value)}")


def _texts_of(key: str, value: Any) -> Iterable[Any]:
    """What of an option must be texts."""
    return value if isinstance(value, list) and key not in {"layers_to_transform", "layer_replication"} else ()


def check_against_file(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Check that a configuration asks for no more than the adapter's file has.

    Raises:
        UserError: a rank is larger than any axis of a tensor, a layer is to be repeated more often than there are
            tensors, there are more patterns than these, or a tensor of LoRA is no floating-point one.
    """
    path, shown = folder / "adapter_config.json", f"{folder}: its adapter_model.safetensors"
    if not tensors:
        raise UserError(f"{shown} has no tensors")
    integers = [name for name, tensor in tensors.items() if ".lora_" in name and "F" not in tensor.dtype]
    if integers:
        dtype = tensors[integers[0]].dtype
        raise UserError(f"{shown}: {len(integers)} tensors are no numbers of LoRA, the first {integers[0]} ({dtype})")
    largest = max((axis for tensor in tensors.values() for axis in tensor.shape), default=0)
    ranks = {key: config.get(key) for key in _RANKS} | dict(config.get("rank_pattern") or {})
    for key, rank in ranks.items() if config.get("peft_type") != "LOKR" else ():  # whose r is a bound alone
        if isinstance(rank, int | float) and not -1 <= rank <= largest:
            raise UserError(f"{path}: {key} is {rank}, and no tensor of its file has an axis above {largest}")
    for key, patterns in config.items():
        if key.endswith("_pattern") and isinstance(patterns, list | dict) and len(patterns) > max(FEW, len(tensors)):
            raise UserError(f"{path}: {key} has {len(patterns)} entries, and its file {len(tensors)} tensors")
    spans = config.get("layer_replication") or []
    if not all(_is_span(span) for span in spans):
        raise UserError(f"{path}: layer_replication must be a list of two integers each, and is {_shortened(spans)}")
    num_layers = sum(max(0, end - start) for start, end in spans)
    if num_layers > len(tensors):
        raise UserError(f"{path}: layer_replication makes {num_layers} layers, and its file has {len(tensors)} tensors")


def _is_span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(bound) is int for bound in value)


def check_patterns(where: str, config: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that matching an adapter's patterns with the names of modules comes to an end.

    Python's ``re``, with which PEFT matches, may go back and forth for ever, and cannot be stopped in its own process.
    So patterns with repetitions are matched once in another one.

    Args:
        where: what the line begins with, such as the path of the configuration.
        config: by PEFT's names.
        names: of all modules of the model.

    Raises:
        UserError: a pattern is no regular expression, or takes more than ``PATTERN_SECONDS``.
    """
    patterns = list(_patterns_of(config))
    slow = [p for p in patterns if not _NEEDS_NO_TIME.fullmatch(p[1])]
    if not slow:
        return
    given = json.dumps([[(expression, whole) for _, _, expression, whole in slow], list(names)])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        found = subprocess.run(
            command, input=given, capture_output=True, text=True, timeout=PATTERN_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        key, pattern, *_ = slow[_last_begun(error.stdout)]
        raise UserError(
            f"{where}: {key}: the pattern {_shortened(pattern)} is not matched with {len(names)} names of modules "
            f"within {PATTERN_SECONDS} s: name the modules in a list"
        ) from None
    if found.returncode:
        key, pattern, *_ = slow[_last_begun(found.stdout)]
        cause = (found.stderr.strip().splitlines() or ["its process died"])[-1]
        raise UserError(f"{where}: {key}: {_shortened(pattern)} is no regular expression: {cause}")


def _last_begun(printed: str | bytes | None) -> int:
    """The number of the expression that the other process had begun."""
    text = printed.decode() if isinstance(printed, bytes) else printed or ""
    return int((text.split() or ["0"])[-1])


def _patterns_of(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Option, pattern, the expression that PEFT makes of it, and whether that must match a whole name."""
    for key in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(pattern := config.get(key), str):
            yield key, pattern, pattern, True
    wholes = config.get("modules_to_save") or ()
    for name in [wholes] if isinstance(wholes, str) else wholes:
        if not _NEEDS_NO_TIME.fullmatch(name):
            yield "modules_to_save", name, rf"(^|.*\.){name}($|\..*)", False
    layers = config.get("layers_pattern") or ()
    for name in [layers] if isinstance(layers, str) else layers:
        if not _NEEDS_NO_TIME.fullmatch(name):
            yield "layers_pattern", name, rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.", False
    for key, patterns in config.items():
        for name in patterns if key.endswith("_pattern") and isinstance(patterns, dict) else ():
            if not _NEEDS_NO_TIME.fullmatch(name):
                yield key, name, rf"(.*\.)?({name})$", False


def check_finite(folder: Path) -> None:
    """Check the numbers of an adapter's file.

    Raises:
        UserError: one is NaN or infinite.
    """
    from raylora.model import loaded_weights

    path = folder / "adapter_model.safetensors"
    broken = sorted(name for name, tensor in loaded_weights.tensors_of(path) if not loaded_weights.is_finite(tensor))
    if broken:
        raise UserError(
            f"{folder}: no adapter that can be used: {len(broken)} of its weights are not finite numbers, the first "
            f"{broken[0]}"
        )


def check_is_whole(peft: Any, folder: Path, name: str, source: str) -> None:
    """Check that each tensor in the file has its place in the model, and the other way round.

    PEFT only warns of those that are missing, and says nothing of the others: an adapter of a model with more layers,
    with other names, or of another kind would be applied in part or not at all.

    Args:
        peft: PEFT's wrapper around the model, with the adapter attached as ``name``.
        source: the base's name.

    Raises:
        UserError: not so.
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    renamed = getattr(peft.base_model.model, "_checkpoint_conversion_mapping", None)  # as PeftModel.from_pretrained
    weights = load_peft_weights(str(folder), device="cpu", key_mapping=renamed)
    result = set_peft_model_state_dict(peft, weights, adapter_name=name)
    # AdaLoRA's ``ranknum`` is no weight, and in no file.
    parameters = {key for key, _ in peft.named_parameters() if ".ranknum." not in key}
    # Of the base's own weights such a file has biases, or none.
    biases = {"none": "none", "all": ".bias"}.get(getattr(peft.peft_config[name], "bias", "none"), ".base_layer.bias")
    missing = [k for k in result.missing_keys if k in parameters and (f".{name}." in f"{k}." or k.endswith(biases))]
    unplaced = "has weights that the model has no place for"
    for keys, what in ((result.unexpected_keys, unplaced), (missing, "lacks weights")):
        if keys:
            raise UserError(f"{folder}: no adapter of {source}: {what} ({len(keys)}, the first {keys[0]})")


def _shortened(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
