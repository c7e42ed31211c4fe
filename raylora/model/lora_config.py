"""What PEFT is told of an adapter that is to be trained, and which options of it go with each other.

An adapter is plain where it adds scaling * B A to its layers' products and changes nothing else: LoRA and rsLoRA, with
any ranks. Plain adapters come and go in one wrapper of PEFT, share passes, and have raylora's own products. All others
have the model for themselves, and what is more than plain is computed by PEFT's own forward pass.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from raylora.config.method import Method
from raylora.config.sources import patterns_by_name
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model import targets
from raylora.model.adapter_checks import NO_ADAPTER_OF_IT, check_finite, check_patterns
from raylora.model.adapter_files import check_adapter, note_on_base

OF_ADAPTER = (
    "lora_r", "lora_alpha", "target_modules", "lora_variant", "init", "bias", "modules_to_save", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
"""Hyperparameters that the adapter of ``--init-adapter`` decides."""
TAKES_PARTS = ("pissa", "olora")
"""Initial values that are taken out of the base's weights."""


def trains_alone(method: Method) -> bool:
    """Whether an adapter with these options has the model for itself, as far as they say so."""
    more = (method.bias != "none", method.modules_to_save, method.init != "default", method.lora_variant == "dora")
    return any(more)


def check_options(method: Method, quantization: str, is_moved: bool = False) -> None:
    """Check that these options go with each other, and with the way the base lies in memory.

    Args:
        quantization: as of ``LoadedModel``.
        is_moved: whether accelerate moves weights of the base to and from the CPU, as with ``--max-memory``.

    Raises:
        UserError: they do not; it says what to give instead.
    """
    if method.init in TAKES_PARTS and quantization != "none":
        raise _refusal(
            f"--init {method.init}: begins with parts of the base's own weights, which --quantization {quantization} "
            "has rounded: give --quantization none, or another --init"
        )
    if quantization == "fp8" and (method.lora_variant == "dora" or method.bias != "none"):
        option = "--lora-variant dora" if method.lora_variant == "dora" else f"--bias {method.bias}"
        raise _refusal(f"{option}: not with --quantization fp8: give none, 8bit or 4bit")
    if is_moved and (method.init in TAKES_PARTS or method.bias != "none"):
        option = f"--bias {method.bias}" if method.bias != "none" else f"--init {method.init}"
        raise _refusal(f"{option}: changes weights of the base, which --max-memory moves: give one of the two")


def lora_config(model: Any, method: Method, source: str) -> Any:
    """PEFT's ``LoraConfig`` of a training.

    Args:
        model: loaded, or a skeleton.
        source: the base's name.

    Raises:
        UserError: the adapter of ``--init-adapter`` cannot be gone on from.
    """
    from peft import LoraConfig

    if method.init_adapter:
        config = read_lora_config(Path(method.init_adapter))
        with errors_are(ErrorKind.ADAPTER):
            modules = [name for name, _ in model.named_modules()]
            check_patterns(f"--init-adapter {method.init_adapter}", vars(config), modules)
        config.lora_dropout, config.inference_mode, config.base_model_name_or_path = method.lora_dropout, False, source
        return config
    names = targets.resolve(model, method.target_modules)
    return LoraConfig(
        r=method.lora_r,
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.lora_variant == "rslora",
        use_dora=method.lora_variant == "dora",
        init_lora_weights=True if method.init == "default" else method.init,
        bias=method.bias,
        modules_to_save=list(method.modules_to_save) or None,
        rank_pattern={name: int(rank) for name, rank in patterns_by_name(method.rank_pattern).items()},
        alpha_pattern={name: _number(alpha) for name, alpha in patterns_by_name(method.alpha_pattern).items()},
        task_type="CAUSAL_LM",
        base_model_name_or_path=source,
        **targets.lora_options(model, names),
    )


def adapted_with(model: Any, method: Method, source: str, quantization: str) -> targets.Adapted:
    """What gets an adapter in a skeleton, with all options of a training; nothing of the model's numbers is needed.

    Raises:
        UserError: an option names what is not there, or does not go with the model or with how it lies in memory.
    """
    config = lora_config(model, method, source)
    names = () if method.init_adapter else targets.resolve(model, method.target_modules)
    try:
        adapted = targets.adapt_with(model, config, names)
    except NO_ADAPTER_OF_IT as error:
        if isinstance(error, UserError) or not method.init_adapter:
            raise
        raise _refusal(f"--init-adapter {method.init_adapter}: no adapter of {source}: {one_line(error)}") from error
    layers = targets.linear_layers(model)
    if quantization != "none":
        quantized = [name for whole in adapted.whole for name in layers if f"{name}.".startswith(f"{whole}.")]
        if quantized:
            raise _refusal(
                f"--modules-to-save: {quantized[0]} cannot be trained whole, as --quantization {quantization} has "
                "rounded its weight: give --quantization none, or leave it out"
            )
    if method.init != "default":
        _check_ranks(method, config, layers, adapted.modules)
    if method.init_adapter:
        _check_fits(model, config, Path(method.init_adapter))
    return adapted


def _check_ranks(method: Method, config: Any, layers: Mapping[str, Any], names: Collection[str]) -> None:
    """Check that weights, or activations, have as many parts as ranks ask for, of initial values made from these."""
    from peft.utils.other import get_pattern_key

    for name in names:
        if name not in layers:
            raise _refusal(f"--init {method.init}: {name} is no linear layer: leave it out of --target-modules")
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, name), config.r)
        most = min(layers[name].weight.shape)
        if rank > most:
            raise _refusal(f"--init {method.init}: {name} has a rank of {rank}, and its weight {most} parts: lower it")


def _check_fits(model: Any, config: Any, folder: Path) -> None:
    """Check that the tensors in an adapter's file are those that the model has places for.

    Raises:
        UserError: they are not: it is an adapter of another model.
    """
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    wanted = get_peft_model_state_dict(targets.wrap(model, config), save_embedding_layers=False)
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        names = list(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
    for name in [*wanted, *(name for name in shapes if ".lora_" in name)]:
        mine, theirs = (tuple(wanted[name].shape) if name in wanted else None), shapes.get(name)
        if mine != theirs:
            raise _refusal(
                f"--init-adapter {folder}: is of another model: of {name} it has {theirs or 'nothing'}, and this "
                f"model asks for {mine or 'nothing'}"
            )


def read_lora_config(folder: Path) -> Any:
    """The ``LoraConfig`` of an adapter that a training may go on from.

    Raises:
        UserError: it is missing or damaged, has numbers that are not finite, is no LoRA, or one whose weights say only
            what they add to another base: of initial values that were taken out of the base's weights.
    """
    from peft import LoraConfig, PeftConfig

    try:
        check_adapter(folder)
        check_finite(folder)
        try:
            with warnings.catch_warnings(action="ignore"):  # of options that a later PEFT has
                config = PeftConfig.from_pretrained(str(folder))
        except NO_ADAPTER_OF_IT as error:
            raise UserError(f"{folder}: no adapter that PEFT knows: {one_line(error)}") from error
    except UserError as error:
        raise _refusal(f"--init-adapter {error}") from None
    if not isinstance(config, LoraConfig):
        raise _refusal(f"--init-adapter {folder}: is {config.peft_type.value}, and only LoRA can be gone on from")
    if str(config.init_lora_weights).startswith((*TAKES_PARTS, "corda", "lora_ga", "loftq")):
        raise _refusal(
            f"--init-adapter {folder}: began with parts of the base's weights ({config.init_lora_weights}): save it "
            "with PEFT's path_initial_model_for_weight_conversion first"
        )
    config.init_lora_weights, config.eva_config = True, None
    config.rank_pattern, config.alpha_pattern = config.rank_pattern or {}, config.alpha_pattern or {}
    return config


def settings_of(folder: Path) -> dict[str, Any]:
    """The hyperparameters that an adapter decides, by the names of ``OF_ADAPTER``.

    Raises:
        UserError: as in ``read_lora_config``.
    """
    config = read_lora_config(folder)
    names = [config.target_modules] if isinstance(config.target_modules, str) else sorted(config.target_modules or ())
    return {
        "lora_r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": tuple(names),
        "lora_variant": "dora" if config.use_dora else "rslora" if config.use_rslora else "lora",
        "init": "default",
        "bias": config.bias,
        "modules_to_save": tuple(config.modules_to_save or ()),
        "rank_pattern": tuple(f"{name}={rank}" for name, rank in config.rank_pattern.items()),
        "alpha_pattern": tuple(f"{name}={_number(alpha)}" for name, alpha in config.alpha_pattern.items()),
    }


def going_on(method: Method, given: Collection[str], source: str) -> Method:
    """A training's hyperparameters with those that the adapter of ``--init-adapter`` decides.

    Args:
        given: the names of the options that the user has set.
        source: the base's name.

    Raises:
        UserError: one of these disagrees with the adapter, or that cannot be gone on from: it is missing, no LoRA, or
            was trained on another base.
    """
    assert method.init_adapter
    folder = Path(method.init_adapter).absolute()
    own = settings_of(folder)
    for name in OF_ADAPTER:
        mine, theirs = getattr(method, name), own[name]
        is_same = {*mine} == {*theirs} if isinstance(mine, tuple) else mine == theirs
        if name in given and not is_same:
            shown = [",".join(map(str, v)) if isinstance(v, tuple) else v for v in (mine, theirs)]
            raise _refusal(
                f"--{name.replace('_', '-')} {shown[0]}: the adapter whose training is continued (--init-adapter "
                f"{folder}) has {shown[1] or 'none'}: leave the option out"
            )
    if note := note_on_base(folder, source):
        raise _refusal(
            f"--init-adapter {folder}: {note.partition(':')[0]}, and the base is {source}: give that one as --model "
            "(if it is the same under another name, correct base_model_name_or_path in adapter_config.json)"
        )
    return method.model_copy(update={**own, "init_adapter": str(folder)})


def _number(alpha: float | str) -> float | int:
    """LoRA's alpha, as an integer where it is one: PEFT writes it so."""
    value = float(alpha)
    return int(value) if math.isfinite(value) and value == int(value) else value


def _refusal(text: str) -> UserError:
    return UserError(text, kind=ErrorKind.ADAPTER)
