"""Loads the base model, quantized, and its tokenizer. bitsandbytes is used here, in ``int8``, ``nf4`` and ``kernels``.

Parameters that are not quantized have the compute dtype in every evaluation and training: float32 on a CPU, bfloat16
on a GPU. PEFT's ``prepare_model_for_kbit_training`` is not used: it casts them to float32, which changes the base's
outputs.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch

from raylora.config.options import ModelOptions
from raylora.data.rendering import set_rendering
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model.adapters import LoadedModel
from raylora.model.device import compute_dtype, keep_to_share
from raylora.model.fp8 import Fp8Linear, check_fp8, make_fp8
from raylora.model.kernels import check_kernels
from raylora.model.liger import use_liger
from raylora.model.loaded_weights import check_loaded
from raylora.model.model_files import check_source
from raylora.model.sources import has_only_pickles, quiet_libraries, resolve_model

log = logging.getLogger("raylora")


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """How transformers is to quantize a model while it reads it; None: not at all."""
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
        UserError: it cannot be loaded, or is a slow one, which cannot say which characters each token stands for.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:  # on a damaged file: whatever its parser raises
        raise UserError(f"--model {source}: its tokenizer cannot be loaded: {one_line(error)}") from error
    if not tokenizer.is_fast:
        raise UserError(f"--model {source}: has no fast tokenizer (tokenizer.json)")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_for(options: ModelOptions, source: str) -> Any:
    """``load_tokenizer``, with the date and the special tokens that its text is made by (``data/rendering.py``)."""
    return set_rendering(load_tokenizer(source, options.trust_remote_code), options)


@errors_are(ErrorKind.MODEL)
def check_tokenizer(tokenizer: Any, model: Any, name: str | None) -> None:
    """Check that a model has an embedding for every token of its tokenizer.

    Args:
        model: loaded, or a skeleton.
        name: what the user calls it.

    Raises:
        UserError: it has not: a text with that token would end the run, on a GPU with its worker.
    """
    num_rows = len(model.get_input_embeddings().weight)
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= num_rows:
        raise UserError(
            f"--model {name}: its tokenizer knows token {number} ({token!r}), its embeddings have {num_rows} rows: "
            "resize them (resize_token_embeddings), or take the tokenizer that belongs to the model"
        )


@errors_are(ErrorKind.MODEL)
def load_model(options: ModelOptions, device: torch.device | None = None) -> LoadedModel:
    """The base model of ``options``, quantized, in eval mode, its parameters frozen.

    Args:
        device: None: the GPU if there is one, else the CPU. With ``options.max_memory`` the model is spread over the
            devices named there; with several ``gpus_per_worker`` evenly over as many GPUs.

    Raises:
        UserError: it cannot be found or read, lacks weights, has some that are not finite, would run code that is not
            trusted, does not fit into memory, or there are fewer GPUs.
    """
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    source = resolve_model(options.model)
    check_source(source, options.trust_remote_code)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        # cuDNN's attention makes a plan for each new sequence length, which takes tens of milliseconds. In packed rows
        # nearly every length is new.
        torch.backends.cuda.enable_cudnn_sdp(False)
    if options.quantization == "fp8":
        check_fp8(device)
    dtype = compute_dtype(device)
    tokenizer = tokenizer_for(options, source)
    given: dict[str, Any] = {"device_map": {"": device}}
    if device.type == "cuda":
        options.check_gpus(torch.cuda.device_count(), "this machine")
        keep_to_share(options.gpus_per_worker)
    if options.max_memory:
        limits = {int(k) if k.isdigit() else k: v for k, v in options.max_memory.items()}
        given = {"device_map": "auto", "max_memory": limits}
    elif device.type == "cuda" and options.gpus_per_worker > 1:
        # By their number alone: accelerate would put what does not fit them onto the CPU, a hundred times slower.
        free = {number: torch.cuda.mem_get_info(number)[0] for number in range(int(options.gpus_per_worker))}
        given = {"device_map": "balanced", "max_memory": free}
    if quantization := quantization_config(options.quantization, dtype):
        # Not None: that would replace what the configuration of stored int8 weights says, and their scales are lost.
        given["quantization_config"] = quantization
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=options.trust_remote_code,
            use_safetensors=None if options.allow_pickle else True,
            output_loading_info=True,
            **given,
        )
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(options) from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged configuration a model's code makes whatever it makes
        if not options.allow_pickle and has_only_pickles(source):
            raise UserError(
                f"--model {options.model}: its weights are pickle files, which can run code: convert them to "
                "safetensors, or give --allow-pickle if you trust who made them"
            ) from None
        raise UserError(f"--model {options.model}: cannot be loaded: {one_line(error)}") from error
    check_loaded(model, info, options.model, source)
    check_tokenizer(tokenizer, model, options.model)
    loaded = wrap_model(model, tokenizer, source, options)
    loaded.check_logits()
    return loaded


def wrap_model(model: Any, tokenizer: Any, source: str, options: ModelOptions) -> LoadedModel:
    """A model that was just read, or made on the spot, as ``load_model`` returns it.

    Args:
        model: on its device, its matrices quantized by ``quantization_config``.
        source: where it was read from.
        options: that it was read with.

    Raises:
        UserError: it is to be fp8, and cannot be, or memory does not hold that.
    """
    if getattr(model, "is_loaded_in_8bit", False) and not options.int8_activations:
        from raylora.model import int8

        int8.make_weight_only(model)
    if getattr(model, "is_loaded_in_4bit", False):
        from raylora.model import nf4

        nf4.make_weight_only(model)
    if torch.device(model.device).type == "cuda":
        use_liger(model)  # before fp8, which would round what the two ways differ in to numbers 6% apart
    if options.quantization == "fp8":
        _make_fp8(model, options)
    return _remember(LoadedModel(_settle(model), tokenizer, source, options.quantization))


def _does_not_fit(options: ModelOptions) -> UserError:
    return UserError(
        f"--model {options.model}: does not fit the GPU in {options.quantization}; "
        "try --quantization 4bit or --max-memory with room on the CPU",
        kind=ErrorKind.DOES_NOT_FIT,
    )


def _make_fp8(model: Any, options: ModelOptions) -> None:
    """Make the matrices of ``model`` fp8.

    Raises:
        UserError: it has none that can be, or memory does not hold one more.
    """
    try:
        num_layers = make_fp8(model)
    except torch.OutOfMemoryError as error:
        raise _does_not_fit(options) from error
    if not num_layers:
        raise UserError(f"--quantization fp8: {options.model} has no matrices that can be made fp8; take none or 8bit")


def _settle(model: Any) -> Any:
    """Put ``model`` into eval mode, freeze it, and keep bitsandbytes from repacking its weights.

    The kernels are tried out on its GPUs, before anything of it is captured as a CUDA graph.
    """
    model.eval().requires_grad_(False)
    for device in {parameter.device for parameter in model.parameters()}:
        check_kernels(device, fp8=any(isinstance(module, Fp8Linear) for module in model.modules()))
    for module in model.modules():
        if is_4bit_layer(module):
            # On CPUs with AVX512-BF16 bitsandbytes 0.50 repacks a 4-bit layer in place at its first forward pass in
            # eval mode, for a kernel without a backward pass. From then on adapters below that layer would get no
            # gradient, without any error, and the base's logits would change (benchmarks/NOTES.md).
            module.support_avx512bf16_for_cpu = False
    return model


def is_4bit_layer(module: Any) -> bool:
    """Whether ``module`` is bitsandbytes' own ``Linear4bit``, which says of itself whether it may be repacked."""
    return hasattr(module, "support_avx512bf16_for_cpu")


def context_window(model: Any) -> int:
    """Tokens of ``model``'s context window; 2048 where it does not say, as in lm-evaluation-harness."""
    return _context_window(model.config) or 2048


def _context_window(config: Any) -> int | None:
    """Tokens of the context window of a model with this configuration; None where it does not say."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return int(window) if window else None


def check_window(options: ModelOptions, source: str, max_length: int) -> None:
    """Check that examples of ``max_length`` tokens fit into the model's context window.

    Raises:
        UserError: they do not. Beyond the window learned position embeddings do not exist, and rotary ones were never
            trained.
    """
    from transformers import AutoConfig

    try:
        window = _context_window(AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code))
    except (OSError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError, ImportError, RuntimeError):
        return  # of a damaged configuration; loading the model will say what is wrong
    if window is not None and max_length > window:
        raise UserError(f"--max-length {max_length}: {options.model} can look at {window} tokens; give no more")


def as_loaded(model: Any, tokenizer: Any) -> LoadedModel:
    """The LoadedModel of a model that the caller has loaded, which is put into eval mode and frozen.

    It computes as it did: in 8 bits with LLM.int8, if bitsandbytes loaded it.

    The same model gets the same LoadedModel at each call, as PEFT must not wrap a model twice (peft issue 2270).
    """
    if getattr(model, "_raylora", None) is None:
        quantized = getattr(model, "is_loaded_in_4bit", False), getattr(model, "is_loaded_in_8bit", False)
        quantization = "4bit" if quantized[0] else "8bit" if quantized[1] else "none"
        note_llm_int8(model)
        _remember(LoadedModel(_settle(model), tokenizer, str(model.config.name_or_path), quantization))
    loaded: LoadedModel = model._raylora
    loaded.tokenizer = tokenizer
    return loaded


def uses_llm_int8(model: Any) -> bool:
    """Whether linear layers of ``model`` multiply int8 activations, as those of bitsandbytes do by themselves."""
    if not getattr(model, "is_loaded_in_8bit", False):
        return False  # and bitsandbytes need not be imported, which takes seconds
    from bitsandbytes.nn import Linear8bitLt

    from raylora.model.int8 import WeightOnlyLinear

    layers = (module for module in model.modules() if isinstance(module, Linear8bitLt))
    return any(not isinstance(layer, WeightOnlyLinear) for layer in layers)


def note_llm_int8(model: Any) -> None:
    """Say so in the log where a caller's model computes with LLM.int8: its numbers depend on what shares a batch."""
    if uses_llm_int8(model):
        log.warning(
            "this model computes with LLM.int8, as it was loaded: what shares a batch moves its numbers; "
            "FineTuner(model=...).prepare_model() loads one of int8 weights alone"
        )


@contextlib.contextmanager
def borrowed(model: Any, tokenizer: Any) -> Iterator[LoadedModel]:
    """Inside, the caller's model is a LoadedModel.

    Afterwards its modules, its train/eval modes, each parameter's ``requires_grad`` and what bitsandbytes may repack
    are what they were.
    """
    if (
        getattr(model, "_raylora", None) is not None
    ):  # raylora loaded it, or is borrowing it already: nothing to restore
        yield as_loaded(model, tokenizer)
        return
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    repacked = [(module, module.support_avx512bf16_for_cpu) for module in model.modules() if is_4bit_layer(module)]
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
        for module, may_repack in repacked:
            module.support_avx512bf16_for_cpu = may_repack


def _remember(loaded: LoadedModel) -> LoadedModel:
    """Store ``loaded`` as an attribute of its model, so that it lives as long as the model does."""
    loaded.model._raylora = loaded
    return loaded
