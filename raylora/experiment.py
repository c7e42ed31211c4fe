"""The whole story of one dataset: features, training, MMLU, one row. Knows nothing of Ray.

    python -m raylora.experiment FILE --model demo --mmlu demo

Each stage's product is taken from the store where it is there already, and put there when it is made.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from raylora import datasets, mmlu
from raylora.config import Config, FeatureOptions, Method, load_config, main_with_one_line_errors
from raylora.encoding import StoredEncoded, encode_each
from raylora.estimate import check_fit_here
from raylora.features.columns import FEATURE_NAMES
from raylora.features.pipeline import extract_features
from raylora.files import location
from raylora.model import LoadedModel, adapter_hash, device_name
from raylora.passes import Job, count_labels
from raylora.plan import make_plan, method_of
from raylora.records import (
    Dataset,
    Experiment,
    MachineError,
    Progress,
    ResultRow,
    Score,
    UserError,
    digest,
    ignore_progress,
)
from raylora.sources import model_hash
from raylora.store import LOG, Store, write_atomically
from raylora.train import (
    TrainingDivergedError,
    TrainingMetrics,
    TrainingResult,
    adapters_a_pass,
    train_adapters,
)
from raylora.watch import make_console

log = logging.getLogger("raylora.experiment")

RESULT_COLUMNS = (
    "dataset", "experiment_id", "status", "error", "overall_accuracy", "base_overall_accuracy", "accuracy_change",
    "accuracy_change_low", "accuracy_change_high", "mcnemar_p_value", "total_questions", "correct_questions",
    "base_correct_questions", "overall_stderr", "base_overall_stderr", "macro_accuracy", "base_macro_accuracy",
    "accuracy_stem", "accuracy_humanities", "accuracy_social_sciences", "accuracy_other", "num_unparsed",
    "base_num_unparsed", "num_truncated",
)  # fmt: skip
BOOKKEEPING_COLUMNS = (
    "model", "quantization", "device", "prompt_style", "scoring", "num_fewshot", "max_samples", "sample_size",
    "probe_steps", "seed", "data_hash", "num_examples", "num_bad_records", "num_lost_records", "bad_records",
    "token_budget", "mmlu_oom_backoffs", "text_seconds", "static_seconds", "probe_seconds", "features_seconds",
    "mmlu_seconds", "total_seconds", "estimated_seconds", "estimated_peak_memory_bytes", "num_attempts",
)  # fmt: skip
ROW_COLUMNS = [
    *RESULT_COLUMNS,
    *FEATURE_NAMES,
    *Method.model_fields,
    *TrainingMetrics.__dataclass_fields__,
    *BOOKKEEPING_COLUMNS,
]


class BaseChangedError(RuntimeError):
    """The base's weights were harmed: a process of its own is needed to go on."""


class Workbench(mmlu.Examiner):
    """What all experiments of one process share: the base model and the encoded questions, each loaded once."""

    def __init__(self, config: Config, store: Store, loaded: LoadedModel | None = None) -> None:
        super().__init__(config, store, loaded)
        self.config: Config = config
        self._base_hash = self._model_hash = ""

    def run(self, experiment: Experiment, progress: Progress = ignore_progress) -> ResultRow:
        return run_experiment(self, experiment, progress)

    def train_together(self, experiments: Sequence[Experiment], progress: Progress = ignore_progress) -> int:
        return train_together(self, experiments, progress)

    def help(self, experiment: Experiment, name: str, progress: Progress = ignore_progress) -> int:
        return help_experiment(self, experiment, name, progress)

    @cached_property
    def loaded(self) -> LoadedModel:
        """The base model, loaded when it is first needed.

        Raises:
            MachineError: it cannot be found or read here: on a cluster nobody could say so before.
            DoesNotFitError: this GPU is too small for it.
        """
        if self._loaded is None and torch.cuda.is_available():
            check_fit_here(self.config)
        try:
            loaded = super().loaded
        except UserError as error:
            raise MachineError(str(error)) from error
        self._base_hash = loaded.logits_hash()
        return loaded

    def check_model(self, experiment: Experiment) -> None:
        """Whether the model that was loaded is the one that the run was planned for.

        Raises:
            MachineError: it is not: its folder was changed meanwhile, or this machine has another one in its place.
        """
        source = self.loaded.source
        if not self._model_hash:
            self._model_hash = model_hash(source, self.config.trust_remote_code)
        if any(self._model_hash != origin["model"] for origin in experiment.origins.values()):
            raise MachineError(f"{source}: not what it was when the run began: run the same command again")

    def check_base(self) -> None:
        """Whether the base still is what it was when it was loaded: nothing that a stage does may change it.

        Raises:
            BaseChangedError: it is not. What was made with it is not to be kept.
        """
        now = self.loaded.logits_hash()
        # A device that does not repeat itself changes at every look; a base that was changed stays so.
        if now != self._base_hash and now == self.loaded.logits_hash():
            raise BaseChangedError("the base model is not what it was when it was loaded")


def run_experiment(bench: Workbench, experiment: Experiment, progress: Progress = ignore_progress) -> ResultRow:
    """Run what of an experiment is not done yet, and store its row.

    A mistake in the data gives an error row. Anything else that goes wrong is raised: the caller may try again, on
    another machine where this one is at fault.
    """
    started = time.perf_counter()
    with _at_hand(bench.store, experiment), _log_file(bench.store.folder(experiment) / LOG):
        try:
            values = _run_stages(bench, experiment, progress)
            row = make_row(bench.config, experiment, "ok", **values, total_seconds=time.perf_counter() - started)
        except MachineError:
            raise
        except UserError as error:
            log.error("%s", error)
            row = error_row(bench.config, experiment, str(error))
        bench.store.write_row(experiment, row)
        log.info("finished: %s", row.values["status"])
    return row


def _run_stages(bench: Workbench, experiment: Experiment, progress: Progress) -> dict[str, Any]:
    if experiment.error:
        raise UserError(experiment.error)
    stages = bench.config.stages
    progress("load", 0, 1)
    dataset = _load(bench, experiment)
    values = _dataset_values(dataset) | {"device": device_name()}
    if "features" in stages:
        values |= _stage(bench, experiment, "features", lambda: _extract(bench, experiment, dataset, progress))
    if "train" in stages:
        values |= _stage(bench, experiment, "train", lambda: _train(bench, experiment, dataset, progress))
    if "mmlu" in stages:
        if bench.store.read_stage(experiment, "train") is None:
            raise UserError(f"{experiment.dataset}: there is no trained adapter to evaluate: add train to --stages")
        values |= _stage(bench, experiment, "mmlu", lambda: _evaluate(bench, experiment, progress))
    return values


def _load(bench: Workbench, experiment: Experiment) -> Dataset:
    """The experiment's dataset, as it was when the run was planned.

    Raises:
        MachineError: this machine cannot read what could be read then, or reads something else.
    """
    path = location(experiment.path)
    try:
        dataset = datasets.load_dataset(path, bench.config.salvage, bench.config.max_records)
    except UserError as error:
        raise MachineError(str(error)) from error
    if dataset.data_hash != experiment.data_hash:
        raise MachineError(f"{path}: not what it was when the run began: run the same command again")
    return dataset


def _stage(bench: Workbench, experiment: Experiment, stage: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A stage's values: from the store, or made and stored."""
    if (saved := bench.store.read_stage(experiment, stage)) is not None:
        log.info("%s: done before", stage)
        return saved
    log.info("%s: started", stage)
    started = time.perf_counter()
    bench.check_model(experiment)
    values = make()
    bench.check_base()
    values[f"{stage}_seconds"] = time.perf_counter() - started
    bench.store.write_stage(experiment, stage, values)
    log.info("%s: %.1f s", stage, values[f"{stage}_seconds"])
    return values


def _extract(bench: Workbench, experiment: Experiment, dataset: Dataset, progress: Progress) -> dict[str, Any]:
    config = bench.config
    options = FeatureOptions(**config.settings_of(FeatureOptions))
    loaded, method = bench.loaded, method_of(experiment)
    return extract_features(loaded, dataset, method, options, loaded.feature_token_budget, config.seed, progress)


def _train(bench: Workbench, experiment: Experiment, dataset: Dataset, progress: Progress) -> dict[str, Any]:
    try:
        (result,) = train_adapters(bench.loaded, [_attach(bench, experiment, dataset)], progress)
        if isinstance(result, TrainingDivergedError):
            raise result
        return _keep_adapter(bench, experiment, result)
    finally:
        bench.loaded.detach()


def _attach(bench: Workbench, experiment: Experiment, dataset: Dataset, name: str = "default") -> Job:
    """A fresh adapter of the base, and what it is to be trained on."""
    method = method_of(experiment)
    seed = (dataset.seed ^ bench.config.seed) % 2**62
    # An order by content: the same whatever the file's, so that the seed alone decides what is learnt when.
    ordered = datasets.sample_examples(dataset.examples, 0, seed)
    encoded = StoredEncoded(encode_each(bench.loaded.tokenizer, ordered, method.max_length))
    return Job(bench.loaded.attach(method, seed, name), encoded, method, seed, name)


def _keep_adapter(
    bench: Workbench, experiment: Experiment, result: TrainingResult, name: str = "default"
) -> dict[str, Any]:
    bench.store.forget_stage(experiment, "train")
    curve = pd.DataFrame(result.loss_curve())
    write_atomically(bench.store.folder(experiment) / "loss_curve.csv", lambda p: curve.to_csv(p, index=False))
    write_atomically(bench.store.adapter_folder(experiment), lambda p: bench.loaded.save_adapter(p, name))
    return dict(vars(result.metrics))


def train_together(bench: Workbench, experiments: Sequence[Experiment], progress: Progress = ignore_progress) -> int:
    """Train the adapters of several experiments over the same passes through the base, as many as pay.

    Each is stored as its own train stage stores it, and is what it would have become alone. One that cannot be trained
    is left out: its own run will say why.

    Returns:
        The number of adapters that were trained.
    """
    asked = bench.config.adapters_a_pass
    with contextlib.suppress(UserError):  # of a model that cannot be loaded: each experiment's row will say so
        if asked or torch.cuda.is_available():
            return _train_together(bench, experiments, asked, progress)
    return 0


def _train_together(bench: Workbench, experiments: Sequence[Experiment], asked: int | None, progress: Progress) -> int:
    loaded, most = bench.loaded, asked or len(experiments)
    with contextlib.ExitStack() as stack:
        jobs: list[tuple[Experiment, Job]] = []
        for i, experiment in enumerate(experiments):
            stack.enter_context(_at_hand(bench.store, experiment))
            stack.callback(loaded.detach, f"together_{i}")
            with contextlib.suppress(UserError):
                bench.check_model(experiment)
                job = _attach(bench, experiment, _load(bench, experiment), f"together_{i}")
                if any(count_labels(job)):
                    jobs.append((experiment, job))
                    most = asked or min(most, adapters_a_pass(loaded, job))  # its adapter may be the largest
            if len(jobs) >= most:
                break
        if len(jobs) < 2:
            return 0
        for experiment, _ in jobs:
            stack.enter_context(_log_file(bench.store.folder(experiment) / LOG))
        log.info("train: started, %d adapters together", len(jobs))
        results = train_adapters(loaded, [job for _, job in jobs], progress)
        bench.check_base()
        for (experiment, job), result in zip(jobs, results, strict=True):
            if isinstance(result, TrainingResult):
                bench.store.write_stage(experiment, "train", _keep_adapter(bench, experiment, result, job.name))
        return sum(isinstance(result, TrainingResult) for result in results)


def help_experiment(bench: Workbench, experiment: Experiment, name: str, progress: Progress = ignore_progress) -> int:
    """Ask questions for the process that evaluates this experiment, or the base for it, from the last one backwards.

    Args:
        name: this process's name; no two helpers of an evaluation have the same.

    Returns:
        The number of questions asked: 0 where there is nothing to help with.
    """
    base_path = bench.store.base_file(experiment.base_key, "scores.parquet")
    if bench.is_being_scored(experiment.base_key, base_path):
        with bench.loaded.base():
            return bench.help_score(experiment.base_key, experiment.base_key, base_path, name, progress)
    folder, path = bench.store.adapter_folder(experiment), bench.store.scores_path(experiment)
    if not folder.is_dir() or not bench.is_being_scored(key := _score_key(bench, experiment), path):
        return 0
    bench.loaded.attach_saved(folder)
    try:
        return bench.help_score(experiment.base_key, key, path, name, progress)
    finally:
        bench.loaded.detach()


def _score_key(bench: Workbench, experiment: Experiment) -> str:
    return digest([experiment.origins["mmlu"], adapter_hash(bench.store.adapter_folder(experiment))])


def _evaluate(bench: Workbench, experiment: Experiment, progress: Progress) -> dict[str, Any]:
    base = bench.base_score(experiment.base_key, wait=False, progress=progress)
    bench.store.forget_stage(experiment, "mmlu")
    bench.loaded.attach_saved(bench.store.adapter_folder(experiment))
    try:
        score = bench.score(
            experiment.base_key, _score_key(bench, experiment), bench.store.scores_path(experiment), progress
        )
    finally:
        bench.loaded.detach()
    if base is None:  # another worker was at it when this one began
        base = bench.base_score(experiment.base_key, wait=True, progress=progress)
    assert base is not None
    return _score_values(score, base)


def _score_values(score: Score, base: Score) -> dict[str, Any]:
    ours, theirs, change = mmlu.summarize(score), mmlu.summarize(base), mmlu.compare(score, base)
    groups = {f"accuracy_{name}": group["accuracy"] for name, group in ours["groups"].items()}
    both = ("overall_accuracy", "correct_questions", "overall_stderr", "macro_accuracy", "num_unparsed")
    return {
        **{name: ours[name] for name in (*both, "total_questions", "num_truncated")},
        **{f"base_{name}": theirs[name] for name in both},
        **groups,
        "accuracy_change": change["difference"],
        "accuracy_change_low": change["ci_low"],
        "accuracy_change_high": change["ci_high"],
        "mcnemar_p_value": change["mcnemar_p_value"],
        "token_budget": score.info["token_budget"],
        "mmlu_oom_backoffs": score.info["num_oom_backoffs"],
    }


def _dataset_values(dataset: Dataset) -> dict[str, Any]:
    shown = [f"{bad.place}: {bad.reason}" for bad in dataset.bad_records[:5]]
    more = dataset.num_bad_records - len(shown)
    return {
        "num_examples": len(dataset.examples),
        "num_bad_records": dataset.num_bad_records,
        "num_lost_records": dataset.num_lost_records,
        "bad_records": "; ".join([*shown, f"and {more} more"] if more > 0 else shown),
    }


def make_row(config: Config, experiment: Experiment, status: str, **values: Any) -> ResultRow:
    """A row with every column: what identifies the experiment, and ``values``."""
    settings = {k: ",".join(v) if isinstance(v, list) else v for k, v in experiment.settings.items()}
    identity = {
        "dataset": experiment.dataset,
        "experiment_id": experiment.experiment_id,
        "status": status,
        "error": "",
        "data_hash": experiment.data_hash,
        "estimated_seconds": experiment.estimated_seconds,
        "estimated_peak_memory_bytes": experiment.estimated_peak_memory_bytes,
        "num_attempts": 1,
        **{name: getattr(config, name) for name in BOOKKEEPING_COLUMNS if name in type(config).model_fields},
        **settings,
    }
    return ResultRow({**dict.fromkeys(ROW_COLUMNS), **identity, **values})


def error_row(config: Config, experiment: Experiment, error: str, **values: Any) -> ResultRow:
    """The row of an experiment that could not be finished: its cause on one line."""
    return make_row(config, experiment, "error", error=" ".join(error.split())[:1000], **values)


@contextlib.contextmanager
def _at_hand(store: Store, experiment: Experiment) -> Iterator[None]:
    """While an experiment runs, what is finished of it lies on this machine."""
    store.take_out(experiment)
    try:
        yield
    finally:
        store.put_away(experiment)


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """While an experiment runs, raylora's own log goes to its file too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
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
    """In a process of one's own: a worker's threads are its share of the cores."""
    if config.threads:
        torch.set_num_threads(config.threads)


def main(argv: list[str]) -> int:
    """``python -m raylora.experiment FILE [options]``: one dataset, in this process, without a cluster."""
    from raylora.report import print_results

    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        raise UserError("name a dataset file first: python -m raylora.experiment FILE --model demo --mmlu demo")
    file = location(argv[0])
    config = load_config(argv if argv[0] in {"-h", "--help"} else argv[1:], prog="python -m raylora.experiment FILE")
    plan = make_plan(config, [file], "single")
    if config.dry_run:
        from raylora.run import print_plan

        print_plan(plan, make_console())
        return 0
    use_threads(config)
    with plan.store.held(config.fresh):
        bench, done = Workbench(config, plan.store), plan.done()
        if len(done) < len(plan.experiments):
            plan.check_fit()
        rows = [done.get(e.experiment_id) or run_experiment(bench, e) for e in plan.experiments]
        plan.store.write_tables(rows, ROW_COLUMNS)
    print_results(rows, plan.store)
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    main_with_one_line_errors(main)
