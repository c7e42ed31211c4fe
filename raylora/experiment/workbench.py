"""What all experiments of one process share: the base model, the questions, the store."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd
import torch

from raylora.config.run import Config, longest_record, method_of
from raylora.data import datasets
from raylora.data.encoding import StoredEncoded, encode_each
from raylora.data.held_out import leave_out
from raylora.data.rendered import TemplateCounts, count_in_template
from raylora.data.template_check import hold_to_counts
from raylora.errors import BaseChangedError, DatasetError, ErrorKind, MachineError, UserError
from raylora.mmlu.evaluator import Evaluator
from raylora.mmlu.question_set import model_key
from raylora.model.adapter_files import adapter_hash, check_adapter
from raylora.model.adapters import LoadedModel
from raylora.model.sources import model_hash, resolve_model
from raylora.records import Dataset, Example, Experiment, digest, digests_of
from raylora.storage.atomic import write_atomically, write_text
from raylora.storage.csv_files import write_csv
from raylora.storage.damage import read_sealed
from raylora.storage.digests import seal
from raylora.storage.hub_names import DatasetPlace, HubDataset, dataset_location
from raylora.storage.store import Store
from raylora.texts import LineFormatter
from raylora.training.gradients import Job
from raylora.training.loop import TrainingResult

log = logging.getLogger("raylora.experiment")


class Planned(Protocol):
    """What a plan says of a dataset file."""

    @property
    def path(self) -> str: ...
    @property
    def data_hash(self) -> str: ...


class Encoded(NamedTuple):
    """A dataset and its examples as token ids, in its order."""

    dataset: Dataset
    max_length: int
    examples: StoredEncoded


class Workbench(Evaluator):
    """What all experiments of one process share: the base model and the encoded questions, each loaded once.

    Attributes:
        held_out: tables of ``held_out.held_out_sets`` by their keys.
        encoded: what ``load_planned_dataset`` has encoded, until a training takes it.
    """

    def __init__(self, config: Config, store: Store, loaded: LoadedModel | None = None) -> None:
        super().__init__(config, store, loaded)
        self.config: Config = config
        self.held_out: dict[str, pd.DataFrame] = {}
        self.encoded: Encoded | None = None
        self._base_hash = self._logits_hash = self._model_hash = ""

    @cached_property
    def model_key(self) -> str:
        """Identity of the base model and its tokenizer, and of the options of a tokenizer's text."""
        try:
            return digest(model_key(self.config, resolve_model(self.config.model)))
        except UserError as error:
            raise MachineError(str(error), kind=error.kind) from error

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model, loaded when it is first needed.

        Raises:
            MachineError: it cannot be found or read on this machine; the command checked only its own.
        """
        try:
            loaded = super().loaded
        except UserError as error:
            raise MachineError(str(error), kind=error.kind) from error
        self._base_hash, self._logits_hash = loaded.base_hash(), loaded.logits_hash()
        return loaded

    def check_model(self, experiment: Experiment) -> None:
        """Check that the model that was loaded is the one that the run was planned with.

        Raises:
            MachineError: it is not: its folder was changed since, or this machine has another model at that path.
        """
        source = self.loaded.source
        if not self._model_hash:
            self._model_hash = model_hash(source, self.config.trust_remote_code)
        if any(self._model_hash != origin["model"] for origin in experiment.origins.values()):
            raise changed_meanwhile(source)

    def check_base(self) -> None:
        """Check that the base is what it was when it was loaded, in its weights and its logits: no stage may change it.

        While an adapter that is more than LoRA is attached, only the logits are looked at: such a one may have some of
        the base's weights changed, until it is detached.

        Raises:
            BaseChangedError: it is not. What was made with the base must not be kept.
        """
        loaded = self.loaded
        hash_of, before = loaded.base_hash, self._base_hash
        if not loaded.has_plain_adapters:
            hash_of, before = loaded.logits_hash, self._logits_hash
        new_hash = hash_of()
        # Twice: a changed base gives the same new hash again, a device with nondeterministic kernels another one.
        if new_hash != before and new_hash == hash_of():
            raise BaseChangedError("the base model is not what it was when it was loaded")


def load_planned_dataset(bench: Workbench, planned: Planned, max_length: int = 0) -> Dataset:
    """A dataset of the run, checked to be the one that it was planned with, without what the chat template refuses.

    Args:
        planned: an experiment on it, or its column of ``--transfer``.
        max_length: tokens of an example in the training that comes next, if one does: what is encoded here is kept
            for it.

    Raises:
        UserError: the chat template refuses all of it, or cuts most of its answers.
        MachineError: the file cannot be read on this machine, or its content is another one; a DatasetError where
            that says nothing of other datasets.
    """
    path, config = dataset_location(planned.path), bench.config
    try:
        options = (config.salvage, config.max_records, config.column_names, config.max_record_chars)
        dataset = datasets.read_dataset(path, *options)
    except UserError as error:
        raise _unreadable(path, error) from error
    if dataset.data_hash != planned.data_hash:
        raise DatasetError(str(changed_meanwhile(planned.path)), kind=ErrorKind.CHANGED_MEANWHILE)
    return _hold_to_template(bench, dataset, path, max_length)


def _unreadable(path: DatasetPlace, error: UserError) -> MachineError:
    """The error of a dataset that could be read when the run began. One that is gone takes no other one with it, unless
    its folder is gone too, or empty, as that of a mount is whose disk went away."""
    if not isinstance(path, HubDataset):
        with contextlib.suppress(Exception):  # clients of object stores raise errors of their own: nothing can be read
            if path.exists():
                return DatasetError(str(error), kind=error.kind)
            if any(path.parent.iterdir()):
                text = f"{path}: gone since the run began: put it back, and run the same command again"
                return DatasetError(text, kind=ErrorKind.DATASET_GONE)
    return MachineError(str(error), kind=error.kind)


def _hold_to_template(bench: Workbench, dataset: Dataset, path: DatasetPlace, max_length: int) -> Dataset:
    """The dataset without what the chat template refuses; the first to ask for it renders it, others read the counts.

    Args:
        max_length: see ``load_planned_dataset``.
    """
    columns, max_chars = bench.config.column_names, bench.config.max_record_chars
    limits = [bench.config.max_records, *longest_record(bench.config)]
    key = digest(["template", dataset.data_hash, columns, *limits, bench.model_key])
    file = bench.store.base_file(key, "template.json")
    with bench.store.base_lock(key, "template"):
        bench.store.fetch(file)
        kept = _kept_counts(read_sealed(file))
    if kept is not None:
        return hold_to_counts(dataset, kept, path, columns, max_chars)
    counts, tokenizer = TemplateCounts(), bench.loaded.tokenizer
    encoded: StoredEncoded | None = None
    if max_length:
        encoded = StoredEncoded(encode_each(tokenizer, dataset.examples, max_length, counts))
    else:
        count_in_template(tokenizer, dataset.examples, counts)
    with bench.store.base_lock(key, "template"):
        write_text(file, seal(asdict(counts)))
        bench.store.share(file)
    held = hold_to_counts(dataset, counts, path, columns, max_chars)
    if encoded is not None:
        bench.encoded = Encoded(held, max_length, encoded)
    return held


def _kept_counts(saved: dict[str, Any] | None) -> TemplateCounts | None:
    """What ``_hold_to_template`` has kept; None where that is nothing, or nothing that can be used."""
    try:
        refused = {int(number): text for number, text in (saved or {})["refused"].items()}
        return TemplateCounts(**{**(saved or {}), "refused": refused})
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def changed_meanwhile(place: str | Path) -> MachineError:
    """The error of a place whose content is not what the run was planned with."""
    text = f"{place}: not what it was when the run began: run the same command again"
    return MachineError(text, kind=ErrorKind.CHANGED_MEANWHILE)


def attach_job(bench: Workbench, experiment: Experiment, dataset: Dataset, name: str = "default") -> Job:
    """Attach a fresh adapter to the base. Returns it with the encoded examples and settings of its training.

    Raises:
        UserError: the model has none of the target modules, or its chat template refuses the dataset.
    """
    method = method_of(experiment)
    seed = (dataset.seed ^ method.seed) % 2**62
    examples = leave_out(dataset, bench.config.seed)[1] if bench.config.has_transfer else dataset.examples
    # Ordered by content and seed: the file's order must not change what is learnt when.
    ordered = datasets.sample_examples(examples, 0, seed)
    encoded = _encode(bench, dataset, ordered, method.max_length)
    if method.init_adapter:
        _check_init_adapter(experiment, Path(method.init_adapter))
    return Job(bench.loaded.attach(method, seed, name, encoded), encoded, method, seed, name)


def _check_init_adapter(experiment: Experiment, folder: Path) -> None:
    """Check that the adapter whose training is continued is the one that the run was planned with.

    Raises:
        MachineError: it is not, or is not on this machine.
    """
    try:
        check_adapter(folder)
        found = adapter_hash(folder)
    except UserError as error:
        raise MachineError(str(error), kind=error.kind) from error
    if found != experiment.origins["train"]["init adapter"]:
        raise changed_meanwhile(folder)


def _encode(bench: Workbench, dataset: Dataset, ordered: Sequence[Example], max_length: int) -> StoredEncoded:
    """Examples of a dataset as token ids: those that were encoded when it was loaded, if they were."""
    encoded, bench.encoded = bench.encoded, None
    if encoded is None or encoded.dataset is not dataset or encoded.max_length != max_length:
        return StoredEncoded(encode_each(bench.loaded.tokenizer, ordered, max_length))
    numbers = {row.tobytes(): number for number, row in enumerate(digests_of(dataset.examples))}
    return encoded.examples.chosen([numbers[row.tobytes()] for row in digests_of(ordered)])


def keep_adapter(
    bench: Workbench, experiment: Experiment, result: TrainingResult, name: str = "default"
) -> dict[str, Any]:
    """Store a trained adapter and its loss curve. Returns the values of the train stage."""
    # First the marker of an earlier training, so that a kill in the next lines leaves none beside new files.
    bench.store.forget_stage(experiment, "train")
    curve = pd.DataFrame(result.loss_curve())
    write_atomically(bench.store.folder(experiment) / "loss_curve.csv", lambda p: write_csv(curve, p))
    write_atomically(bench.store.adapter_folder(experiment), lambda p: bench.loaded.save_adapter(p, name))
    return dict(vars(result.metrics))


@contextlib.contextmanager
def at_hand(store: Store, experiment: Experiment) -> Iterator[None]:
    """Inside, the experiment's finished stages are on this machine; afterwards other machines can get what is new."""
    store.take_out(experiment)
    try:
        yield
    finally:
        store.put_away(experiment)


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Inside, raylora's log goes to a file, at level INFO, and an exception with its traceback too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("raylora")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    except BaseException:
        log.exception("failed")
        raise
    finally:
        logger.removeHandler(handler)
        handler.close()


def use_threads(config: Config) -> None:
    """Apply ``--threads`` in a command that runs in its own process. A Ray worker gets a share of the cores instead."""
    if config.threads:
        torch.set_num_threads(config.threads)
