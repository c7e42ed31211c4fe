"""Train the adapters of several experiments over the same passes of the base, and ask them over the same passes."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType

import torch

from raylora.config.run import method_of
from raylora.errors import MachineError, UserError
from raylora.experiment.helping import score_key_of
from raylora.experiment.workbench import Workbench, at_hand, attach_job, keep_adapter, load_planned_dataset, log_file
from raylora.mmlu.evaluator import Unscored
from raylora.model.lora_config import trains_alone
from raylora.model.memory import free_gpu_bytes
from raylora.records import Experiment, ProgressCallback, ignore_progress
from raylora.storage.store import LOG
from raylora.training.gradients import Job
from raylora.training.loop import Outcome, Slots, train_adapters
from raylora.training.slots import adapters_a_pass

log = logging.getLogger("raylora.experiment")


def train_together(
    bench: Workbench, experiments: Sequence[Experiment], progress: ProgressCallback = ignore_progress
) -> int:
    """Train the adapters of several experiments over the same passes of the base, as many at once as make it faster.

    Each adapter is stored as soon as it is done, as its experiment's train stage would store it, and the next one takes
    its place. It is what it would have become alone, but for float noise. One that cannot be trained is left out: its
    experiment's own run will say why.

    Returns:
        The number of adapters that were trained.

    Raises:
        BaseChangedError: the training changed the base; no adapter is stored that was in training then.
    """
    num_wanted = bench.config.adapters_a_pass
    experiments = [e for e in experiments if not trains_alone(method_of(e))]
    # Where the model cannot be loaded, each experiment's own run will say so.
    with contextlib.suppress(UserError, MachineError):
        if num_wanted or torch.cuda.is_available():  # on a CPU several are no faster than one
            with _Queue(bench, experiments) as queue:
                slots = _slots(bench, num_wanted)
                train_adapters(bench.loaded, queue.jobs(), progress, slots, queue.store)
            return queue.num_stored
    return 0


def _slots(bench: Workbench, num_wanted: int | None) -> Slots:
    if num_wanted is not None:
        return lambda _: num_wanted
    device = bench.loaded.device
    free_bytes = free_gpu_bytes(device) if device.type == "cuda" else 0
    return functools.partial(adapters_a_pass, bench.loaded, free_bytes=free_bytes)


def ask_together(bench: Workbench, experiments: Sequence[Experiment]) -> int:
    """Ask MMLU's questions of trained adapters of several experiments, and the base, where one would not fill a pass.

    The answers are kept; each experiment's own run finds them, and makes the score.

    Returns:
        How many were asked, the base among them.
    """
    ready = [e for e in experiments if not e.error and bench.store.read_stage(e, "train") is not None]
    ready = [e for e in ready if bench.store.read_stage(e, "mmlu") is None]
    if "mmlu" not in bench.config.stages or not ready:
        return 0
    return sum(_ask_of_set(bench, ready, *question_set) for question_set in ready[0].base_keys.items())


def _ask_of_set(bench: Workbench, ready: Sequence[Experiment], question_set: str, base_key: str) -> int:
    """``ask_together`` for one set of questions, by its name."""
    path = bench.store.base_file(base_key, "scores.parquet")
    with contextlib.ExitStack() as stack, contextlib.suppress(UserError, MachineError):
        unscored = []
        with contextlib.suppress(TimeoutError):  # another worker is at the base
            stack.enter_context(bench.store.base_lock(base_key, "scores").acquire(timeout=0))
            bench.store.fetch(path)
            unscored += [] if path.is_file() else [Unscored(base_key, path, None)]
        for experiment in ready:
            stack.enter_context(at_hand(bench.store, experiment))
            bench.check_model(experiment)
            folder = bench.store.adapter_folder(experiment)
            path, key = bench.store.scores_path(experiment, question_set), score_key_of(bench, experiment, question_set)
            unscored.append(Unscored(key, path, folder))
        return bench.answer_together(base_key, unscored)
    return 0


class _Queue:
    """The experiments that wait for a place in the training, and those that have one."""

    def __init__(self, bench: Workbench, experiments: Sequence[Experiment]) -> None:
        self._bench = bench
        # The longest first: a long one that begins last would end alone.
        self._experiments = sorted(experiments, key=lambda e: -e.num_tokens * e.settings["num_epochs"])
        self._at_work: dict[str, tuple[Experiment, contextlib.ExitStack]] = {}
        self._most_at_work = 0
        self.num_stored = 0

    def __enter__(self) -> _Queue:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for _, stack in self._at_work.values():
            stack.__exit__(kind, error, traceback)

    def jobs(self) -> Iterator[Job]:
        """The job of each experiment that can be trained; its adapter is attached when it is asked for."""
        for i, experiment in enumerate(self._experiments):
            if self.num_stored and self._most_at_work == 1:
                return  # one after another they are trained as well in their own runs
            with contextlib.suppress(UserError, MachineError):
                job = self._begin(experiment, f"together_{i}")
                yield job

    def _begin(self, experiment: Experiment, name: str) -> Job:
        bench = self._bench
        with contextlib.ExitStack() as stack:
            stack.enter_context(at_hand(bench.store, experiment))
            stack.callback(bench.loaded.detach, name)
            bench.check_model(experiment)
            dataset = load_planned_dataset(bench, experiment, method_of(experiment).max_length)
            job = attach_job(bench, experiment, dataset, name)
            stack.enter_context(log_file(bench.store.folder(experiment) / LOG))
            self._at_work[name] = experiment, stack.pop_all()
        self._most_at_work = max(self._most_at_work, len(self._at_work))
        log.info("train: started, adapters in training now: %d", len(self._at_work))
        return job

    def store(self, job: Job, outcome: Outcome) -> None:
        """Store what became of an experiment's adapter, and detach it."""
        experiment, stack = self._at_work.pop(job.name)
        with stack:
            if not isinstance(outcome, UserError):
                # Each time, while nothing is replaced in the model: what is stored counts as done, whatever comes next.
                self._bench.check_base()
                values = keep_adapter(self._bench, experiment, outcome, job.name)
                self._bench.store.write_stage(experiment, "train", values)
                self.num_stored += 1
