"""How an adapter is trained: the options that a grid may vary."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from raylora.config.sources import check_patterns, split_commas, split_patterns
from raylora.storage.places import expanded

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of attention and MLP, as Llama and models like it name them."""
AUTO, ALL_LINEAR = "auto", "all-linear"
"""Values of ``--target-modules`` that stand for names (``model/targets.py``)."""
LARGEST_SEED = 2**53
"""Up to here every integer is a float64 too, as which tables may be read."""


class Method(BaseModel):
    """How an adapter is trained. These are the hyperparameters, and the seed, that a ``grid`` may vary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora_r: int = Field(16, ge=1, le=4096, description="rank of the LoRA adapter")
    lora_alpha: float = Field(32, gt=0, description="LoRA scaling: the update is alpha / r * B A")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Annotated[tuple[str, ...], NoDecode] = Field(
        (AUTO,),
        min_length=1,
        description="layers that get an adapter: names with commas between, all-linear, or auto (Llama's seven names "
        "where the model has them, else all-linear)",
    )
    lora_variant: Literal["lora", "rslora", "dora"] = Field(
        "lora", description="rslora scales by alpha / sqrt(r); dora trains the length of each row of a weight too"
    )
    init: Literal["default", "pissa", "olora", "eva"] = Field(
        "default",
        description="what A and B begin as: random and zero, parts of the weights (pissa, olora), directions of the "
        "data (eva)",
    )
    bias: Literal["none", "all", "lora_only"] = Field(
        "none", description="biases of the base that are trained and saved too: all, or those of adapted layers"
    )
    modules_to_save: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="modules that are trained whole and saved with the adapter, with commas between: lm_head"
    )
    rank_pattern: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="other ranks for some layers, NAME=R with commas between: q_proj=32,layers.0.mlp.up_proj=4"
    )
    alpha_pattern: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="another alpha for some layers, NAME=ALPHA with commas between"
    )
    init_adapter: Annotated[str | None, AfterValidator(lambda text: text and str(expanded(Path(text))))] = Field(
        None, description="PEFT folder of the adapter to continue from; rank, alpha, layers and variant are its own"
    )
    num_epochs: float = Field(3, gt=0, le=1000, description="passes over the dataset")
    batch_size: int = Field(4, ge=1, description="examples in a minibatch; halves by itself when memory runs out")
    gradient_accumulation: int = Field(4, ge=1, description="minibatches to an optimizer step")
    learning_rate: float = Field(2e-4, ge=0, lt=10, description="peak learning rate of AdamW")
    max_grad_norm: float = Field(0.3, gt=0, description="gradients are clipped to this global L2 norm")
    warmup_ratio: float = Field(0.03, ge=0, le=1, description="share of the steps with a rising learning rate")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field("cosine", description="learning rate after warm-up")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's first moment decay")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's second moment decay")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay")
    max_length: int = Field(1024, ge=16, description="tokens of an example; the front of a longer one is cut")
    train_on: Literal["answer", "all"] = Field("answer", description="where the loss looks: the answers, or everything")
    seed: int = Field(
        0, ge=0, le=LARGEST_SEED, description="of training and features, mixed with the dataset's content"
    )

    _split_modules = field_validator(
        "target_modules", "modules_to_save", mode="before", json_schema_input_type=tuple[str, ...] | str
    )(split_commas)
    _split_patterns = field_validator("rank_pattern", "alpha_pattern", mode="before", json_schema_input_type=Any)(
        split_patterns
    )

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        """Refuse what is no ``NAME=NUMBER``, and two numbers for one name."""
        return check_patterns(patterns, is_rank=info.field_name == "rank_pattern")

    def identity(self) -> dict[str, Any]:
        """The hyperparameters as JSON values for hashes; later options where they are set: older names stay."""
        options = type(self).model_fields
        same = {name for name in LATER if getattr(self, name) == options[name].default}
        return self.model_dump(mode="json", exclude=same)


LATER = ("lora_variant", "init", "bias", "modules_to_save", "rank_pattern", "alpha_pattern", "init_adapter")
"""Hyperparameters that are in an experiment's identity only where they are not the default."""
