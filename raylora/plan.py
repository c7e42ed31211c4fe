"""What a run will do, worked out and checked before anything starts: experiments, identities, what is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raylora import datasets
from raylora.config import DEMO, Config, FeatureOptions, Method, MmluOptions, ModelOptions
from raylora.mmlu import build_shots, find_dev_file, load_questions, questions_hash, select_questions
from raylora.model import load_tokenizer, model_hash, quiet_libraries, resolve_model
from raylora.records import SCHEMA_VERSION, Experiment, Question, ResultRow, UserError, digest
from raylora.store import Store, safe_name

DEMO_FOLDER = Path(__file__).parent / "demo"
DEMO_CHUNK = "chunk_demo"
DEFAULT_QUESTIONS = Path("mmlu_dataset/test_all_subjects.json")


@dataclass(frozen=True)
class Plan:
    """Experiments in the order in which they start, and where their results go."""

    config: Config
    chunk: str
    store: Store
    experiments: tuple[Experiment, ...]
    hashes: dict[str, str]

    def done(self) -> dict[str, ResultRow]:
        """Finished rows by experiment id: those of earlier runs that this one need not do again."""
        if self.config.fresh:
            return {}
        rows = {e.experiment_id: self.store.read_row(e) for e in self.experiments}
        return {key: row for key, row in rows.items() if row and (row.ok or not self.config.retry_failed)}


@dataclass(frozen=True)
class QuestionSet:
    """The questions of a run, and the solved ones shown before them, by subject."""

    questions: list[Question]
    shots: dict[str, list[Question]]


def find_questions(config: Config) -> Path:
    """The questions' file or folder.

    Raises:
        UserError: it is not there.
    """
    if config.mmlu == DEMO:
        return DEMO_FOLDER / "questions.json"
    path = Path(config.mmlu).expanduser() if config.mmlu else DEFAULT_QUESTIONS
    if not path.exists():
        raise UserError(f"MMLU questions: {path} is missing: give --mmlu FILE, or try --mmlu demo")
    return path.absolute()


def load_question_set(config: Config) -> QuestionSet:
    """Questions and shots as the configuration asks for them.

    Raises:
        UserError: the file is missing or bad, or a subject has too few solved questions.
    """
    path = find_questions(config)
    questions = select_questions(load_questions(path), config.max_samples, config.seed)
    if config.num_fewshot == 0:
        return QuestionSet(questions, {})
    dev = find_dev_file(path)
    if dev is None:
        raise UserError(f"--num-fewshot {config.num_fewshot}: no dev questions beside {path} (dev_all_subjects.json)")
    subjects = sorted({q.subject for q in questions})
    return QuestionSet(questions, build_shots(load_questions(dev), subjects, config.num_fewshot))


def make_plan(config: Config, files: Sequence[Path], chunk: str) -> Plan:
    """Check everything that can be checked without loading the model, and name every experiment.

    Raises:
        UserError: nothing can be run. A single bad dataset file is no reason: its experiment carries the error.
    """
    quiet_libraries()
    source = resolve_model(config.model)
    store = Store(config.output / safe_folder(chunk))
    base_key = {
        **config.settings_of(ModelOptions),
        "model": model_hash(
            source, config.trust_remote_code
        ),  # not its name: a folder may have been moved, or its content changed
        "schema": SCHEMA_VERSION,
    }
    hashes = {"model": base_key["model"]}
    mmlu_key: dict[str, Any] = config.settings_of(MmluOptions)
    if "mmlu" in config.stages:
        asked = load_question_set(config)
        shots = [q for group in asked.shots.values() for q in group]
        hashes["questions"] = mmlu_key["mmlu"] = questions_hash([*asked.questions, *shots])
        if config.prompt_style == "chat" and not load_tokenizer(source, config.trust_remote_code).chat_template:
            raise UserError(f"--prompt-style chat: {config.model} has no chat template; use --prompt-style harness")
    mmlu_key.pop("token_budget")  # where batches are cut is no part of what is asked
    base_key.pop("max_memory")  # nor is where the weights lie
    shared = (base_key, mmlu_key, config)
    experiments = [e for path in files for e in _experiments_of(path, *shared)]
    # Largest first, so that the last worker is not busy alone; names break ties, so that the order is always the same.
    experiments.sort(key=lambda e: (-e.num_chars * float(e.settings["num_epochs"]), e.experiment_id))
    return Plan(config, chunk, store, tuple(experiments), hashes)


def _experiments_of(path: Path, base_key: dict[str, Any], mmlu_key: dict[str, Any], config: Config) -> list[Experiment]:
    data_hash, num_examples, num_chars, error = "", 0, 0, ""
    try:
        data_hash = datasets.file_hash(path)
        dataset = datasets.load_dataset(path, config.salvage, config.max_records)
        num_examples, num_chars = len(dataset.examples), dataset.total_chars
    except UserError as bad_file:
        error = str(bad_file)
    data_key = [data_hash, config.salvage, config.max_records, config.seed, base_key]
    experiments = []
    for method in config.grid_methods():
        settings = method.model_dump(mode="json")
        keys = {
            "features": digest([data_key, settings, config.settings_of(FeatureOptions)]),
            "train": digest([data_key, settings]),
            "mmlu": digest([data_key, settings, mmlu_key]),
            "base": digest([base_key, mmlu_key]),
        }
        name = safe_name(path.stem, path.suffix, settings, base_key, config.max_records, config.seed)
        experiments.append(
            Experiment(
                experiment_id=name,
                dataset=path.stem,
                path=str(path.absolute()),
                settings=settings,
                identity=digest([keys, sorted(config.stages), error]),
                keys=keys,
                data_hash=data_hash,
                num_examples=num_examples,
                num_chars=num_chars,
                error=error,
            )
        )
    return experiments


def safe_folder(chunk: str) -> str:
    """A chunk's name as a folder of the output: as it is where that is safe."""
    plain = chunk.replace("_", "").replace("-", "")
    return chunk if plain.isascii() and plain.isalnum() and len(chunk) <= 80 else safe_name(chunk)


def find_files(config: Config) -> tuple[str, list[Path]]:
    """The chunk's name and its dataset files, as far as ``limit`` lets them.

    Raises:
        UserError: no chunk is named, or there is none by that name; the line lists those there are.
    """
    if config.chunk is None:
        names = ", ".join(c.name for c in datasets.list_chunks(config.data_root)) or "none"
        raise UserError(f"--chunk: name one of {config.data_root}: {names} (or {DEMO_CHUNK})")
    if config.chunk == DEMO_CHUNK and not (config.data_root / DEMO_CHUNK).is_dir():
        folder = DEMO_FOLDER / DEMO_CHUNK
    else:
        folder = datasets.find_chunk(config.data_root, config.chunk)
    return folder.name, datasets.list_dataset_files(folder)[: config.limit]


def method_of(experiment: Experiment) -> Method:
    return Method(**experiment.settings)
