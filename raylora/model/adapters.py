"""The base model of a process, loaded once, and the adapters that are attached to it and detached again."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from raylora.config.method import Method
from raylora.data.encoding import EncodedExample, pad_token_of
from raylora.errors import ErrorKind, UserError, errors_are, one_line
from raylora.model import memory, targets
from raylora.model.adapter_checks import NO_ADAPTER_OF_IT, check_finite, check_is_whole, check_patterns
from raylora.model.adapter_files import (
    ONLY_IN_LAYERS,
    check_adapter,
    is_plain_config,
    is_plain_lora,
    overwritten_by,
    read_adapter_config,
)
from raylora.model.adapter_weights import (
    Beginning,
    base_norm,
    beginning_of,
    changes_nothing,
    factors_of,
    save_difference,
    update_norm,
)
from raylora.model.base_state import weights_hash
from raylora.model.device import compute_dtype, cuda_devices
from raylora.model.eva import begin_with_directions
from raylora.model.lora_config import TAKES_PARTS, check_options, lora_config
from raylora.model.snapshot import Snapshot
from raylora.records import digest

SHARES_NO_PASS = (
    "--target-modules: adapters of fused experts cannot share a pass, nor can those with --lora-variant dora, --init, "
    "--bias or --modules-to-save"
)


@dataclass
class LoadedModel:
    """One base model for the life of a process.

    PEFT wraps it once, for the first adapter, and the wrapper is used again for all others that are plain LoRA, as
    wrapping a model twice breaks it (peft issue 2270). An adapter of another kind, or with more than LoRA's matrices,
    has the model for itself, and the wrapper goes with it: PEFT cannot mix kinds, and what such adapters change in the
    base stays when PEFT drops them.
    """

    model: Any = field(repr=False)
    """The transformers model. The attached adapter acts in it: PEFT replaces modules within this model."""
    tokenizer: Any = field(repr=False)
    source: str
    """The folder or the Hugging Face name that it was loaded from."""
    quantization: str
    """``8bit``, ``4bit``, ``fp8`` or ``none``."""
    _peft: Any = field(default=None, repr=False)
    _before: Snapshot | None = field(default=None, repr=False)
    """The model before PEFT wrapped it; None where it is not wrapped."""
    _plain: bool = field(default=True, repr=False)
    """Whether the attached adapters are LoRA and nothing more."""
    _is_base: bool = field(default=False, repr=False)
    """Whether they are switched off."""
    _began: Beginning = field(default_factory=Beginning, repr=False)
    """What the adapter that has the model for itself began with."""
    _weight_norms: dict[str, float] = field(default_factory=dict, repr=False)
    """Frobenius norms of the adapted modules' frozen weights, by module name: they never change."""
    _allowed: dict[Callable[[Any], bool], bool] = field(default_factory=dict, repr=False)
    """What each ``trial`` of ``allows`` returned."""
    general_losses: Sequence[Any] | None = field(default=None, repr=False)
    """The base's losses on texts of general knowledge (``ExampleLoss``), measured once; None before that."""
    graphs: bool = True
    """Whether a training's passes are captured as CUDA graphs, on a GPU."""
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)
    """What trainings keep for the next ones, by keys of their own; empty again once PEFT's wrapper is removed."""
    training_tokens: int | None = field(default=None, repr=False)
    """Tokens that a training's minibatch may have on this GPU; None until a training has measured it."""

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def feature_token_budget(self) -> int:
        """Tokens in a minibatch whose features are measured."""
        return memory.GPU_FEATURE_TOKENS if self.device.type == "cuda" else memory.CPU_TOKEN_BUDGET

    @property
    def training_token_budget(self) -> int:
        """Tokens in a training's first minibatch."""
        if self.device.type == "cuda":
            return self.training_tokens or memory.ENOUGH_TOKENS
        return memory.CPU_TOKEN_BUDGET

    def attach(
        self, method: Method, seed: int, name: str = "default", examples: Sequence[EncodedExample] = ()
    ) -> list[torch.nn.Parameter]:
        """Attach a fresh adapter, active and trainable, or one that goes on from that of ``--init-adapter``.

        Args:
            seed: of its initial weights; the caller's random state is left as it was.
            examples: of the dataset, in the order of the seed; initial values may be made from them.

        Returns:
            All that is trained, sorted by name: its parameters, and what it has of the base's.

        Raises:
            UserError: the model has none of the target modules, the options do not go with each other or with the
                model, or the adapter has the model for itself, and others are being trained.
        """
        from peft import get_peft_model

        check_options(method, self.quantization, self._is_moved)
        config = lora_config(self.model, method, self.source)
        # PEFT makes EVA's initial values only where there is no other adapter.
        plain = is_plain_config(config.to_dict()) and method.init != "eva"
        if self._trains_some and not (plain and self._plain):
            raise UserError(SHARES_NO_PASS, kind=ErrorKind.TARGET_MODULES)
        if not (plain and self._plain):
            self.unwrap()
        with torch.random.fork_rng(devices=cuda_devices()), self._adding(name, self._changed_in_place(method)):
            torch.manual_seed(seed)
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            except ValueError as error:
                raise targets.refusal(self.model, method.target_modules, error) from error
            if method.init_adapter:
                check_is_whole(self._peft, Path(method.init_adapter), name, self.source)
            if method.init == "eva":
                self._peft.set_adapter(name)
                begin_with_directions(
                    self._peft, name, examples, method, pad_token_of(self.tokenizer), compute_dtype(self.device)
                )
        self._plain = plain
        parameters = self._activate(name, trainable=True)
        for parameter in parameters if self.device.type == "cuda" else ():
            # Biases and whole modules come in the base's half precision, in which AdamW's small steps would be lost.
            parameter.data = parameter.data.float()
        if not plain:
            self._began = beginning_of(self._peft, self.lora_modules(), name, method.init in TAKES_PARTS)
        return parameters

    def _changed_in_place(self, method: Method) -> set[str]:
        """Names of the base's parameters whose numbers a training changes where they lie."""
        named = [name for name, _ in self.model.named_parameters()]
        changed = {name for name in named if "bias" in name} if method.bias != "none" else set()
        if method.init == "olora":  # PEFT takes the parts out of the very tensors, where these are float32
            changed |= {name for name in named if name.endswith(".weight")}
        return changed

    @property
    def _is_moved(self) -> bool:
        """Whether accelerate moves weights to and from the CPU or a disk; see ``Snapshot``."""
        return not {"cpu", "disk"}.isdisjoint((getattr(self.model, "hf_device_map", None) or {}).values())

    @property
    def _trains_some(self) -> bool:
        """Whether an adapter that is being trained is attached."""
        return self._peft is not None and any(not config.inference_mode for config in self._peft.peft_config.values())

    @contextlib.contextmanager
    def _adding(self, name: str, overwritten: Container[str] = ()) -> Iterator[None]:
        """Inside, PEFT adds an adapter to the model. Where that fails, nothing of it is left.

        Args:
            overwritten: names of the base's parameters that the adapter brings its own numbers for.
        """
        others = [] if self._peft is None else [other for other in self._peft.peft_config if other != name]
        if self._peft is None:
            self._before = Snapshot(self.model, overwritten)
        try:
            yield
        except BaseException:
            if others:
                self.detach(name)
            else:
                self.unwrap()
            raise

    @errors_are(ErrorKind.ADAPTER)
    def attach_saved(self, folder: Path, name: str = "default") -> None:
        """Attach the adapter in a PEFT folder, active and not trainable.

        One that is more than plain LoRA, or of another kind, takes the place of all others.

        Raises:
            UserError: it is no adapter of this model, has numbers that are not finite, or does its work outside of the
                model's layers.
            torch.OutOfMemoryError: memory does not hold it (MemoryError or RuntimeError on a CPU).
        """
        from peft import PeftModel

        check_adapter(folder)
        check_finite(folder)
        names = [name.replace(".base_layer", "") for name, _ in self.model.named_modules()]
        check_patterns(f"{folder / 'adapter_config.json'}", read_adapter_config(folder), names)
        plain = is_plain_lora(folder)
        if not (plain and self._plain):
            self.unwrap()
        with self._adding(name, overwritten_by(folder)):
            try:
                with warnings.catch_warnings(action="ignore"):  # of what is missing, which is an error here
                    if self._peft is None:
                        self._peft = PeftModel.from_pretrained(self.model, str(folder), adapter_name=name)
                    else:
                        self._peft.load_adapter(str(folder), adapter_name=name)
                check_is_whole(self._peft, folder, name, self.source)
                self._activate(name, trainable=False)
                if not plain:
                    self._peft.requires_grad_(False)
                    self._check_acts_in_layers(folder)
            except NO_ADAPTER_OF_IT as error:
                if memory.is_out_of_memory(error):  # torch's is a RuntimeError; the adapter is not to blame
                    raise
                if isinstance(error, UserError):
                    raise
                raise UserError(f"{folder}: no adapter of {self.source}: {one_line(error)}") from error
        self._plain = plain

    def _check_acts_in_layers(self, folder: Path) -> None:
        """Check that the model alone computes what PEFT's wrapper around it does, on a fixed input.

        Raises:
            UserError: it does not: the wrapper adds something, which questions would not see.
        """
        with torch.inference_mode(), self.autocast():
            whole, inner = (m(input_ids=self._fixed_ids(), use_cache=False).logits for m in (self._peft, self.model))
        if whole.shape != inner.shape or not torch.allclose(whole, inner, rtol=1e-3, atol=1e-4):
            kind = str(self._peft.active_peft_config.peft_type.value)
            raise UserError(f"{folder}: is {kind}: {ONLY_IN_LAYERS}")

    @property
    def serving(self) -> str | None:
        """The name of the adapter that the model computes with now; None: it computes as the base does.

        A caller's own adapters are not known here.
        """
        if self._peft is None or not self._peft.peft_config or self._is_base:
            return None
        return self.active_adapter

    @property
    def has_plain_adapters(self) -> bool:
        """Whether the attached adapters are LoRA and nothing more."""
        return self._plain

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that the model computes with."""
        return str(self._peft.active_adapter)

    def activate(self, name: str) -> None:
        """Choose, of several attached adapters, the one that the model computes with; it is not trainable."""
        self._activate(name, trainable=False)

    def _activate(self, name: str, trainable: bool) -> list[torch.nn.Parameter]:
        """Make ``name`` the active adapter, trainable or frozen; returns its parameters, sorted by name."""
        self._peft.set_adapter(name)
        # ``lora_A.default.weight`` in a linear layer, but ``lora_embedding_A.default`` in an embedding: hence the dot
        # that is added to the key.
        marker = f".{name}."
        named = sorted(
            (key, p)
            for key, p in self._peft.named_parameters()
            # One that has the model for itself trains what PEFT says: biases too, and whole modules.
            if (p.requires_grad if trainable and not self._plain else "lora_" in key and marker in f"{key}.")
        )
        parameters = [p for _, p in named]
        for parameter in parameters:
            parameter.requires_grad_(trainable)
        self.model.eval()
        return parameters

    def save_adapter(self, folder: Path, name: str = "default") -> None:
        """Write PEFT's own format: ``adapter_config.json`` and ``adapter_model.safetensors`` in ``folder``.

        It is always an adapter of the base as it was loaded.
        """
        if self._began.factors:
            save_difference(self._peft, name, self._began, folder)
            return
        self._peft.save_pretrained(str(folder), selected_adapters=[name], safe_serialization=True)
        nested = folder / name  # where PEFT puts every adapter that is not called "default"
        if name != "default" and nested.is_dir():
            for file in nested.iterdir():
                file.rename(folder / file.name)
            nested.rmdir()
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, not filled in

    def detach(self, name: str = "default") -> None:
        """Drop an adapter and give its memory back; nothing is dropped where none has that name."""
        if self._peft is not None and name in self._peft.peft_config:
            if self._plain:
                self._peft.delete_adapter(name)
            else:
                self.unwrap()
        self.model.eval()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def unwrap(self) -> None:
        """Remove PEFT's wrappers and all adapters: the model has its original modules and weights again."""
        self.kept.clear()
        if self._before is not None:
            self._before.restore()
        self._peft = self._before = None
        self._plain, self._began = True, Beginning()

    @property
    def peft_model(self) -> Any:
        """PEFT's wrapper around the model, which other trainers expect; None before the first adapter is attached."""
        return self._peft

    def lora_modules(self) -> list[tuple[str, Any]]:
        """Every module that has an adapter, with its name, in the model's order."""
        from peft.tuners.lora import LoraLayer

        return [(key, module) for key, module in self._peft.named_modules() if isinstance(module, LoraLayer)]

    def allows(self, trial: Callable[[Any], bool]) -> bool:
        """Whether ``trial``, called with the model, returns True; each trial is run once in the life of the model.

        It runs in eval mode and with the adapters switched off, so that the result does not depend on when it is run.
        """
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
        """Inside, the attached adapters are switched off: the model computes as the base does."""
        if self._peft is None or not self._peft.peft_config:
            yield
            return
        before, self._is_base = self._is_base, True
        try:
            with self._peft.disable_adapter():
                yield
        finally:
            self._is_base = before

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """Mixed precision on a GPU: an adapter's parameters are float32, its products bfloat16. Nothing on a CPU."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=compute_dtype(self.device))

    @property
    def forward_dtype(self) -> torch.dtype:
        """What products are in where there is no training: float32 on a CPU, on a GPU the model's own dtype.

        A caller's model may be float32 there: its answers are then those of lm-evaluation-harness to 1e-3.
        """
        return self.model.dtype if self.device.type == "cuda" else torch.float32

    def forward_autocast(self) -> contextlib.AbstractContextManager[None]:
        """``autocast`` for passes of which there is no training, to ``forward_dtype``."""
        if self.forward_dtype not in {torch.bfloat16, torch.float16}:
            return contextlib.nullcontext()
        return torch.autocast("cuda", dtype=self.forward_dtype)

    def relative_weight_update(self, name: str = "default") -> float:
        """Mean over the adapted modules of ||(alpha / r) B A|| / ||W||: Frobenius norms, W the frozen weight."""
        ratios = []
        for key, module in self.lora_modules():
            if (factors := factors_of(module, name)) is None:
                continue
            began = self._began.factors.get(key)
            if key not in self._weight_norms:
                self._weight_norms[key] = base_norm(module, name, began)
            ratios.append(update_norm(module, name, factors, began) / self._weight_norms[key])
        return sum(ratios) / len(ratios)

    def changes_nothing(self, name: str = "default") -> bool:
        """Whether the model with the adapter is the base; see ``adapter_weights.changes_nothing``."""
        return changes_nothing(self.lora_modules(), name, self._began)

    @property
    def trains_beside(self) -> bool:
        """Whether parameters beside A and B are being trained: biases, whole modules, DoRA's magnitudes."""
        return bool(self._began.beside)

    def base_hash(self) -> str:
        """SHA-256 in hex of the base's weights and of its logits: unequal ones mean that something changed the base.

        Call it where no adapter is attached, or plain ones only: others have some of the base's weights changed.
        """
        assert self._plain
        return digest([self.logits_hash(), weights_hash(self.model)])

    def logits_hash(self) -> str:
        """SHA-256 of the base's logits on a fixed input, which sees nothing of what that input does not go through."""
        return hashlib.sha256(self._fixed_logits().float().cpu().numpy().tobytes()).hexdigest()

    def check_logits(self) -> None:
        """Check that the base computes numbers.

        Raises:
            UserError: its logits on two tokens are not finite.
        """
        if not bool(self._fixed_logits(2).isfinite().all()):
            dtype = str(self.model.dtype).split(".")[-1]
            text = f"its logits are not finite numbers: its weights are damaged, or too large for {dtype}"
            raise UserError(f"--model {self.source}: {text}", kind=ErrorKind.MODEL)

    def _fixed_logits(self, num_tokens: int = 16) -> torch.Tensor:
        """The base's logits (2, T, V) on a fixed input, of its first tokens."""
        with self.base(), torch.inference_mode():
            ids = self._fixed_ids()[:, :num_tokens]
            logits: torch.Tensor = self.model(input_ids=ids, use_cache=False).logits
        return logits

    def _fixed_ids(self) -> torch.Tensor:
        """Token ids (2, 16), always the same."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        # 7919 is a prime: the 32 ids are spread over the vocabulary.
        return (torch.arange(32, device=self.device) * 7919 % vocabulary).reshape(2, 16)
