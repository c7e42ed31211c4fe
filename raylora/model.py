"""The base model: found, quantized, loaded once a process; adapters come and go. The only importer of bitsandbytes.

The convention of every evaluation and training here: unquantized parameters keep the compute type (float32 on a CPU,
bfloat16 on a GPU). ``prepare_model_for_kbit_training`` is not used, because it would cast them up and so move the
base's own numbers.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from raylora.config import Method, ModelOptions
from raylora.records import UserError, digest
from raylora.sources import has_only_pickles, one_line, quiet_libraries, resolve_model


def device_name() -> str:
    """What this process computes with: the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU (bfloat16 is 10 to 30 times slower there), bfloat16 on a GPU, float16 on an old one."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


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
            "try --quantization 4bit or --max-memory with room on the CPU"
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


@dataclass
class LoadedModel:
    """One base model for the life of a process. Adapters are attached and dropped, never wrapped anew (peft 2270)."""

    model: Any
    """The transformers model. Whatever adapter is attached is active in it."""
    tokenizer: Any
    source: str
    quantization: str
    _peft: Any = field(default=None, repr=False)
    _weight_norms: dict[str, float] = field(default_factory=dict, repr=False)
    _allowed: dict[Callable[[Any], bool], bool] = field(default_factory=dict, repr=False)
    general_losses: Sequence[Any] | None = field(default=None, repr=False)
    """The base's losses on general knowledge (``ExampleLoss``), measured once."""
    training_tokens: int | None = field(default=None, repr=False)
    """Tokens of a training's minibatch that a GPU's memory holds, once a training has shown what a token takes."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def feature_token_budget(self) -> int:
        """Padded tokens in a batch. On a CPU small ones are faster: they stay in its caches (benchmarks/NOTES.md)."""
        return 8192 if self.device.type == "cuda" else 512

    def attach(self, method: Method, seed: int, name: str = "default") -> list[torch.nn.Parameter]:
        """A fresh adapter, active and trainable; its parameters, in a fixed order.

        Raises:
            UserError: the model has none of the target modules.
        """
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=method.lora_r,
            lora_alpha=method.lora_alpha,
            lora_dropout=method.lora_dropout,
            target_modules=list(method.target_modules),
            task_type="CAUSAL_LM",
            base_model_name_or_path=self.source,
        )
        with torch.random.fork_rng(devices=_cuda_devices()):
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise UserError(f"--target-modules: {one_line(error)}") from error
        return self._activate(name, trainable=True)

    def attach_saved(self, folder: Path, name: str = "default") -> None:
        """The adapter of a PEFT folder, active, not trainable.

        Raises:
            UserError: it is no LoRA adapter of this model.
        """
        from peft import PeftModel

        check_adapter(folder)
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
            else:
                self._peft.load_adapter(str(folder), adapter_name=name)
        except (ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{folder}: no adapter of {self.source}: {one_line(error)}") from error
        self._activate(name, trainable=False)

    @property
    def active_adapter(self) -> str:
        return str(self._peft.active_adapter)

    def activate(self, name: str) -> None:
        """Of several attached adapters, the one that the model answers with; not trainable."""
        self._activate(name, trainable=False)

    def _activate(self, name: str, trainable: bool) -> list[torch.nn.Parameter]:
        self._peft.set_adapter(name)
        marker = f".{name}."  # embeddings' names end in it
        named = sorted((key, p) for key, p in self._peft.named_parameters() if "lora_" in key and marker in f"{key}.")
        parameters = [p for _, p in named]
        for parameter in parameters:
            parameter.requires_grad_(trainable)
        self.model.eval()
        return parameters

    def save_adapter(self, folder: Path, name: str = "default") -> None:
        """PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors`` in ``folder``."""
        self._peft.save_pretrained(str(folder), selected_adapters=[name], safe_serialization=True)
        nested = folder / name
        if name != "default" and nested.is_dir():
            for file in nested.iterdir():
                file.rename(folder / file.name)
            nested.rmdir()
        (folder / "README.md").unlink(missing_ok=True)  # a model card of blanks

    def detach(self, name: str = "default") -> None:
        """Drop an adapter; the model is the bare base again. Nothing happens where there is none by that name."""
        if self._peft is not None and name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        self.model.eval()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def unwrap(self) -> None:
        """Take PEFT's wrappers off again: the modules are those of the plain base."""
        if self._peft is not None:
            self._peft.unload()
            self._peft = None

    def lora_modules(self) -> list[tuple[str, Any]]:
        """Every module that has an adapter, with its name, in the model's order."""
        from peft.tuners.lora import LoraLayer

        return [(key, module) for key, module in self._peft.named_modules() if isinstance(module, LoraLayer)]

    def allows(self, trial: Callable[[Any], bool]) -> bool:
        """What ``trial`` says of the bare base in eval mode; it is tried once in the life of the model."""
        if trial not in self._allowed:
            training = self.model.training
            self.model.eval()
            try:
                with self.base(), self.autocast():
                    self._allowed[trial] = trial(self.model)
            finally:
                self.model.train(training)
        return self._allowed[trial]

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Inside, the model answers as the base, whatever adapter is attached."""
        if self._peft is None or not self._peft.peft_config:
            yield
        else:
            with self._peft.disable_adapter():
                yield

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision on a GPU: adapters are float32 there, their products bfloat16. Nothing on a CPU."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=compute_dtype(self.device))

    def relative_weight_update(self, name: str = "default") -> float:
        """Mean over adapted modules of the Frobenius norm of (alpha / r) B A over that of the frozen weight."""
        shares = []
        for key, module in self.lora_modules():
            if (factors := _factors(module, name)) is None:
                continue
            if key not in self._weight_norms:
                weight = _plain_weight(module.get_base_layer())
                self._weight_norms[key] = float(torch.linalg.vector_norm(weight.float()))
            a, b = (factor.detach().double() for factor in factors)
            # The norm of B A from two matrices of r x r: the product itself has the weight's size.
            update = ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()
            shares.append(float(module.scaling[name] * update) / self._weight_norms[key])
        return sum(shares) / len(shares)

    def logits_hash(self) -> str:
        """Hash of the base's logits on a fixed input: unequal hashes mean that something changed the base."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        ids = (torch.arange(32, device=self.device) * 7919 % vocabulary).reshape(2, 16)
        with self.base(), torch.inference_mode():
            logits = self.model(input_ids=ids, use_cache=False).logits
        return hashlib.sha256(logits.float().cpu().numpy().tobytes()).hexdigest()


def _factors(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A (r, in) and B (out, r) of a module's adapter; None where it has none by that name."""
    if name in module.lora_A:
        return module.lora_A[name].weight, module.lora_B[name].weight
    if name in module.lora_embedding_A:
        return module.lora_embedding_A[name], module.lora_embedding_B[name]
    return None


def _plain_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight (out, in) as floating-point numbers."""
    from peft.utils.integrations import dequantize_bnb_weight

    if type(layer.weight).__name__ not in {"Params4bit", "Int8Params"}:
        return layer.weight
    # Not peft's dequantize_module_weight: on a CPU it leaves an 8-bit layer behind that has lost its scales.
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


@contextlib.contextmanager
def at_output_head(model: Any, select: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[bool]:
    """Inside, ``select`` takes the last hidden states (B, T, H) and returns those that the output head is to see.

    Yields:
        False where the model does not name its head: its logits are then those of all positions.
    """
    head = model.get_output_embeddings()
    if head is None:
        yield False
        return
    hook = head.register_forward_pre_hook(lambda _, args: (select(args[0]), *args[1:]))
    try:
        yield True
    finally:
        hook.remove()


def context_window(model: Any) -> int:
    """Tokens that ``model`` can look at; 2048 where it does not say, as in lm-evaluation-harness."""
    return _window(model.config) or 2048


def _window(config: Any) -> int | None:
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
        window = _window(AutoConfig.from_pretrained(source, trust_remote_code=options.trust_remote_code))
    except (OSError, ValueError, KeyError, AttributeError):
        return  # loading the model will say what is wrong
    if window is not None and max_length > window:
        raise UserError(f"--max-length {max_length}: {options.model} can look at {window} tokens; give no more")


def check_adapter(folder: Path) -> None:
    """Whether ``folder`` can hold an adapter in PEFT's format, as safetensors.

    Raises:
        UserError: a file is missing, or the weights are a pickle, which could run anything.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json in it; give the folder of a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors in it; adapters in pickle files are not loaded")


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


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter's weights and configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest([config, weights])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the GPU or on the CPU."""
    text = str(error).lower()
    known = ("out of memory", "can't allocate memory", "alloc_failed")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(t in text for t in known)
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU since its counter was reset, on the CPU by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
