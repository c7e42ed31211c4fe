"""Adapters of several experiments trained over the same passes through the base."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence

import torch

from raylora.errors import MachineError, UserError
from raylora.experiment.workbench import Workbench, at_hand, attach_job, keep_adapter, load_planned_dataset, log_file
from raylora.records import Experiment, ProgressCallback, ignore_progress
from raylora.storage.store import LOG
from raylora.training.gradients import Job, count_labels
from raylora.training.loop import TrainingResult, adapters_a_pass, train_adapters

log = logging.getLogger("raylora.experiment")


def train_together(
    bench: Workbench, experiments: Sequence[Experiment], progress: ProgressCallback = ignore_progress
) -> int:
    """Train the adapters of several experiments over the same passes through the base, as many as pay.

    Each is stored as its own train stage stores it, and is what it would have become alone. One that cannot be trained
    is left out: its own run will say why.

    Returns:
        The number of adapters that were trained.
    """
    asked = bench.config.adapters_a_pass
    with contextlib.suppress(UserError, MachineError):  # a model that cannot be loaded: each row will say so
        if asked or torch.cuda.is_available():
            return _train_those_that_pay(bench, experiments, asked, progress)
    return 0


def _train_those_that_pay(
    bench: Workbench, experiments: Sequence[Experiment], asked: int | None, progress: ProgressCallback
) -> int:
    loaded, most = bench.loaded, asked or len(experiments)
    with contextlib.ExitStack() as stack:
        jobs: list[tuple[Experiment, Job]] = []
        for i, experiment in enumerate(experiments):
            stack.enter_context(at_hand(bench.store, experiment))
            stack.callback(loaded.detach, f"together_{i}")
            with contextlib.suppress(UserError, MachineError):
                bench.check_model(experiment)
                job = attach_job(bench, experiment, load_planned_dataset(bench, experiment), f"together_{i}")
                if any(count_labels(job)):
                    jobs.append((experiment, job))
                    most = asked or min(most, adapters_a_pass(loaded, job))  # its adapter may be the largest
            if len(jobs) >= most:
                break
        if len(jobs) < 2:
            return 0
        for experiment, _ in jobs:
            stack.enter_context(log_file(bench.store.folder(experiment) / LOG))
        log.info("train: started, %d adapters together", len(jobs))
        results = train_adapters(loaded, [job for _, job in jobs], progress)
        bench.check_base()
        for (experiment, job), result in zip(jobs, results, strict=True):
            if isinstance(result, TrainingResult):
                bench.store.write_stage(experiment, "train", keep_adapter(bench, experiment, result, job.name))
        return sum(isinstance(result, TrainingResult) for result in results)
