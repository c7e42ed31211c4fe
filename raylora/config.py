"""The configuration: every option declared once, with its help.

A YAML file, the environment (``RAYLORA_LEARNING_RATE=1e-4``, ``MODEL_NAME``), ``.env`` and the command line set the
same options, in rising order of strength. Unknown names and bad values end in one line that names the option.
"""

from __future__ import annotations

import difflib
import itertools
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    YamlConfigSettingsSource,
)

from raylora.files import Location, LocationText, RemoteError, without_secrets
from raylora.records import UserError

Stage = Literal["features", "train", "mmlu"]
TrackerName = Literal["mlflow", "tensorboard", "wandb"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEMO = "demo"
GPU_TOKEN_BUDGET = 16384
"""Tokens in a training minibatch on a GPU, until memory says no."""


def split_commas(value: Any) -> Any:
    return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


class Method(BaseModel):
    """How an adapter is trained. These are the hyperparameters a ``grid`` may vary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    lora_r: int = Field(16, ge=1, le=4096, description="rank of the LoRA adapter")
    lora_alpha: float = Field(32, gt=0, description="LoRA scaling: the update is alpha / r * B A")
    lora_dropout: float = Field(0.1, ge=0, lt=1, description="dropout on the adapter's input")
    target_modules: Annotated[tuple[str, ...], NoDecode] = Field(
        LORA_TARGETS, min_length=1, description="modules that get an adapter, separated by commas"
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

    _split = field_validator("target_modules", mode="before")(split_commas)


class ModelOptions(BaseModel):
    """Which base model, and how it lies in memory."""

    model: str | None = Field(
        None,
        description="base model: a folder, a hub name, a .gguf file, modelscope://org/model, or demo (also MODEL_NAME)",
    )
    quantization: Literal["none", "8bit", "4bit"] = Field("8bit", description="bitsandbytes: int8, nf4 or none")
    max_memory: dict[str, str] = Field(
        default_factory=dict,
        description='memory limit a device, what is over goes to the CPU: {"0":"20GiB","cpu":"60GiB"}',
    )
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")
    allow_pickle: bool = Field(False, description="read weights from pickle files too, where there is no safetensors")


class MmluOptions(BaseModel):
    """Which questions are asked, and how."""

    mmlu: LocationText | None = Field(
        None,
        description="questions: JSON, Parquet, CSV folder (a path, or s3://...), or demo "
        "(without one: mmlu_dataset/test_all_subjects.json)",
    )
    max_samples: int | None = Field(None, ge=1, description="questions asked: a seeded sample stratified by subject")
    num_fewshot: int = Field(0, ge=0, le=100, description="solved questions shown before each one")
    prompt_style: Literal["harness", "chat"] = Field("harness", description="lm-evaluation-harness' prompt, or a chat")
    scoring: Literal["logits", "generate"] = Field("logits", description="how an answer is read from the model")
    token_budget: int | None = Field(
        None,
        ge=64,
        description="padded tokens in a batch of questions (without one: what fits a GPU's memory, 512 on a CPU)",
    )


class FeatureOptions(BaseModel):
    """What is measured of a dataset."""

    sample_size: int = Field(100, ge=0, description="examples that features are measured on (0: all)")
    probe_steps: int = Field(20, ge=0, description="optimizer steps of the probe (0: no dynamic features)")


class CommonOptions(BaseModel):
    """What every command needs to know."""

    output: Location = Field(Path("results"), description="folder for the results, or s3://bucket/folder")
    threads: int | None = Field(None, ge=1, description="CPU threads a worker (default: cores / workers)")
    seed: int = Field(0, ge=0, description="mixed with the dataset's content into every seed")
    fresh: bool = Field(False, description="throw away what earlier runs finished")


class RunOptions(BaseModel):
    """What is run, and where."""

    chunk: str | None = Field(None, description="chunk folder by name, or by its number in the list")
    data_root: Location = Field(
        Path("train_data/merged_datasets"), description="folder that holds the chunk_* folders, or s3://bucket/folder"
    )
    stages: Annotated[tuple[Stage, ...], NoDecode] = Field(
        ("features", "train", "mmlu"), min_length=1, description="stages to run, separated by commas"
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description='several values a hyperparameter, all combinations: {"lora_r":[8,16]}'
    )
    num_workers: int | None = Field(None, ge=1, description="worker processes (default: one a GPU; without GPUs one)")
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

    _split = field_validator("stages", "trackers", mode="before")(split_commas)

    @field_validator("chunk", mode="before")
    @classmethod
    def _take_numbers(cls, chunk: Any) -> Any:
        """``chunk: 1`` in a YAML file is a number, and on the command line text."""
        return str(chunk) if type(chunk) is int else chunk

    @field_validator("address")
    @classmethod
    def _check_address(cls, address: str | None) -> str | None:
        """Ray Data does not run over Ray's client connection; and a run must not end with a laptop's network."""
        if address and address.startswith("ray://"):
            host = address.removeprefix("ray://").partition(":")[0] or "HOST"
            raise ValueError(
                "a run must be on the cluster, not beside it: forward its dashboard "
                f"(ssh -L 8265:localhost:8265 {host}), then "
                "ray job submit --address http://localhost:8265 -- python -m raylora.batch --address auto and the "
                "other options"
            )
        return address


class _Environment(EnvSettingsSource):
    """The variables that are ours; ``MODEL_NAME`` is another name for ``RAYLORA_MODEL``."""

    def __call__(self) -> dict[str, Any]:
        own = {*self.settings_cls.model_fields} - self.settings_cls.not_from_environment  # type: ignore[attr-defined]
        values = {name: value for name, value in super().__call__().items() if name in own}
        if "model" in own and (model := self.env_vars.get("model_name")):
            values.setdefault("model", model)
        return values


class _DotEnv(_Environment, DotEnvSettingsSource):
    """``.env``, which may hold settings of other programs too."""


_SETTINGS = SettingsConfigDict(
    env_prefix="RAYLORA_",
    env_file=".env",
    extra="forbid",
    frozen=True,
    cli_kebab_case=True,
    cli_implicit_flags=True,
    cli_exit_on_error=False,
    cli_hide_none_type=True,
    cli_avoid_json=True,
)


class Settings(BaseSettings):
    """Where options come from."""

    model_config = _SETTINGS
    not_from_environment: ClassVar[frozenset[str]] = frozenset()
    """Options that are another thing than those of the same name that all commands share."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Strongest first: arguments, ``.env``, the environment. Command line and YAML are put around them."""
        return init_settings, _DotEnv(settings_cls), _Environment(settings_cls)

    def settings_of(self, *groups: type[BaseModel]) -> dict[str, Any]:
        """The options of these groups as plain JSON values."""
        dump = self.model_dump(mode="json")
        return {name: dump[name] for group in groups for name in group.model_fields}


class EvaluationConfig(CommonOptions, ModelOptions, MmluOptions, Settings):
    """All options of an evaluation."""


class Config(RunOptions, FeatureOptions, Method, EvaluationConfig):
    """All options of one run."""

    model_config = _SETTINGS

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Every value of the grid is checked as the option it stands for."""
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

    def method(self) -> Method:
        return Method(**{name: getattr(self, name) for name in Method.model_fields})

    def grid_methods(self) -> list[Method]:
        """Every combination of the grid's values, each once, over the other settings; one where there is no grid."""
        base = self.method().model_dump()
        combinations = itertools.product(*self.grid.values())
        methods = (Method(**{**base, **dict(zip(self.grid, values, strict=True))}) for values in combinations)
        return list(dict.fromkeys(methods))


S = TypeVar("S", bound=Settings)


def load_config(argv: list[str] | None = None, prog: str = "python -m raylora.batch", **overrides: Any) -> Config:
    """The configuration of a run; see ``load_settings``."""
    return load_settings(Config, argv, prog, **overrides)


def load_settings(settings: type[S], argv: list[str] | None, prog: str, **overrides: Any) -> S:
    """The options of a command: YAML, environment, ``.env``, and ``argv`` (or ``overrides`` from Python).

    Raises:
        UserError: one line that names the option and what fits.
        SystemExit: 0, after ``--help``.
    """
    argv = list(argv or [])
    yaml_path, argv = _take_config_option(argv)
    yaml_values = _read_yaml(yaml_path) if yaml_path else {}
    variables = _read_variables(settings)

    class _Command(settings):  # type: ignore[valid-type, misc]
        model_config = SettingsConfigDict(cli_prog_name=prog)

        @classmethod
        def settings_customise_sources(
            cls, settings_cls: type[BaseSettings], *args: Any, **kwargs: Any
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            stronger = super().settings_customise_sources(settings_cls, *args, **kwargs)
            strongest = [CliSettingsSource[Any](settings_cls, cli_parse_args=argv)] if argv else []
            return (*strongest, *stronger, _YamlValues(settings_cls, yaml_values))

    _Command.__doc__ = settings.__doc__
    try:
        values = _Command(**overrides).model_dump()
    except ValidationError as error:
        raise UserError(_explain(settings, error, _place_of(error, argv, variables, yaml_path, yaml_values))) from None
    except SettingsError as error:
        raise UserError(_explain_settings_error(settings, error)) from None
    return settings.model_construct(**values)


class _YamlValues(YamlConfigSettingsSource):
    """Values of a YAML file that was read already."""

    def __init__(self, settings_cls: type[BaseSettings], values: dict[str, Any]) -> None:
        PydanticBaseSettingsSource.__init__(self, settings_cls)
        self._values = values

    def __call__(self) -> dict[str, Any]:
        return self._values


def _take_config_option(argv: list[str]) -> tuple[Path | None, list[str]]:
    """``--config FILE`` says where options come from; it is none itself."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise UserError("--config: name a YAML file, such as configs/demo.yaml")
            return Path(argv[i + 1]), argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return Path(word.partition("=")[2]), argv[:i] + argv[i + 1 :]
    return None, argv


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--config {path}: not UTF-8 at byte {error.start}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" line {mark.line + 1}, column {mark.column + 1}:" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"--config {path}:{place} not YAML: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"--config {path}: expected `option: value` lines, found a {type(values).__name__}")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _read_variables(settings: type[Settings]) -> Mapping[str, Collection[str]]:
    """The variables of ``.env`` and of the environment, in small letters, by where they stand; the strongest first.

    Raises:
        UserError: ``.env`` cannot be read, or a name is nearly one of ours: it would change nothing, silently.
    """
    try:
        dotenv = _DotEnv(settings).env_vars
    except UnicodeDecodeError as error:
        raise UserError(f".env: not UTF-8 at byte {error.start}") from None
    variables = {".env": dotenv, "the environment": _Environment(settings).env_vars}
    for place, names in variables.items():
        _check_names(place, names, settings)
    return variables


def _check_names(place: str, variables: Collection[str], settings: type[Settings]) -> None:
    """Variables with our prefix that are no options at all belong to another command, or to somebody else."""
    known = {*settings.model_fields, *Config.model_fields}
    for variable in variables:
        name = variable.removeprefix("raylora_")
        if name != variable and name not in known and (close := difflib.get_close_matches(name, known, 1, 0.8)):
            raise UserError(f"{variable.upper()} in {place}: no option; did you mean RAYLORA_{close[0].upper()}?")


def _closest(settings: type[Settings], name: str) -> str:
    close = difflib.get_close_matches(name, settings.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else "see --help for what there is"


def _place_of(
    error: ValidationError,
    argv: Sequence[str],
    variables: Mapping[str, Collection[str]],
    yaml_path: Path | None,
    yaml_values: Mapping[str, Any],
) -> str:
    """Where the value that does not fit stands, in the order of what is stronger; nothing for the command line."""
    name = str(error.errors()[0]["loc"][0]) if error.errors()[0]["loc"] else ""
    if any(word.partition("=")[0] == "--" + name.replace("_", "-") for word in argv):
        return ""
    given = [place for place, names in variables.items() if f"raylora_{name}" in names]
    return given[0] if given else str(yaml_path) if name in yaml_values else ""


def _explain(settings: type[Settings], error: ValidationError, place: str) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "extra_forbidden":
        return f"unknown option {name}{f' in {place}' if place else ''}: {_closest(settings, name)}"
    in_variable = place in {".env", "the environment"}
    flag = f"{place}: {f'RAYLORA_{name.upper()}' if in_variable else name}" if place else "--" + name.replace("_", "-")
    message = first["msg"].removeprefix("Value error, ")
    given = without_secrets(str(first["input"]))[:80]
    return " ".join(f"{flag}: {message[0].lower() + message[1:]}, got {given!r}".split())


def _explain_settings_error(settings: type[Settings], error: SettingsError) -> str:
    text = " ".join(str(error).split()).removeprefix("error parsing CLI: ")
    if "unrecognized arguments:" in text:
        word = text.partition("unrecognized arguments:")[2].split()[0]
        return f"unknown option {word}: {_closest(settings, word.lstrip('-').partition('=')[0].replace('-', '_'))}"
    # What is left are values that should be JSON: the library names the field, and not what would fit.
    if match := re.search(r'(?:encountered for |for field )"?(\w+)', text):
        return f"--{match[1].replace('_', '-')}: expected JSON: {settings.model_fields[match[1]].description}"
    return text


def main_with_one_line_errors(main: Any, argv: list[str] | None = None) -> None:
    """Run a command: a user's mistake, or an object store that says no, ends in one line on stderr and exit code 2."""
    try:
        code = main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"raylora: {error}", file=sys.stderr)
        code = 2
    except RemoteError as error:
        print(f"raylora: {error.strerror}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before there is anything to bring to an end
        print("Stopped.", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        code = 1
    sys.exit(code)
