"""The process of a worker: runs experiments, one after another, and reports its progress. Knows nothing of Ray."""

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
from raylora.config.run import Config
from raylora.errors import ErrorKind, MachineError, OutOfMemoryError, one_line
from raylora.model.memory import is_out_of_memory
from raylora.records import Experiment, ProgressCallback, ProgressStage, ResultRow
from raylora.storage.damage import damage_told
from raylora.storage.store import Store

PROGRESS_SECONDS = 0.5
"""A worker reports its progress and its metrics at most once in this time; a new stage at once."""
TITLE_SECONDS = 10.0
"""A worker's process changes its title at most once in this time, as each adds series to Prometheus; for a new stage
at once."""


def check_gpu() -> None:
    """Check that torch can use this process's GPU. Where there is no driver, GPUs are logical, and nothing is checked.

    Raises:
        MachineError: it cannot. The model would run on the CPU, a hundred times slower, without a warning.
    """
    import torch

    if Path("/dev/nvidiactl").exists() and not torch.cuda.is_available():
        text = "torch finds no GPU where the driver has one: `nvidia-smi` and `torch.version.cuda` say why"
        raise MachineError(text, kind=ErrorKind.GPU)


class Worker:
    """One GPU and one base model, in a process of its own. Runs one experiment after another.

    Args:
        make_runner: called with the configuration and the store; returns what runs the experiments. None: an
            ``ExperimentRunner``.
        board: a handle of the run's ``StatusBoard``.
        number: of this worker in its run, from 0.
        num_threads: CPU threads for torch.
        folder: the command's working folder, where relative paths start. A node that lacks it finds nothing by them.
        name: of this worker in process titles and metrics.
        meter: counts its work.
        show: called with a new title for its process.
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
        # Imported here: the supervisor and the board import this module too, and start in 1.2 s without torch. With
        # it they would take 4 to 5 s, and half a gigabyte each.
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
        """Train the experiments' adapters together and store them; each experiment's own run then takes its adapter.

        Returns:
            The number of adapters that were trained.
        """
        with self._reporter(experiments[0]) as progress:
            self._check_fit()
            return int(self._runner.train_together(experiments, progress))

    def help(self, experiment: Experiment) -> int:
        """Ask some MMLU questions for the worker that runs the experiment; returns how many."""
        with self._reporter(experiment) as progress:
            self._check_fit()
            num_asked: int = self._runner.help(experiment, f"helper-{self._number}", progress)
            return num_asked

    @functools.cache  # noqa: B019 - a worker lives as long as its process
    def _check_fit(self) -> None:
        """Check that the model fits the GPU, before it is loaded. Once a process.

        Raises:
            DoesNotFitError: it does not; it may fit another GPU.
        """
        import torch

        from raylora.planning.estimate import check_fit_here

        if torch.cuda.is_available():
            check_fit_here(self._config)

    @contextlib.contextmanager
    def _reporter(self, experiment: Experiment) -> Iterator[ProgressCallback]:
        """A callback that reports progress on the experiment to the board, the metrics and the process title."""
        stage_now: ProgressStage | None = None
        started, last_write, last_title = 0.0, 0.0, 0.0
        meter = self._meter

        def progress(stage: ProgressStage, done: int, total: int) -> None:
            nonlocal stage_now, started, last_write, last_title
            meter.worked(stage)
            now = time.time()
            if stage != stage_now:
                stage_now, started, last_write, last_title = stage, now, 0.0, 0.0
            if now - last_write >= PROGRESS_SECONDS:
                last_write = now
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
            if now - last_title >= TITLE_SECONDS:
                last_title = now
                self._show(title(self._name, experiment.dataset, stage, done, total))

        meter.begin()
        try:
            with damage_told(self._board.note.remote):
                yield progress
        # Translated here, as the supervisor, which makes the row, has no torch to recognize the error by.
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise OutOfMemoryError(one_line(error)) from error
            raise
        finally:
            if stage_now:
                meter.worked(stage_now)  # the time since its last report: the adapter was stored, scores were compared
            meter.show()
            self._board.clear.remote(self._number)
