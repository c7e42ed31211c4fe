"""What a run will do, worked out and checked before anything starts: experiments, identities, what is done."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from raylora.config import Config, FeatureOptions
from raylora.data import datasets
from raylora.errors import UserError
from raylora.mmlu.evaluator import check_prompt_style
from raylora.mmlu.question_set import QuestionSet, load_question_set, model_key, questions_key, score_key
from raylora.model.loading import check_window
from raylora.model.sources import quiet_libraries, resolve_model
from raylora.planning.estimate import Estimator
from raylora.records import Experiment, ResultRow, digest
from raylora.storage.places import reading
from raylora.storage.remote_store import store_at
from raylora.storage.store import Store, safe_name

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_CHUNK = "chunk_demo"


@dataclass(frozen=True)
class Plan:
    """Experiments in the order in which they start, and where their results go."""

    config: Config
    chunk: str
    store: Store
    experiments: tuple[Experiment, ...]
    hashes: dict[str, str]
    notes: list[str]
    """What is odd, and no reason to stop."""
    misfit: str = ""
    """Why the model can in no way be trained on this machine: a reason to stop where anything is left to do."""

    def check_fit(self) -> None:
        """To be called before anything is run here.

        Raises:
            UserError: the model does not fit.
        """
        if self.misfit:
            raise UserError(self.misfit)

    def done(self) -> dict[str, ResultRow]:
        """Finished rows by experiment id: those of earlier runs that this one need not do again."""
        return {} if self.config.fresh else self.stored_rows()

    def stored_rows(self) -> dict[str, ResultRow]:
        """Rows by experiment id that are in the store now, without failed ones that are to be tried again."""
        rows = self.store.read_rows(self.experiments)
        return {key: row for key, row in rows.items() if row.ok or not self.config.retry_failed}


def make_plan(config: Config, files: Sequence[Path], chunk: str) -> Plan:
    """Check everything that can be checked without loading the model, and name every experiment.

    Raises:
        UserError: nothing can be run. A single bad dataset file is no reason: its experiment carries the error.
    """
    quiet_libraries()
    check_trackers(config)
    source = resolve_model(config.model)
    if set(config.stages) & {"features", "train"}:
        check_window(config, source, max(method.max_length for method in config.grid_methods()))
    store = store_at(config.output / safe_folder(chunk))
    of_model = model_key(config, source)
    hashes = {"model": of_model["model"]}
    of_questions: dict[str, Any] = {}
    asked: QuestionSet | None = None
    notes: list[str] = []
    if "mmlu" in config.stages:
        asked = load_question_set(config)
        notes = asked.notes
        hashes["questions"] = asked.hash
        of_questions = questions_key(config, asked)
        check_prompt_style(config, source)
    estimator = Estimator(config, source, asked)
    shared = (of_model, of_questions, estimator, config)
    experiments = [e for path in files for e in _experiments_of(path, *shared)]
    # Largest first, so that the last worker is not busy alone; names break ties, so that the order is always the same.
    experiments.sort(key=lambda e: (-e.num_tokens * float(e.settings["num_epochs"]), e.experiment_id))
    if place := read_order(config.order):
        experiments.sort(key=lambda e: place.get(e.experiment_id, place.get(e.dataset, len(place))))
    experiments = experiments[: config.max_experiments]
    return Plan(config, chunk, store, tuple(experiments), hashes, notes, estimator.misfit)


def _experiments_of(
    path: Path, of_model: dict[str, Any], of_questions: dict[str, Any], estimator: Estimator, config: Config
) -> list[Experiment]:
    found = datasets.survey(path, config.salvage, config.max_records)
    dataset, error = path.stem, found.error
    if printable(path.name) != path.name:
        dataset, error = printable(path.stem), f"{printable(str(path))}: its name is not UTF-8: rename it"
    loading = {key: value for key, value in of_model.items() if key not in {"model", "schema"}}
    experiments = []
    for method in config.grid_methods():
        settings = method.model_dump(mode="json")
        train = {
            # Not --salvage, whose place the False holds: it changes nothing of a file that is whole, and without it one
            # that is not makes nothing.
            "data": digest([found.data_hash, False, config.max_records]),
            "model": of_model["model"],
            "quantization": digest(loading),
            "hyperparameters": digest(settings),
            "seed": str(config.seed),
            "raylora": str(of_model["schema"]),
        }
        origins = {
            "features": {**train, "feature options": digest(config.settings_of(FeatureOptions))},
            "train": train,
            "mmlu": {**train, "questions": digest(of_questions)},
        }
        sizes, estimate = estimator.of(found.sample, found.num_examples, found.num_chars, method)
        name = safe_name(dataset, printable(path.suffix), settings, of_model, config.max_records, config.seed)
        experiments.append(
            Experiment(
                experiment_id=name,
                dataset=dataset,
                path=printable(str(path.absolute())),
                settings=settings,
                identity=digest([origins, sorted(config.stages), error]),
                origins=origins,
                base_key=score_key(of_model, of_questions),
                data_hash=found.data_hash,
                num_examples=found.num_examples,
                num_tokens=sizes.num_tokens,
                estimated_peak_memory_bytes=estimate.peak_memory_bytes,
                estimated_seconds=estimate.seconds,
                error=error,
            )
        )
    return experiments


def printable(name: str) -> str:
    """A file's name as text that can be written: bytes of it that are not UTF-8 as ``\\xe9``."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def safe_folder(chunk: str) -> str:
    """A chunk's name as a folder of the output: as it is where that is safe."""
    plain = chunk.replace("_", "").replace("-", "")
    return chunk if plain.isascii() and plain.isalnum() and len(chunk) <= 80 else safe_name(chunk)


def find_files(config: Config) -> tuple[str, list[Path]]:
    """The chunk's name and its dataset files, as far as ``limit`` lets them.

    Raises:
        UserError: no chunk is named, or there is none by that name; the line lists those there are.
    """
    with reading(config.data_root):
        return _find_files(config)


def _find_files(config: Config) -> tuple[str, list[Path]]:
    if config.chunk is None:
        names = ", ".join(c.name for c in datasets.list_chunks(config.data_root)) or "none"
        raise UserError(f"--chunk: name one of {config.data_root}: {names} (or {DEMO_CHUNK})")
    if config.chunk == DEMO_CHUNK and not (config.data_root / DEMO_CHUNK).is_dir():
        folder = DEMO_FOLDER / DEMO_CHUNK
    else:
        folder = datasets.find_chunk(config.data_root, config.chunk)
    files = datasets.list_dataset_files(folder)
    if place := read_order(config.order):
        files.sort(key=lambda path: place.get(path.stem, len(place)))
    return folder.name, files[: config.limit]


def read_order(path: Path | None) -> dict[str, int]:
    """Places by dataset and by experiment, from a CSV with these columns; what is not in it comes last.

    Raises:
        UserError: it cannot be read, or has no column ``dataset``.
    """
    if path is None:
        return {}
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"--order {path}: no CSV table can be read from it: {reason}") from None
    if "dataset" not in table:
        raise UserError(f"--order {path}: no column dataset; it is made by python -m raylora.rank")
    names = [table[column] for column in ("experiment_id", "dataset") if column in table]
    return {name: place for column in names for place, name in reversed(list(enumerate(column)))}


NEEDS = {"mlflow": ("mlflow",), "tensorboard": ("tensorboard",), "wandb": ("wandb",)}
"""Packages by tracker; each tracker is an extra of the same name."""


def check_trackers(config: Config) -> None:
    """Before anything starts: are the packages there?

    Raises:
        UserError: one is not; the line says how to install it.
    """
    for name in config.trackers:
        missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"--trackers {name}: the package {missing[0]} is missing: pip install 'raylora[{name}]'")
