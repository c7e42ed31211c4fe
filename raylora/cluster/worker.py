"""What a worker's process does: experiments, one after another, and saying what it is at. Knows nothing of Ray."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from raylora.cluster.metrics import WorkerMeter, title
from raylora.cluster.status import WorkerProgress
from raylora.config import Config
from raylora.errors import ErrorKind, MachineError, OutOfMemoryError, one_line
from raylora.model.memory import is_out_of_memory
from raylora.records import Experiment, ProgressCallback, ProgressStage, ResultRow
from raylora.storage.store import Store

PROGRESS_SECONDS = 0.5
"""At most one progress message a worker in this time, and one report of numbers; a new stage does not wait."""
TITLE_SECONDS = 10.0
"""The same for the title of a worker's process."""


def check_gpu() -> None:
    """Whether this process can use the GPU that was given to it. Where there is no driver, GPUs are only counted.

    Raises:
        MachineError: it would run on the CPU, a hundred times slower, and say nothing.
    """
    import torch

    if Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        text = "torch finds no GPU where the driver has one: `nvidia-smi` and `torch.version.cuda` say why"
        raise MachineError(text, kind=ErrorKind.GPU)


class Worker:
    """One GPU and one base model, in a process of its own. Runs one experiment after another.

    Args:
        make_runner: makes what experiments are run with; an ``ExperimentRunner`` if None.
        board: a handle of the run's ``StatusBoard``.
        folder: where the command was given, to which relative paths belong; where it is not there, they lead nowhere.
        name: what people see of it in titles and metrics.
        meter: counts what it does.
        show: takes the title of what it does now.
    """

    def __init__(
        self,
        make_runner: Callable[..., Any] | None,
        config: Config,
        store: Store,
        board: Any,
        number: int,
        num_threads: int,
        *,
        folder: str,
        name: str,
        meter: WorkerMeter,
        show: Callable[[str], None],
    ) -> None:
        # Not at the top: what the supervisor and the board need of this module is there in a second, without torch.
        import torch

        from raylora.experiment.runner import ExperimentRunner
        from raylora.model.sources import quiet_libraries

        with contextlib.suppress(OSError):
            os.chdir(folder)
        quiet_libraries()
        torch.set_num_threads(num_threads)
        self._runner = (make_runner or ExperimentRunner)(config, store)
        self._config, self._board, self._number, self._name = config, board, number, name
        self._meter, self._show = meter, show

    def run(self, experiment: Experiment) -> dict[str, Any]:
        """The values of the experiment's row."""
        with self._reporter(experiment) as progress:
            self._check_fit()
            row: ResultRow = self._runner.run(experiment, progress)
            return row.values

    def train(self, experiments: Sequence[Experiment]) -> int:
        """Train adapters together, and say how many; each experiment's own run finds its adapter done."""
        with self._reporter(experiments[0]) as progress:
            self._check_fit()
            return int(self._runner.train_together(experiments, progress))

    def help(self, experiment: Experiment) -> int:
        """Questions of the experiment's evaluation that were asked for the worker that runs it."""
        with self._reporter(experiment) as progress:
            self._check_fit()
            asked: int = self._runner.help(experiment, f"helper-{self._number}", progress)
            return asked

    @functools.cache  # noqa: B019 - a worker lives as long as its process
    def _check_fit(self) -> None:
        """Whether the GPU holds the model, before it is loaded.

        Raises:
            DoesNotFitError: it does not; another GPU may.
        """
        import torch

        from raylora.planning.estimate import check_fit_here

        if torch.cuda.is_available():
            check_fit_here(self._config)

    @contextlib.contextmanager
    def _reporter(self, experiment: Experiment) -> Iterator[ProgressCallback]:
        stage_now: ProgressStage | None = None
        started, written, titled = 0.0, 0.0, 0.0
        meter = self._meter

        def progress(stage: ProgressStage, done: int, total: int) -> None:
            nonlocal stage_now, started, written, titled
            meter.worked(stage)
            now = time.time()
            if stage != stage_now:
                stage_now, started, written, titled = stage, now, 0.0, 0.0
            if now - written >= PROGRESS_SECONDS:
                written = now
                self._board.write.remote(
                    WorkerProgress(
                        self._number,
                        experiment.experiment_id,
                        experiment.dataset,
                        stage,
                        done,
                        total,
                        started,
                        stage.can_share,
                    )
                )
                meter.show()
            if now - titled >= TITLE_SECONDS:
                titled = now
                self._show(title(self._name, experiment.dataset, stage, done, total))

        meter.begin()
        try:
            yield progress
        except (RuntimeError, MemoryError) as error:  # known here, where torch is, and not where the row is made
            if is_out_of_memory(error):
                raise OutOfMemoryError(one_line(error)) from error
            raise
        finally:
            if stage_now:
                meter.worked(stage_now)  # from its last report on: an adapter is stored, scores are compared
            meter.show()
            self._board.clear.remote(self._number)
