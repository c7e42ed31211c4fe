"""Options of the model, of the questions and of the features: what an experiment is made of besides its training."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_settings import NoDecode

from raylora.config.method import LARGEST_SEED
from raylora.config.sources import read_json, split_commas
from raylora.errors import UserError
from raylora.storage.places import LocationText, location

TEMPLATE_DATE = date(2024, 7, 26)
"""What chat templates take for today: the date that those of Llama 3.1 and 3.2 have where they are told none."""
MAX_RECORD_CHARS = 10_000_000
"""Characters of a record: a book has a million. In n-grams of words they take up to 100 times as much memory."""
DEMO = "demo"
"""The value of ``--model`` and ``--mmlu`` that stands for the demo's."""


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
