"""The base model of a process and its LoRA adapters, which come and go."""

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

from raylora.config import Method
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model import memory
from raylora.model.device import compute_dtype, cuda_devices
from raylora.records import digest


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
        """Padded tokens in a minibatch whose features are measured."""
        return memory.GPU_FEATURE_TOKENS if self.device.type == "cuda" else memory.CPU_TOKEN_BUDGET

    @property
    def training_token_budget(self) -> int:
        """Tokens in a training's first minibatch."""
        if self.device.type == "cuda":
            return self.training_tokens or memory.ENOUGH_TOKENS
        return memory.CPU_TOKEN_BUDGET

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
        with torch.random.fork_rng(devices=cuda_devices()):
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise UserError(f"--target-modules: {one_line(error)}", kind=ErrorKind.TARGET_MODULES) from error
        return self._activate(name, trainable=True)

    @errors_are(ErrorKind.ADAPTER)
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
            if memory.is_out_of_memory(error):
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

    @property
    def peft_model(self) -> Any:
        """PEFT's wrapper around the model, as other trainers take it; None before the first adapter is attached."""
        return self._peft

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
                weight = plain_weight(module.get_base_layer())
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


def plain_weight(layer: Any) -> torch.Tensor:
    """A linear layer's weight (out, in) as floating-point numbers."""
    from peft.utils.integrations import dequantize_bnb_weight

    if type(layer.weight).__name__ not in {"Params4bit", "Int8Params"}:
        return layer.weight
    # Not peft's dequantize_module_weight: on a CPU it leaves an 8-bit layer behind that has lost its scales.
    return dequantize_bnb_weight(layer.weight, state=getattr(layer, "state", None))


def check_adapter(folder: Path) -> None:
    """Whether ``folder`` can hold an adapter in PEFT's format, as safetensors.

    Raises:
        UserError: a file is missing, or the weights are a pickle, which could run anything.
    """
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder}: no adapter_config.json in it; give the folder of a PEFT adapter")
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder}: no adapter_model.safetensors in it; adapters in pickle files are not loaded")


def adapter_hash(folder: Path) -> str:
    """Hash of an adapter's weights and configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
    return digest([config, weights])
