"""The configuration: every option declared once, with its help.

A YAML file, the environment (``RAYLORA_LEARNING_RATE=1e-4``, ``MODEL_NAME``), ``.env`` and the command line set the
same options; of two values the one from the later source in this list counts. Unknown names and bad values end in one
line that names the option.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from raylora.config.method import LARGEST_SEED, Method
from raylora.config.options import MAX_RECORD_CHARS, FeatureOptions, MmluOptions, ModelOptions
from raylora.config.sources import SETTINGS, NamePairs, Settings, load_settings, read_json, split_commas
from raylora.storage.hub_names import DatasetLocation
from raylora.storage.places import LocalPath, Location

if TYPE_CHECKING:  # imports pandas, half a second: errors in options and --help need not wait for it
    from raylora.records import Experiment

Stage = Literal["features", "train", "mmlu"]
TrackerName = Literal["mlflow", "tensorboard", "wandb"]
TARGETS = ("overall_accuracy", "accuracy_change", "balanced_accuracy_change", "correct_probability_change")
"""Outcomes that can be predicted: these, and those of a further set of questions, ``accuracy_change[NAME]``."""


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
    max_record_chars: int = Field(
        MAX_RECORD_CHARS, ge=1, description="characters of a record; a longer one is a bad record"
    )
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
    order: LocalPath | None = Field(
        None, description="CSV that says what to run first, such as ranking.csv of raylora.rank"
    )
    price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="price of a GPU-hour in your currency, for the report's costs"
    )
    trackers: Annotated[tuple[TrackerName, ...], NoDecode] = Field(
        (), description="told of every row, separated by commas: mlflow, tensorboard, wandb"
    )
    push_to_hub: str | None = Field(
        None,
        description="ORG/NAME: each adapter goes, with a card, to the hub repository ORG/NAME-<dataset> (private; "
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


def longest_record(config: Config) -> list[dict[str, int]]:
    """What of ``--max-record-chars`` is part of identities: nothing where it is the default, as older names stay."""
    number = config.max_record_chars
    return [] if number == MAX_RECORD_CHARS else [{"max_record_chars": number}]


def method_of(experiment: Experiment) -> Method:
    """The hyperparameters of an experiment."""
    return Method(**experiment.settings)
