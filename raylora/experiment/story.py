"""The whole story of one dataset: features, training, MMLU, other datasets' losses, one row. Knows nothing of Ray.

A stage whose product is in the store is not run again; a new product is stored when its stage is finished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

from raylora.config.options import MASKED, FeatureOptions
from raylora.config.run import method_of
from raylora.errors import ErrorKind, UserError
from raylora.experiment.helping import score_key_of
from raylora.experiment.transfer import measure_transfer
from raylora.experiment.workbench import (
    Workbench,
    at_hand,
    attach_job,
    changed_meanwhile,
    keep_adapter,
    load_planned_dataset,
    log_file,
)
from raylora.features.pipeline import extract_features
from raylora.mmlu.row_values import score_values, set_values
from raylora.model.device import device_name
from raylora.records import (
    Dataset,
    Experiment,
    ProgressCallback,
    ProgressStage,
    ResultRow,
    Score,
    digest,
    ignore_progress,
)
from raylora.rows import error_row, make_row
from raylora.storage.atomic import write_text
from raylora.storage.damage import read_sealed
from raylora.storage.digests import seal
from raylora.storage.store import LOG
from raylora.training.loop import train_adapters

log = logging.getLogger("raylora.experiment")


def run_experiment(bench: Workbench, experiment: Experiment, progress: ProgressCallback = ignore_progress) -> ResultRow:
    """Run the stages of an experiment that are not done yet, and store its row.

    A mistake in the data, or a training that diverges, gives an error row. Any other error is raised, and no row is
    stored: the caller may try again.

    Raises:
        MachineError: this machine cannot read the model or the data; another one may.
        BaseChangedError: a stage changed the base; only a new process can go on.
    """
    started = time.perf_counter()
    with at_hand(bench.store, experiment), log_file(bench.store.folder(experiment) / LOG):
        try:
            values = _run_stages(bench, experiment, progress)
            row = make_row(bench.config, experiment, "ok", **values, total_seconds=time.perf_counter() - started)
        except UserError as error:
            log.error("%s", error)
            row = error_row(bench.config, experiment, str(error), error.kind)
        bench.store.write_row(experiment, row)
        log.info("finished: %s", row.values["status"])
    return row


def _run_stages(bench: Workbench, experiment: Experiment, progress: ProgressCallback) -> dict[str, Any]:
    if experiment.error:
        raise UserError(experiment.error, kind=ErrorKind(experiment.error_kind))
    stages = bench.config.stages
    progress(ProgressStage.LOAD, 0, 1)
    max_length = method_of(experiment).max_length if "train" in stages else 0
    dataset = load_planned_dataset(bench, experiment, max_length)
    values = _dataset_values(dataset) | {"device": device_name()}
    features: dict[str, Any] | None = {}
    if "features" in stages:
        # Where another worker is measuring them for another training of this dataset, this one trains first.
        features = _features(bench, experiment, dataset, progress, wait=False)
    if "train" in stages:
        values |= _stage(bench, experiment, "train", lambda: _train_adapter(bench, experiment, dataset, progress))
    if "train" not in stages and ("mmlu" in stages or bench.config.has_transfer):
        _check_adapter(bench, experiment)
    if "mmlu" in stages:
        values |= _stage(bench, experiment, "mmlu", lambda: _evaluate_mmlu(bench, experiment, progress))
    if bench.config.has_transfer:
        values |= _stage(bench, experiment, "transfer", lambda: measure_transfer(bench, experiment, progress))
    if features is None:
        features = _features(bench, experiment, dataset, progress, wait=True)
    assert features is not None
    return values | features


def _features(
    bench: Workbench, experiment: Experiment, dataset: Dataset, progress: ProgressCallback, wait: bool
) -> dict[str, Any] | None:
    """The values of the features stage. Trainings of a dataset with several seeds have them measured once.

    Returns:
        None if another worker is measuring them and ``wait`` is False.
    """

    def measure() -> dict[str, Any]:
        return _stage(bench, experiment, "features", lambda: _extract(bench, experiment, dataset, progress))

    if len(bench.config.seeds) == 1 or bench.store.read_stage(experiment, "features") is not None:
        return measure()
    store, key = bench.store, digest(experiment.origins["features"])
    path = store.base_file(key, "features.json")
    try:
        held = store.base_lock(key, "features").acquire(timeout=-1 if wait else 0)
    except TimeoutError:
        return None
    with held:
        store.fetch(path)
        if (saved := read_sealed(path)) is None:
            values = measure()
            write_text(path, seal(values))
            store.share(path)
            return values
        # No seconds of this row's: they are in the row of the experiment that measured.
        copied = {name: None if name.endswith("_seconds") else value for name, value in saved.items()}
        return _stage(bench, experiment, "features", lambda: copied)


def _stage(bench: Workbench, experiment: Experiment, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage's values: from the store, or made and stored."""
    if (saved := bench.store.read_stage(experiment, stage)) is not None:
        log.info("%s: done before", stage)
        return saved
    log.info("%s: started", stage)
    started = time.perf_counter()
    bench.check_model(experiment)
    values = make()
    bench.check_base()  # before the product counts as done: what a changed base made is not reused
    values[f"{stage}_seconds"] = time.perf_counter() - started
    bench.store.write_stage(experiment, stage, values)
    log.info("%s: %.1f s", stage, values[f"{stage}_seconds"])
    return values


def _extract(bench: Workbench, experiment: Experiment, dataset: Dataset, progress: ProgressCallback) -> dict[str, Any]:
    config = bench.config
    options = FeatureOptions(**config.settings_of(FeatureOptions))
    loaded, method = bench.loaded, method_of(experiment)
    return extract_features(loaded, dataset, method, options, loaded.feature_token_budget, config.seed, progress)


def _train_adapter(
    bench: Workbench, experiment: Experiment, dataset: Dataset, progress: ProgressCallback
) -> dict[str, Any]:
    try:
        (result,) = train_adapters(bench.loaded, [attach_job(bench, experiment, dataset)], progress)
        if isinstance(result, UserError):
            raise result
        return keep_adapter(bench, experiment, result)
    finally:
        bench.loaded.detach()


def _check_adapter(bench: Workbench, experiment: Experiment) -> None:
    if bench.store.read_stage(experiment, "train") is None:
        text = f"{experiment.dataset}: there is no trained adapter to evaluate: add train to --stages"
        raise UserError(text, kind=ErrorKind.ADAPTER)


def _evaluate_mmlu(bench: Workbench, experiment: Experiment, progress: ProgressCallback) -> dict[str, Any]:
    bench.store.forget_stage(experiment, "mmlu")
    values: dict[str, Any] = {}
    for name, base_key in experiment.base_keys.items():
        score, base = _evaluate_set(bench, experiment, name, progress)
        if name:
            values |= set_values(name, score, base, num_fewshot=bench.planned_questions(base_key).num_shots)
            continue
        values |= score_values(score, base)
        if bench.config.mask:
            masked = _planned_mask(bench, experiment)
            values |= set_values(MASKED, score.without(masked), base.without(masked))
    return values


def _planned_mask(bench: Workbench, experiment: Experiment) -> frozenset[str]:
    """Ids of the questions that ``--mask`` leaves out.

    Raises:
        MachineError: the mask is not the one that the run was planned with.
    """
    masked = bench.planned_questions(experiment.base_key).masked
    if digest(sorted(masked)) != experiment.origins["mmlu"]["mask"]:
        raise changed_meanwhile(str(bench.config.mask))
    return masked


def _evaluate_set(
    bench: Workbench, experiment: Experiment, name: str, progress: ProgressCallback
) -> tuple[Score, Score]:
    """The scores of the adapter and the base on one set of questions."""
    base_key = experiment.base_keys[name]
    # While another worker scores the base, this one does not wait, and evaluates its adapter first.
    base = bench.base_score(base_key, wait=False, progress=progress)
    bench.loaded.attach_saved(bench.store.adapter_folder(experiment))
    try:
        key, path = score_key_of(bench, experiment, name), bench.store.scores_path(experiment, name)
        score = bench.score(base_key, key, path, progress)
    finally:
        bench.loaded.detach()
    if base is None:
        base = bench.base_score(base_key, wait=True, progress=progress)
    assert base is not None
    return score, base


def _dataset_values(dataset: Dataset) -> dict[str, Any]:
    shown = [f"{bad.place}: {bad.reason}" for bad in dataset.bad_records[:5]]
    num_others = dataset.num_bad_records - len(shown)
    return {
        "num_examples": len(dataset.examples),
        "num_bad_records": dataset.num_bad_records,
        "num_lost_records": dataset.num_lost_records,
        "num_answers_cut": dataset.num_answers_cut,
        "template_note": dataset.template_note,
        "bad_records": "; ".join([*shown, f"and {num_others} more"] if num_others > 0 else shown),
    }
