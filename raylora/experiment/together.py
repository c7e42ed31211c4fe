"""Train the adapters of several experiments in the same forward and backward passes of the base."""

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
    """Train the adapters of several experiments in the same passes of the base, as many as make it faster.

    Each adapter is stored as its experiment's train stage would store it, and is what it would have become alone, but
    for float noise. One that cannot be trained is left out: its experiment's own run will say why.

    Returns:
        The number of adapters that were trained.

    Raises:
        BaseChangedError: the training changed the base; none of its adapters is stored.
    """
    num_wanted = bench.config.adapters_a_pass
    # Where the model cannot be loaded, each experiment's own run will say so.
    with contextlib.suppress(UserError, MachineError):
        if num_wanted or torch.cuda.is_available():  # on a CPU several are no faster than one
            return _train_those_that_pay(bench, experiments, num_wanted, progress)
    return 0


def _train_those_that_pay(
    bench: Workbench, experiments: Sequence[Experiment], num_wanted: int | None, progress: ProgressCallback
) -> int:
    """Train the first ``num_wanted`` that can be trained; None: as many as are faster together than alone."""
    loaded, most = bench.loaded, num_wanted or len(experiments)
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
                    # The smallest limit counts: this adapter may be larger than those before it.
                    most = num_wanted or min(most, adapters_a_pass(loaded, job))
            if len(jobs) >= most:
                break
        if len(jobs) < 2:  # one alone is trained in its experiment's own run
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
