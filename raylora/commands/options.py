"""The options of each command. Imports no torch, Ray or pandas: ``--help`` must not wait for them.

``raylora.commands.run_command`` says which command takes which of these classes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import CliPositionalArg, CliVariadicArg, NoDecode, SettingsConfigDict

from raylora.config.run import TARGETS, Config, EvaluationConfig
from raylora.config.sources import Settings, split_commas
from raylora.storage.hub_names import DatasetLocation
from raylora.storage.places import LocalPath, Location


def _check_target(target: str) -> str:
    """Refuse a column that is no outcome. Of a further set of questions it has the set's name behind it."""
    if target.partition("[")[0] not in TARGETS:
        raise ValueError(f"expected {', '.join(TARGETS)}, or one of these with [NAME] of a further set of questions")
    return target


class ExperimentConfig(Config):
    """One dataset, in this process, without a cluster."""

    file: CliPositionalArg[DatasetLocation] = Field(
        description="a dataset file, a folder of shards, or hf://datasets/org/name[@revision][/config][:split]"
    )


class MmluConfig(EvaluationConfig):
    """Evaluate a model and its adapters on MMLU."""

    adapter: Annotated[CliVariadicArg[list[LocalPath]], NoDecode, BeforeValidator(split_commas)] = Field(
        [], description="folders of PEFT adapters"
    )


class FeaturesConfig(Config):
    """Measure the features of every dataset of a folder."""

    model_config = SettingsConfigDict(cli_shortcuts={"model": "model-path", "data-folder": "data-dir"})

    output: Location = Field(
        Path("results/features"), description="folder for rows, logs and what a rerun resumes from"
    )
    data_folder: DatasetLocation | None = Field(
        None, description="folder of dataset files, or hf://datasets/org/name (or name a --chunk, or a --dataset)"
    )
    single_dataset: DatasetLocation | None = Field(
        None, description="one dataset file, a folder of its shards, or hf://datasets/org/name of the hub"
    )
    output_csv: LocalPath | None = Field(None, description="CSV file that grows with every dataset")
    describe: bool = Field(False, description="print every column with its definition, unit and range, and stop")


class RankConfig(Config):
    """Predict what training on each dataset would do, and in which order to train."""

    predictor: LocalPath = Field(Path("results/predictor"), description="folder or file that raylora.predict fit wrote")
    budget: int | None = Field(None, ge=1, description="trainings that can be paid for (default: all)")
    coverage: float | None = Field(None, gt=0, lt=1, description="of the intervals (default: the predictor's)")


class FitConfig(Settings):
    """Fit a predictor to a table of finished runs, and measure it on rows it has not seen."""

    table: CliPositionalArg[LocalPath] = Field(description="folder of a run, its results.csv, or any such table")
    target: Annotated[str, AfterValidator(_check_target)] = Field(
        "overall_accuracy",
        description=f"what is predicted: {', '.join(TARGETS)}, or that of a further set of questions, "
        "accuracy_change[NAME]",
    )
    group: str | None = Field(
        None, description="column whose rows stay together in validation (none: no such; default: the dataset's)"
    )
    leave_out: Annotated[tuple[str, ...], NoDecode, BeforeValidator(split_commas)] = Field(
        (),
        description="groups (text, semantic, perplexity, dynamic, static, hyperparameters) or columns not to use",
    )
    coverage: float = Field(0.9, gt=0, lt=1, description="share of outcomes that intervals are to hold")
    folds: int = Field(5, ge=3, le=50, description="outer folds of the cross-validation")
    seed: int = Field(0, ge=0, le=2**32 - 2, description="of folds and forests")
    threads: int | None = Field(None, ge=1, description="processes that fit folds (default: one a core)")
    output: LocalPath = Field(Path("results/predictor"), description="folder for the predictor")

    not_from_environment = frozenset({"output"})


class PredictConfig(Settings):
    """Predict the outcome for every row of a table, with intervals."""

    predictor: CliPositionalArg[LocalPath] = Field(description="what fit wrote")
    table: CliPositionalArg[LocalPath] = Field(description="folder of a run, its results.csv, or any such table")
    coverage: float | None = Field(None, gt=0, lt=1, description="of the intervals (default: what it was fitted with)")
    output: LocalPath | None = Field(None, description="CSV file for the predictions")

    not_from_environment = frozenset({"output"})


class ExplainConfig(Settings):
    """What a predictor uses, how good it is on rows it has not seen, and what each feature is worth."""

    predictor: CliPositionalArg[LocalPath] = Field(description="what fit wrote")


class ReportConfig(Settings):
    """The page of a finished or half-finished run, written again."""

    folder: CliPositionalArg[LocalPath] = Field(description="a run's folder, such as results/chunk_001")
    price: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="price of a GPU-hour, in your currency, for the costs"
    )


class QuestionsConfig(Settings):
    """Get MMLU's test and dev questions from the Hugging Face hub (cais/mmlu)."""

    output: LocalPath = Field(Path("mmlu_dataset"), description="folder for the two files")
    revision: str = Field("main", description="the dataset's branch, tag or commit on the hub")

    not_from_environment = frozenset({"output"})


class MergeConfig(Settings):
    """A plain model out of an adapter and its base, that needs no PEFT: safetensors, tokenizer, chat template."""

    folder: CliPositionalArg[LocalPath] = Field(description="folder of a PEFT adapter, or of a run's experiment")
    output: LocalPath | None = Field(None, description="folder for the model (default: results/merged/<adapter>)")
    model: str | None = Field(
        None, description="the base: a folder, a hub name, a .gguf file (default: what the adapter names)"
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")

    # MODEL_NAME is of the next run's base, which need not be this adapter's.
    not_from_environment = frozenset({"output", "model"})


class SchemaConfig(Settings):
    """The JSON schema of the YAML file of --config, for editors."""


class CompletionConfig(Settings):
    """A script that completes commands, options and files of raylora at a shell's prompt."""

    shell: CliPositionalArg[Literal["bash", "zsh"]] = Field(description="bash or zsh")
