"""What a run will do, checked before anything starts: its experiments, their identities, and which are done."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raylora.config.method import AUTO, LORA_TARGETS, Method
from raylora.config.options import FeatureOptions
from raylora.config.run import Config, longest_record
from raylora.data import datasets
from raylora.data.columns import check_columns
from raylora.data.record_stream import shown_path
from raylora.errors import ErrorKind, UserError
from raylora.experiment.held_out import Column, write_columns
from raylora.mmlu.evaluator import check_prompt_style, note_on_thinking
from raylora.mmlu.question_set import RENDERING, QuestionSet, load_question_set, model_key, questions_key, score_key
from raylora.model.adapter_files import adapter_hash
from raylora.model.loading import check_tokenizer, check_window, tokenizer_for
from raylora.model.lora_config import OF_ADAPTER, adapted_with, check_options, going_on
from raylora.model.sources import quiet_libraries, resolve_model
from raylora.model.targets import Adapted, resolve, skeleton
from raylora.planning.estimate import Estimator
from raylora.planning.hardware import check_fp8_here
from raylora.planning.names import NamedDataset, is_utf8, name_datasets, place_text, printable
from raylora.planning.transfer import left_out_key, with_transfer
from raylora.records import Experiment, ResultRow, digest
from raylora.storage.csv_files import read_csv
from raylora.storage.hub import check_push
from raylora.storage.hub_names import DatasetPlace
from raylora.storage.places import open_regular, reading
from raylora.storage.remote_store import store_at
from raylora.storage.store import Store, safe_name

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_CHUNK = "chunk_demo"
NO_CHUNK = "datasets"
"""The name of a run of ``--dataset`` alone."""


@dataclass(frozen=True)
class Plan:
    """Experiments in the order in which they start, and where their results go."""

    config: Config
    chunk: str
    store: Store
    experiments: tuple[Experiment, ...]
    hashes: dict[str, str]
    """SHA-256 of ``model`` and, if MMLU is scored, of ``questions``."""
    notes: list[str]
    """Warnings that do not stop the run."""
    num_questions: int = 0
    """Questions of the first set, MMLU, that each model is asked; 0 without MMLU."""
    num_further: dict[str, int] = field(default_factory=dict)
    """The same of each further set, by its name."""
    adapted: tuple[Adapted, ...] = ()
    """What gets an adapter with each of the run's target modules; empty where the model's layers are not known."""
    misfit: str = ""
    """Why this machine cannot train the model at all; empty if it can. It stops a run that has anything to do."""
    columns: tuple[Column, ...] = ()
    """The datasets on whose held-out examples adapters are scored; none without ``--transfer``."""

    def write_columns(self) -> None:
        """Store what the workers must know of the other experiments' datasets; before any of them is run."""
        if self.columns:
            write_columns(self.store, self.experiments[0].transfer_key, self.columns)

    def check_fit(self) -> None:
        """To be called before anything is run.

        Raises:
            UserError: the model does not fit this machine.
        """
        if self.misfit:
            raise UserError(self.misfit, kind=ErrorKind.DOES_NOT_FIT)

    def done(self) -> dict[str, ResultRow]:
        """Rows of earlier runs, by experiment id, that this run does not make again."""
        if self.config.fresh:
            return {}
        rows, by_id = self.stored_rows(), {e.experiment_id: e for e in self.experiments}
        return {name: row for name, row in rows.items() if not row.ok or not self._is_damaged(by_id[name])}

    def _is_damaged(self, experiment: Experiment) -> bool:
        """Whether what the end of a run reads of a finished experiment is damaged: scores, and an adapter to be pushed.

        All other adapters are read when somebody uses them: 170 MB each.
        """
        will_push = bool(self.config.hub_repository) and self.store.read_pushed(experiment) is None
        stages = {"mmlu", "transfer", "train"} if will_push else {"mmlu", "transfer"}
        return any(self.store.is_damaged(experiment, name) for name in sorted(stages & experiment.origins.keys()))

    def stored_rows(self) -> dict[str, ResultRow]:
        """Rows by experiment id that are in the store now, without failed ones that are to be tried again."""
        rows = self.store.read_rows(self.experiments)
        return {experiment_id: row for experiment_id, row in rows.items() if row.ok or not self.config.retry_failed}


def make_plan(config: Config, files: Sequence[DatasetPlace], chunk: str) -> Plan:
    """Check everything that can be checked without loading the model, and name every experiment.

    Datasets of the hub are downloaded.

    Raises:
        UserError: nothing can be run. A bad dataset file raises nothing: its experiments carry the error.
    """
    quiet_libraries()
    check_trackers(config)
    check_columns(config.column_names)
    if config.hub_repository:
        check_push("--push-to-hub", config.hub_repository)
    check_fp8_here(config)
    source = resolve_model(config.model)
    if set(config.stages) & {"features", "train"}:
        check_window(config, source, max(method.max_length for method in config.grid_methods()))
    store = store_at(config.output / safe_folder(chunk))
    model_settings = model_key(config, source)
    hashes = {"model": model_settings["model"]}
    question_settings: dict[str, dict[str, Any]] = {}
    question_sets: dict[str, QuestionSet] = {}
    notes: list[str] = []
    if "mmlu" in config.stages:
        thinking = check_prompt_style(config, source)
        for name in config.question_sets:
            question_sets[name] = found = load_question_set(config, name)
            hashes[f"questions[{name}]" if name else "questions"] = found.hash
            question_settings[name] = questions_key(config, found, thinking)
            notes += found.notes
        notes += filter(None, [note_on_thinking(thinking)])
    bare = skeleton(source, config.trust_remote_code)
    if bare is not None:
        check_tokenizer(tokenizer_for(config, source), bare, config.model)
    methods = planned_methods(config, bare, source)
    adapted = tuple(dict.fromkeys(filter(None, methods.values())))
    notes += filter(None, [found.note for found in adapted])
    named = name_datasets(files)
    num_experiments = min(len(named) * len(methods), config.max_experiments or 2**62)
    estimator = Estimator(config, source, list(question_sets.values()), num_experiments, bare)
    notes += filter(None, [estimator.note])
    masked = question_sets[""].masked if config.mask and question_sets else None
    shared = (model_settings, question_settings, masked, estimator, config, methods)
    experiments = [e for dataset in named for e in _experiments_of(dataset, *shared)]
    if experiments and all(e.is_missing for e in experiments):
        raise UserError(experiments[0].error, kind=ErrorKind(experiments[0].error_kind))
    # Largest first, so that at the end no worker is busy alone with a large one (in a simulation of 1,000 GPUs the
    # longest dataset bounds the run: benchmarks/NOTES.md). Ids break ties, so that the order is always the same.
    experiments.sort(key=lambda e: (-e.num_tokens * float(e.settings["num_epochs"]), e.experiment_id))
    if ranks := read_order(config.order):
        experiments.sort(key=lambda e: ranks.get(e.experiment_id, ranks.get(e.dataset, len(ranks))))
    experiments = experiments[: config.max_experiments]
    columns: tuple[Column, ...] = ()
    if config.has_transfer:
        experiments, columns = with_transfer(experiments, config, digest(model_settings), estimator)
    sizes = {name: len(question_set.questions) for name, question_set in question_sets.items()}
    num_first = sizes.pop("", 0)
    return Plan(
        config,
        chunk,
        store,
        tuple(experiments),
        hashes,
        notes,
        num_questions=num_first,
        num_further=sizes,
        adapted=adapted,
        misfit=estimator.misfit,
        columns=columns,
    )


def planned_methods(config: Config, model: Any | None, source: str = "") -> dict[Method, Adapted | None]:
    """The hyperparameters of the run's experiments, with names in place of ``auto``, and what gets an adapter.

    Args:
        model: a skeleton; None where there is none: ``auto`` is then Llama's seven names.
        source: where it is loaded from.

    Raises:
        UserError: nothing of the model would get an adapter, or options of it do not go with each other.
    """
    needed = bool(set(config.stages) & {"train", "mmlu"} or config.probe_steps)
    methods: dict[Method, Adapted | None] = {}
    found: dict[str, Adapted] = {}
    for method in config.grid_methods():
        check_options(method, config.quantization, bool(config.max_memory))
        if method.init_adapter:
            given = {*config.model_fields_set, *config.grid}
            if model is not None:
                method = method.model_copy(update={"target_modules": resolve(model, method.target_modules)})
            method = going_on(method, given, source)
        if model is None:
            names = tuple(name for n in method.target_modules for name in (LORA_TARGETS if n == AUTO else (n,)))
            methods.setdefault(method.model_copy(update={"target_modules": names}))
            continue
        key = digest([getattr(method, name) for name in (*OF_ADAPTER, "init_adapter")] + [method.lora_dropout > 0])
        if needed and key not in found:
            found[key] = adapted_with(model, method, source, config.quantization)
        names = found[key].target_modules if needed else resolve(model, method.target_modules)
        methods.setdefault(method.model_copy(update={"target_modules": names}), found.get(key))
    return methods


def _experiments_of(
    named: NamedDataset,
    model_settings: dict[str, Any],
    question_settings: dict[str, dict[str, Any]],
    masked: frozenset[str] | None,
    estimator: Estimator,
    config: Config,
    methods: Mapping[Method, Adapted | None],
) -> list[Experiment]:
    """The experiments of one dataset: one for each set of hyperparameters of the grid, and each seed.

    Args:
        question_settings: from ``questions_key``, by the name of a set of questions; empty without MMLU.
        masked: ids of the questions that ``--mask`` leaves out; None without it.
        methods: from ``planned_methods``.
    """
    place, dataset = named.place, named.name
    survey = datasets.survey(place, config.salvage, config.max_records, config.column_names, config.max_record_chars)
    error, error_kind = survey.error, survey.error_kind
    if not error and (why := estimator.template_error(survey.sample)):
        error, error_kind, survey.sample = f"{shown_path(place)}: {why}", ErrorKind.CHAT_TEMPLATE, []
    if not is_utf8(place):
        dataset, error = printable(dataset), f"{printable(str(place))}: its name is not UTF-8: rename it"
        error_kind = ErrorKind.DATA
    rendering = {key: model_settings[key] for key in RENDERING if key in model_settings}
    loading = {key: value for key, value in model_settings.items() if key not in {"model", "schema", *RENDERING}}
    of_questions = {"questions": digest(question_settings.get("", {}))}
    of_questions |= {f"questions {name}": digest(settings) for name, settings in question_settings.items() if name}
    if masked is not None:
        of_questions["mask"] = digest(sorted(masked))
    base_keys = {name: score_key(model_settings, settings) for name, settings in question_settings.items()}
    first_seed, experiments = config.seeds[0], []
    columns = [*([config.column_names] if config.columns else []), *longest_record(config)]
    for method, adapted in methods.items():
        settings, identity = method.model_dump(mode="json"), method.identity()
        init_adapter = {}
        if method.init_adapter:
            identity["init_adapter"] = adapter_hash(Path(method.init_adapter))
            init_adapter = {"init adapter": identity["init_adapter"]}
        hyperparameters = {name: value for name, value in identity.items() if name != "seed"}
        train = {
            # --salvage is not part of it: a whole file gives the same examples with it, and a broken file gives none
            # without it. The False stands where it was once, so that earlier results keep their hash.
            # So do columns that are not named: nothing of them is in it.
            "data": digest([survey.data_hash, False, config.max_records, *columns]),
            "model": model_settings["model"],
            "quantization": digest(loading),
            "hyperparameters": digest(hyperparameters),
            "seed": str(method.seed),
            "raylora": str(model_settings["schema"]),
            **({"date or special tokens": digest(rendering)} if rendering else {}),
            **init_adapter,
        }
        # Features are of the dataset: they have the run's seed, the same for all trainings of it.
        of_features = {"seed": str(config.seed), "feature options": digest(config.settings_of(FeatureOptions))}
        features = {**train, **of_features}
        if config.has_transfer:
            train["held out"] = left_out_key(config)
        origins = {
            "features": features,
            "train": train,
            "mmlu": {**train, **of_questions},
        }
        stages = [stage for stage in config.stages if stage != "features" or method.seed == first_seed]
        sizes, estimate = estimator.of(survey.sample, survey.num_examples, survey.num_chars, method, stages, adapted)
        # An adapter that was trained on fewer examples is another one.
        transfer = ["transfer"] if config.has_transfer else []
        of_run = (identity, model_settings, config.max_records, config.seed, *columns, *transfer)
        name = safe_name(*named.identity, *of_run)
        experiments.append(
            Experiment(
                experiment_id=name,
                dataset=dataset,
                path=place_text(survey.pinned or place),
                settings=settings,
                identity=digest([origins, sorted(config.stages), error]),
                origins=origins,
                base_key=base_keys.get("", score_key(model_settings, {})),
                set_keys={name: key for name, key in base_keys.items() if name},
                data_hash=survey.data_hash,
                num_examples=survey.num_examples,
                num_tokens=sizes.num_tokens,
                estimated_peak_memory_bytes=estimate.peak_memory_bytes,
                estimated_seconds=estimate.seconds,
                num_adapted_modules=None if adapted is None else len(adapted.modules),
                modules_without_adapter=None if adapted is None else ",".join(adapted.without),
                error=error,
                error_kind=error_kind,
                record_form=survey.record_form,
                ignored_keys=survey.ignored_keys,
                template_note=sizes.in_template.note_on_sample,
                dataset_source=str(survey.pinned or ""),
            )
        )
    return experiments


def safe_folder(chunk: str) -> str:
    """The name of a chunk's output folder: the chunk's own if that is safe on every file system."""
    plain = chunk.replace("_", "").replace("-", "")
    return chunk if plain.isascii() and plain.isalnum() and len(chunk) <= 80 else safe_name(chunk)


def find_files(config: Config) -> tuple[str, list[DatasetPlace]]:
    """The chunk's name, its dataset files, and those of ``--dataset``: the first ``config.limit`` of them.

    Raises:
        UserError: neither a chunk nor a dataset is named, or there is no such chunk (the message lists the chunks), or
            it holds no dataset.
    """
    if config.chunk is None and config.dataset:
        return NO_CHUNK, _in_order(config, config.dataset)
    with reading(config.data_root):
        return _find_files(config)


def _find_files(config: Config) -> tuple[str, list[DatasetPlace]]:
    if config.chunk is None:
        names = ", ".join(c.name for c in datasets.list_chunks(config.data_root)) or "none"
        raise UserError(f"--chunk: name one of {config.data_root}: {names} (or {DEMO_CHUNK}), or give a --dataset")
    if config.chunk == DEMO_CHUNK and not (config.data_root / DEMO_CHUNK).is_dir():
        folder = DEMO_FOLDER / DEMO_CHUNK
    else:
        folder = datasets.find_chunk(config.data_root, config.chunk)
    return folder.name, _in_order(config, [*datasets.list_dataset_files(folder), *config.dataset])


def _in_order(config: Config, places: Sequence[DatasetPlace]) -> list[DatasetPlace]:
    """The places in the order of ``--order``, the first ``--limit`` of them."""
    if ranks := read_order(config.order):
        named = name_datasets(places)
        named.sort(key=lambda d: ranks.get(d.place.name, ranks.get(d.name, ranks.get(d.identity[0], len(ranks)))))
        places = [dataset.place for dataset in named]
    return list(places[: config.limit])


def read_order(path: Path | None) -> dict[str, int]:
    """The position, from 0, of each dataset and each experiment id in a CSV with such columns (``raylora.rank``).

    Raises:
        UserError: the file cannot be read, or has no column ``dataset``.
    """
    if path is None:
        return {}
    try:
        with open_regular(path) as file:
            table = read_csv(file, dtype=str, keep_default_na=False)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())[:200]
        raise UserError(f"--order {path}: no CSV table can be read from it: {reason}") from None
    if "dataset" not in table:
        raise UserError(f"--order {path}: no column dataset; it is made by python -m raylora.rank")
    names = [table[column] for column in ("experiment_id", "dataset") if column in table]
    # Reversed, so that a name that comes twice keeps its first position.
    return {name: rank for column in names for rank, name in reversed(list(enumerate(column)))}


NEEDS = {"mlflow": ("mlflow",), "tensorboard": ("tensorboard",), "wandb": ("wandb",)}
"""Packages by tracker; each tracker is an extra of the same name."""


def check_trackers(config: Config) -> None:
    """Check that the packages of the chosen trackers are installed.

    Raises:
        UserError: one is not; the message says how to install it.
    """
    for name in config.trackers:
        missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"--trackers {name}: the package {missing[0]} is missing: pip install 'raylora[{name}]'")
