"""The configuration: every option declared once, with its help.

A YAML file, the environment (``RAYLORA_LEARNING_RATE=1e-4``, ``MODEL_NAME``), ``.env`` and the command line set the
same options; of two values the one from the later source in this list counts. Unknown names and bad values end in one
line that names the option.
"""

from __future__ import annotations

import itertools
import re
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from raylora.config_sources import (
    SETTINGS,
    NamePairs,
    Settings,
    check_patterns,
    load_settings,
    read_json,
    split_commas,
    split_patterns,
)
from raylora.errors import UserError
from raylora.storage.hub_names import DatasetLocation
from raylora.storage.places import Location, LocationText, location

if TYPE_CHECKING:  # imports pandas, half a second: errors in options and --help need not wait for it
    from raylora.records import Experiment

Stage = Literal["features", "train", "mmlu"]
TrackerName = Literal["mlflow", "tensorboard", "wandb"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of attention and MLP, as Llama and models like it name them."""
AUTO, ALL_LINEAR = "auto", "all-linear"
"""Values of ``--target-modules`` that stand for names (``model/targets.py``)."""
LARGEST_SEED = 2**53
"""Up to here every integer is a float64 too, as which tables may be read."""
TARGETS = ("overall_accuracy", "accuracy_change", "balanced_accuracy_change", "correct_probability_change")
"""Outcomes that can be predicted: these, and those of a further set of questions, ``accuracy_change[NAME]``."""
TEMPLATE_DATE = date(2024, 7, 26)
"""What chat templates take for today: the date that those of Llama 3.1 and 3.2 have where they are told none."""
DEMO = "demo"
"""The value of ``--model`` and ``--mmlu`` that stands for the demo's."""


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
    init_adapter: str | None = Field(
        None, description="PEFT folder that trainings go on from; rank, alpha, layers and variant are its own"
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


def _read_date(value: Any) -> Any:
    """A date as text; pydantic alone takes numbers for seconds since 1970."""
    if type(value) is date:
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value.strip()):
        return value.strip()
    raise ValueError("expected a date, YYYY-MM-DD")


class ModelOptions(BaseModel):
    """Which base model, and how it lies in memory."""

    model: str | None = Field(
        None,
        description="base model: a folder, a hub name, a .gguf file, modelscope://org/model, or demo (also MODEL_NAME)",
    )
    quantization: Literal["none", "8bit", "4bit", "fp8"] = Field(
        "8bit",
        description="int8 or nf4 weights of bitsandbytes; fp8 weights and activations, on GPUs that multiply fp8; none",
    )
    int8_activations: bool = Field(
        False,
        description="with 8bit: LLM.int8's own arithmetic, where what shares a batch moves the numbers (else int8 "
        "weights alone)",
    )
    max_memory: Annotated[dict[str, str], BeforeValidator(read_json)] = Field(
        {},
        description='memory limit a device, what is over goes to the CPU: {"0":"20GiB","cpu":"60GiB"}',
    )
    gpus_per_worker: float = Field(
        1,
        ge=0.01,
        le=1024,
        description="GPUs of a worker: 2 or more, over which the model is spread, or a share of one, such as 0.5",
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(False, description="read weights from pickle files too, where there is no safetensors")
    template_date: Annotated[date, BeforeValidator(_read_date, json_schema_input_type=date)] = Field(
        TEMPLATE_DATE, description="what chat templates that ask for today's date are told: YYYY-MM-DD"
    )
    allow_special_tokens: bool = Field(
        False, description="special tokens written in datasets and questions (<|im_end|>) are tokens, not text"
    )

    @field_validator("max_memory")
    @classmethod
    def _check_max_memory(cls, max_memory: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        """Refuse fp8 over several devices: accelerate moves weights that it has made itself."""
        if max_memory and info.data.get("quantization") == "fp8":
            raise ValueError("not with --quantization fp8, which lies on one GPU: give one of the two")
        return max_memory

    @field_validator("gpus_per_worker")
    @classmethod
    def _check_gpus(cls, gpus: float, info: ValidationInfo) -> float:
        """Refuse one and a half GPUs, which Ray does not lend, and fp8 over several, as with ``max_memory``."""
        if gpus > 1 and not gpus.is_integer():
            raise ValueError("a whole number of GPUs, or a share of one that is less than 1")
        if gpus > 1 and info.data.get("quantization") == "fp8":
            raise ValueError("not with --quantization fp8, which lies on one GPU: give one of the two")
        return gpus

    def check_gpus(self, num_gpus: int, place: str) -> None:
        """Check that a place with so many GPUs has room for a worker.

        Raises:
            UserError: it has not.
        """
        if self.gpus_per_worker > num_gpus:
            raise UserError(f"--gpus-per-worker {self.gpus_per_worker:g}: {place} has {num_gpus}; give no more")

    @field_validator("int8_activations")
    @classmethod
    def _check_quantization(cls, int8_activations: bool, info: ValidationInfo) -> bool:
        """Refuse LLM.int8's arithmetic for weights that are not int8."""
        quantization = info.data.get("quantization", "8bit")
        if int8_activations and quantization != "8bit":
            raise ValueError(f"needs --quantization 8bit, which is {quantization}")
        return int8_activations


Scoring = Literal["letters", "cloze", "generate"]
ClozePer = Literal["character", "byte", "token", "choice"]


NAMED_SET = re.compile(r"(?s)([A-Za-z0-9][A-Za-z0-9_.-]{0,39})=(.+)")
"""``NAME=FILE``. The name stands in names of columns and files."""
MASKED = "masked"
"""The name of the first set without the questions of ``--mask``, in columns."""


def _list_sets(value: Any) -> Any:
    """Question sets as they are written on the command line; a YAML file may give ``{name: file}``."""
    if isinstance(value, dict):
        return tuple(f"{name}={file}" for name, file in value.items())
    if isinstance(value, str) and not value.startswith("["):
        return tuple(re.split(r",(?=[A-Za-z0-9][A-Za-z0-9_.-]{0,39}=)", value))  # a file's name may have commas
    return split_commas(value)


class MmluOptions(BaseModel):
    """Which questions are asked, and how."""

    mmlu: LocationText | None = Field(
        None,
        description="questions: JSON, Parquet, CSV folder (a path, or s3://...), or demo "
        "(without one: mmlu_dataset/test_all_subjects.json)",
    )
    questions: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="further sets of questions, NAME=FILE each, whose columns are named like accuracy_change[NAME]; a "
        "FILE alone is that of --mmlu",
    )
    mask: LocationText | None = Field(
        None,
        description="questions to leave out, in columns named like accuracy_change[masked]: a file of their ids, or "
        "MMLU-Redux (which lists wrong ones)",
    )
    max_samples: int | None = Field(None, ge=1, description="questions asked: a seeded sample stratified by subject")
    question_seed: int = Field(0, ge=0, le=LARGEST_SEED, description="of the sample of questions: another one, others")
    num_fewshot: int = Field(0, ge=0, le=100, description="solved questions shown before each one")
    prompt_style: Literal["harness", "chat"] = Field("harness", description="lm-evaluation-harness' prompt, or a chat")
    scoring: Annotated[Scoring, BeforeValidator(lambda v: "letters" if v == "logits" else v)] = Field(
        "letters",
        description="how an answer is read: the likeliest letter, the likeliest text of a choice (cloze), or generated",
    )
    cloze_per: ClozePer = Field("character", description="what a choice's log-likelihood is divided by, with cloze")
    token_budget: int | None = Field(
        None,
        ge=64,
        description="tokens in a batch of questions (without one: what fits a GPU's memory, 512 on a CPU)",
    )

    _list_sets = field_validator(
        "questions", mode="before", json_schema_input_type=tuple[str, ...] | dict[str, str] | str
    )(_list_sets)

    @field_validator("questions")
    @classmethod
    def _check_sets(cls, questions: tuple[str, ...]) -> tuple[str, ...]:
        """Refuse two sets of one name; files are named after them, and some systems know no capitals."""
        for text in questions:
            if "://" in (file := text.removeprefix(f"{_name_of_set(text)}=")):
                location(file)  # raises where it cannot be one
        names = [name.lower() for name in map(_name_of_set, questions)]
        if len({*names}) < len(names):
            raise ValueError("two sets of one name, or without one: give each another NAME=")
        if MASKED in names:
            raise ValueError(f"{MASKED} is the name of the questions that --mask leaves: give the set another one")
        return questions

    @property
    def question_sets(self) -> dict[str, str | None]:
        """Each set's file by its name; the first one's name is empty. None: there is a default for it."""
        named = {_name_of_set(text): text.removeprefix(f"{_name_of_set(text)}=") for text in self.questions}
        return {"": named.get("", self.mmlu), **named}


def _name_of_set(text: str) -> str:
    """Empty where it is a file alone. A URI has no name: what stands before its ``=`` holds a slash or a colon."""
    named = NAMED_SET.fullmatch(text)
    return named[1] if named else ""


class FeatureOptions(BaseModel):
    """What is measured of a dataset."""

    sample_size: int = Field(100, ge=0, description="examples that features are measured on (0: all)")
    probe_steps: int = Field(20, ge=0, description="optimizer steps of the probe (0: no dynamic features)")


class CommonOptions(BaseModel):
    """What every command needs to know."""

    output: Location = Field(Path("results"), description="folder for the results, or s3://bucket/folder")
    threads: int | None = Field(None, ge=1, description="CPU threads a worker (default: cores / workers)")
    fresh: bool = Field(False, description="throw away what earlier runs finished")


class RunOptions(BaseModel):
    """What is run, and where."""

    chunk: str | None = Field(None, description="chunk folder by name, or by its number in the list")
    data_root: Location = Field(
        Path("train_data/merged_datasets"), description="folder that holds the chunk_* folders, or s3://bucket/folder"
    )
    dataset: Annotated[tuple[DatasetLocation, ...], NoDecode] = Field(
        (),
        description="datasets beside those of --chunk, or without one: files, folders of shards, or "
        "hf://datasets/org/name[@revision][/config][:split] of the Hugging Face hub",
    )
    stages: Annotated[tuple[Stage, ...], NoDecode] = Field(
        ("features", "train", "mmlu"), min_length=1, description="stages to run, separated by commas"
    )
    grid: Annotated[dict[str, list[Any]], BeforeValidator(read_json)] = Field(
        {}, description='several values a hyperparameter, all combinations: {"lora_r":[8,16]}'
    )
    repeats: int = Field(
        1, ge=1, le=1000, description="trainings of each dataset, a row each: with --seed and the numbers after it"
    )
    num_workers: int | None = Field(
        None, ge=1, description="worker processes (default: what --gpus-per-worker leaves room for; without GPUs one)"
    )
    adapters_a_pass: int | None = Field(
        None,
        ge=1,
        le=64,
        description="adapters trained over the same passes through the base (default: on a GPU what pays, on a CPU 1)",
    )
    timeout: float | None = Field(None, gt=0, description="seconds after which an experiment is given up")
    limit: int | None = Field(None, ge=1, description="only the first N dataset files")
    max_experiments: int | None = Field(None, ge=1, description="only the first N experiments, by --order or by size")
    max_records: int | None = Field(None, ge=1, description="only the first N records of each file")
    salvage: bool = Field(False, description="keep the complete leading records of a truncated file")
    columns: Annotated[NamePairs, NoDecode] = Field(
        (),
        description="what keys or columns of the dataset files are called there: question=q,answer=a where they hold q "
        "and a",
    )
    transfer: bool = Field(
        False,
        description="score each adapter on examples of every dataset that trainings leave out: what helps what, what "
        "is forgotten",
    )
    retry_failed: bool = Field(False, description="run experiments again that ended in an error row")
    dry_run: bool = Field(False, description="show what would run, and stop")
    address: str | None = Field(None, description="Ray cluster to join: auto, or host:port of its head node")
    order: Path | None = Field(None, description="CSV that says what to run first, such as ranking.csv of raylora.rank")
    price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="price of a GPU-hour in your currency, for the report's costs"
    )
    trackers: Annotated[tuple[TrackerName, ...], NoDecode] = Field(
        (), description="told of every row, separated by commas: mlflow, tensorboard, wandb"
    )
    push_to_hub: str | None = Field(
        None,
        description="ORG/NAME: each good adapter goes, with a card, to the hub repository ORG/NAME-<dataset> (private; "
        "needs HF_TOKEN or a login)",
    )
    push_public: bool = Field(False, description="with --push-to-hub: everybody can see the repositories it makes")

    _split_datasets = field_validator("dataset", mode="before", json_schema_input_type=tuple[str, ...] | str)(
        split_commas
    )
    _split_stages = field_validator("stages", mode="before", json_schema_input_type=tuple[Stage, ...] | str)(
        split_commas
    )
    _split_trackers = field_validator("trackers", mode="before", json_schema_input_type=tuple[TrackerName, ...] | str)(
        split_commas
    )

    @field_validator("chunk", mode="before", json_schema_input_type=str | int | None)
    @classmethod
    def _take_numbers(cls, chunk: Any) -> Any:
        """A number as text: a YAML file gives ``chunk: 1`` as a number, the command line as text."""
        return str(chunk) if type(chunk) is int else chunk

    @property
    def column_names(self) -> dict[str, str]:
        """By a record's key, what ``columns`` says that the files call it; sorted."""
        return dict(sorted((text.partition("=")[0], text.partition("=")[2]) for text in self.columns))

    @field_validator("transfer")
    @classmethod
    def _check_transfer(cls, transfer: bool, others: ValidationInfo) -> bool:
        """Refuse it where no adapter is made or scored."""
        if transfer and set(others.data.get("stages", ())) == {"features"}:
            raise ValueError("scores adapters: add train to --stages")
        return transfer

    @field_validator("push_to_hub")
    @classmethod
    def _check_push(cls, push_to_hub: str | None, others: ValidationInfo) -> str | None:
        """Refuse it where no adapter is made."""
        if push_to_hub and set(others.data.get("stages", ())) == {"features"}:
            raise ValueError("pushes adapters: add train to --stages")
        return push_to_hub

    @field_validator("push_public")
    @classmethod
    def _check_public(cls, push_public: bool, others: ValidationInfo) -> bool:
        """Refuse it where nothing is pushed."""
        if push_public and not others.data.get("push_to_hub"):
            raise ValueError("says nothing without --push-to-hub ORG/NAME: give both")
        return push_public

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        """Refuse ``ray://``: Ray Data does not run over Ray Client, and a laptop's lost network would end the run."""
        if address and address.startswith("ray://"):
            host = address.removeprefix("ray://").partition(":")[0] or "HOST"
            raise ValueError(
                "a run must be on the cluster, not beside it: forward its dashboard "
                f"(ssh -L 8265:localhost:8265 {host}), then "
                "ray job submit --address http://localhost:8265 -- python -m raylora.batch --address auto and the "
                "other options"
            )
        return address


class EvaluationConfig(CommonOptions, ModelOptions, MmluOptions, Settings):
    """All options of an evaluation."""


class Config(RunOptions, FeatureOptions, Method, EvaluationConfig):
    """All options of one run."""

    model_config = SETTINGS

    @field_validator("repeats")
    @classmethod
    def _check_repeats(cls, repeats: int, others: ValidationInfo) -> int:
        """Refuse repeats of a grid that has seeds of its own, and those whose seeds would be too large."""
        if repeats > 1 and "seed" in others.data.get("grid", {}):
            raise ValueError("the grid has seeds already: give one of the two")
        if others.data.get("seed", 0) + repeats - 1 > LARGEST_SEED:
            raise ValueError(f"its last seed is beyond {LARGEST_SEED}: give a smaller --seed")
        return repeats

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Check every value of the grid as a value of its option."""
        for key, values in grid.items():
            if key not in Method.model_fields:
                raise ValueError(f"{key} is no hyperparameter; a grid may vary {', '.join(Method.model_fields)}")
            if not values:
                raise ValueError(f"{key} has no values")
            for value in values:
                try:
                    Method(**{key: value})
                except ValidationError as error:
                    raise ValueError(f"{key}: {error.errors()[0]['msg']} (got {value!r})") from error
        return grid

    @property
    def has_transfer(self) -> bool:
        """Whether trainings leave examples out, and adapters are scored on those of every dataset."""
        return self.transfer and set(self.stages) != {"features"}

    @property
    def hub_repository(self) -> str | None:
        """How the repositories' names begin to which adapters are pushed; None where none are."""
        return self.push_to_hub if set(self.stages) != {"features"} else None

    @property
    def all_stages(self) -> tuple[str, ...]:
        """The stages, and behind them ``transfer``, where it is asked for."""
        return (*self.stages, "transfer") if self.has_transfer else self.stages

    @property
    def longest_example(self) -> int:
        """The most tokens that an example may have in any training of the run."""
        return int(max(self.grid.get("max_length", [self.max_length])))

    def method(self) -> Method:
        """The hyperparameters, without the grid's values, and the first seed."""
        return Method(**{name: getattr(self, name) for name in Method.model_fields})

    def grid_methods(self) -> list[Method]:
        """The hyperparameters of every combination of the grid's values and of the repeats' seeds, each once.

        A training's seed changes no feature: where only features are measured, there is one seed.
        """
        base = self.method().model_dump()
        grid = {"seed": range(self.seed, self.seed + self.repeats), **self.grid}
        if set(self.stages) == {"features"}:
            grid["seed"] = [self.seed]
        combinations = itertools.product(*grid.values())
        methods = (Method(**{**base, **dict(zip(grid, values, strict=True))}) for values in combinations)
        return list(dict.fromkeys(methods))

    @property
    def seeds(self) -> list[int]:
        """The seeds of the trainings that each dataset gets with the same hyperparameters, in their order."""
        return list(dict.fromkeys(method.seed for method in self.grid_methods()))


def load_config(argv: list[str] | None = None, prog: str = "python -m raylora.batch", **overrides: Any) -> Config:
    """The configuration of a run; see ``load_settings``."""
    return load_settings(Config, argv, prog, **overrides)


def method_of(experiment: Experiment) -> Method:
    """The hyperparameters of an experiment."""
    return Method(**experiment.settings)
