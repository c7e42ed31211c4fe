"""The options as types of keyword arguments: editors complete them, and a type checker knows wrong ones.

Both read the source and no pydantic fields of another class, so that each option stands here once more;
``tests/config/test_keywords.py`` holds the two together. None is a value only where an option may have none.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any, Literal, TypedDict

Texts = str | Sequence[str]
"""``a,b`` or a list."""
Place = str | Path


class CommonKeywords(TypedDict, total=False):
    """``CommonOptions``."""

    output: Place
    threads: int | None
    fresh: bool


class ModelKeywords(TypedDict, total=False):
    """``ModelOptions`` without ``model``."""

    quantization: Literal["none", "8bit", "4bit", "fp8"]
    int8_activations: bool
    max_memory: dict[str, str] | str
    gpus_per_worker: float
    trust_remote_code: bool
    allow_pickle: bool
    template_date: date | str
    allow_special_tokens: bool


class QuestionKeywords(TypedDict, total=False):
    """``MmluOptions`` without ``mmlu`` and ``max_samples``, which some functions have as parameters of their own."""

    questions: Texts | dict[str, str]
    mask: str | None
    question_seed: int
    num_fewshot: int
    prompt_style: Literal["harness", "chat"]
    scoring: Literal["letters", "cloze", "generate"]
    cloze_per: Literal["character", "byte", "token", "choice"]
    token_budget: int | None


class EvaluationKeywords(CommonKeywords, ModelKeywords, QuestionKeywords):
    """Of ``evaluate_mmlu``."""


class MethodKeywords(TypedDict, total=False):
    """``Method``: the hyperparameters."""

    lora_r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: Texts
    lora_variant: Literal["lora", "rslora", "dora"]
    init: Literal["default", "pissa", "olora", "eva"]
    bias: Literal["none", "all", "lora_only"]
    modules_to_save: Texts
    rank_pattern: Texts | dict[str, int]
    alpha_pattern: Texts | dict[str, float]
    init_adapter: str | None
    num_epochs: float
    batch_size: int
    gradient_accumulation: int
    learning_rate: float
    max_grad_norm: float
    warmup_ratio: float
    lr_scheduler: Literal["cosine", "linear", "constant"]
    adam_beta1: float
    adam_beta2: float
    weight_decay: float
    max_length: int
    train_on: Literal["answer", "all"]
    seed: int


class RunKeywords(EvaluationKeywords, MethodKeywords, total=False):
    """Of ``run_experiment`` and ``process_folder``: all but ``chunk``, ``max_samples`` and ``dry_run``."""

    model: str | None
    mmlu: str | None
    sample_size: int
    probe_steps: int
    data_root: Place
    dataset: str | Sequence[Place]
    stages: Texts
    grid: dict[str, list[Any]] | str
    repeats: int
    num_workers: int | None
    adapters_a_pass: int | None
    timeout: float | None
    limit: int | None
    max_experiments: int | None
    max_records: int | None
    max_record_chars: int
    salvage: bool
    columns: Texts | dict[str, str]
    transfer: bool
    retry_failed: bool
    address: str | None
    order: Place | None
    price: float | None
    trackers: Texts
    push_to_hub: str | None
    push_public: bool


class FolderKeywords(RunKeywords, total=False):
    """Of ``raylora.run``."""

    max_samples: int | None


class ConfigKeywords(FolderKeywords, total=False):
    """``Config``: all of them."""

    chunk: str | int | None
    dry_run: bool
