"""The base model: found, quantized, loaded once a process; adapters come and go. The only importer of bitsandbytes.

The convention of every evaluation and training here: unquantized parameters keep the compute type (float32 on a CPU,
bfloat16 on a GPU). ``prepare_model_for_kbit_training`` is not used, because it would cast them up and so move the
base's own numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError

from raylora.config import ModelOptions
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model.adapters import LoadedModel
from raylora.model.device import compute_dtype
from raylora.model.sources import has_only_pickles, quiet_libraries, resolve_model


def _quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_enable_fp32_cpu_offload=True,
        )
    return None


@errors_are(ErrorKind.MODEL)
def load_tokenizer(source: str, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer, with a pad token.

    Raises:
        UserError: there is none, or it is a slow one, which cannot say what characters a token stands for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file raises what its parser raises
        raise UserError(f"--model {source}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"--model {source}: has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@errors_are(ErrorKind.MODEL)
def load_model(options: ModelOptions, device: torch.device | None = None) -> LoadedModel:
    """The base model of ``options``, quantized, in eval mode, without gradients.

    Raises:
        UserError: it cannot be found, read or held in memory.
    """
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    source = resolve_model(options.model)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # It plans anew, for tens of milliseconds, whenever a length is new: in packed rows nearly every one is.
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = compute_dtype(device)
    tokenizer = load_tokenizer(source, options.trust_remote_code)
    placement: dict[str, Any] = {"device_map": {"": device}}
    if options.max_memory:
        limits = {int(k) if k.isdigit() else k: v for k, v in options.max_memory.items()}
        placement = {"device_map": "auto", "max_memory": limits}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            quantization_config=_quantization_config(options.quantization, dtype),
            trust_remote_code=options.trust_remote_code,
            use_safetensors=None if options.allow_pickle else True,
            **placement,
        )
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"--model {options.model}: does not fit the GPU in {options.quantization}; "
            "try --quantization 4bit or --max-memory with room on the CPU",
            kind=ErrorKind.DOES_NOT_FIT,
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        if not options.allow_pickle and has_only_pickles(source):
            raise UserError(
                f"--model {options.model}: its weights are pickle files, which can run code: convert them to "
                "safetensors, or give --allow-pickle if you trust who made them"
            ) from None
        raise UserError(f"--model {options.model}: cannot be loaded: {one_line(error)}") from error
    return _remember(LoadedModel(_settle(model), tokenizer, source, options.quantization))


def _settle(model: Any) -> Any:
    """Eval mode, no gradients, and weights that no forward pass changes."""
    model.eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On some CPUs bitsandbytes repacks a 4-bit layer at its first evaluation, for a kernel that has no backward
            # pass: an adapter below it would get no gradient ever after, and the base's logits would change.
            module.support_avx512bf16_for_cpu = False
    return model


def context_window(model: Any) -> int:
    """Tokens that ``model`` can look at; 2048 where it does not say, as in lm-evaluation-harness."""
    return _context_window(model.config) or 2048


def _context_window(config: Any) -> int | None:
    """Tokens that a model of this configuration can look at; None where it does not say."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def check_window(options: ModelOptions, source: str, max_length: int) -> None:
    """Whether examples of ``max_length`` tokens fit what the model can look at.

    Raises:
        UserError: they do not: learned positions have no more, and rotary ones were never trained on more.
    """
    from transformers import AutoConfig

    try:
        window = _context_window(AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code))
    except (OSError, ValueError, KeyError, AttributeError):
        return  # loading the model will say what is wrong
    if window is not None and max_length > window:
        raise UserError(f"--max-length {max_length}: {options.model} can look at {window} tokens; give no more")


def as_loaded(model: Any, tokenizer: Any) -> LoadedModel:
    """A model that somebody else loaded; the same LoadedModel each time, as PEFT must not wrap it twice (peft 2270)."""
    if getattr(model, "_raylora", None) is None:
        quantized = getattr(model, "is_loaded_in_4bit", False), getattr(model, "is_loaded_in_8bit", False)
        quantization = "4bit" if quantized[0] else "8bit" if quantized[1] else "none"
        _remember(LoadedModel(_settle(model), tokenizer, str(model.config.name_or_path), quantization))
    loaded: LoadedModel = model._raylora
    loaded.tokenizer = tokenizer
    return loaded


@contextlib.contextmanager
def borrowed(model: Any, tokenizer: Any) -> Iterator[LoadedModel]:
    """A model that somebody else goes on with: its modules, modes and flags are afterwards what they were."""
    if getattr(model, "_raylora", None) is not None:  # it is raylora's own
        yield as_loaded(model, tokenizer)
        return
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    loaded = as_loaded(model, tokenizer)
    try:
        yield loaded
    finally:
        loaded.unwrap()
        del model._raylora
        for module, mode in modes:
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _remember(loaded: LoadedModel) -> LoadedModel:
    """On the model itself, so that it lives as long as the model does."""
    loaded.model._raylora = loaded
    return loaded
