"""Send rows, as they finish, to experiment trackers: MLflow, TensorBoard, Weights & Biases.

    python -m raylora.batch --chunk chunk_001 --trackers mlflow,tensorboard

Each tracker gets every row that this run finishes, once. A tracker that fails costs a warning, never a row. Where it
sends rows to is set by its package's own variables: MLFLOW_TRACKING_URI, WANDB_PROJECT, WANDB_MODE and so on.
"""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pandas as pd
from rich.console import Console

from raylora.config.method import Method
from raylora.planning.plan import Plan
from raylora.records import ResultRow
from raylora.texts import without_secrets

CLOSING_SECONDS = 60
"""How long a run waits at its end for slow trackers."""


class Tracker(Protocol):
    """One of the services or folders that rows are sent to."""

    def log_row(self, row: ResultRow, loss_curve: pd.DataFrame | None) -> None:
        """Send one finished row, good or not; ``loss_curve`` has a row for each step, None where nothing was trained.

        Raises:
            Exception: anything; ``Trackers`` then sends it no more rows.
        """


def settings_and_numbers(row: ResultRow) -> tuple[dict[str, Any], dict[str, float]]:
    """A row's settings and texts, and its measured numbers, by column. Null values are left out."""
    values = {name: value for name, value in row.values.items() if value not in (None, "") and value == value}
    numbers = {
        name: float(value)
        for name, value in values.items()
        if name not in Method.model_fields and isinstance(value, int | float) and math.isfinite(value)
    }
    return {name: value for name, value in values.items() if name not in numbers}, numbers


class MlflowTracker:
    """One MLflow run a row, in an experiment named for the chunk."""

    def __init__(self, plan: Plan) -> None:
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient()
        name = f"raylora/{plan.chunk}"
        existing = self._client.get_experiment_by_name(name)
        self._experiment_id = existing.experiment_id if existing else self._client.create_experiment(name)

    def log_row(self, row: ResultRow, loss_curve: pd.DataFrame | None) -> None:
        from mlflow.entities import Metric, Param

        settings, numbers = settings_and_numbers(row)
        run_id = self._client.create_run(self._experiment_id, run_name=str(row.values["dataset"])).info.run_id
        metrics = [Metric(name, value, 0, 0) for name, value in numbers.items()]
        metrics += [Metric(f"train/{name}", value, 0, step) for name, step, value in points_of(loss_curve)]
        params = [Param(name, str(value)[:500]) for name, value in settings.items()]
        # The server takes 1000 values in a request, parameters among them.
        for i in range(0, max(len(metrics), 1), 900):
            self._client.log_batch(run_id, metrics[i : i + 900], params if i == 0 else [])
        self._client.set_terminated(run_id, "FINISHED" if row.ok else "FAILED")


class TensorBoardTracker:
    """A folder ``tensorboard/<experiment>`` a row, in the run's folder: ``tensorboard --logdir results``."""

    def __init__(self, plan: Plan) -> None:
        self._folder = plan.store.root / "tensorboard"

    def log_row(self, row: ResultRow, loss_curve: pd.DataFrame | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        settings, numbers = settings_and_numbers(row)
        name = str(row.values["experiment_id"])
        with SummaryWriter(str(self._folder / name)) as writer:
            for column, step, value in points_of(loss_curve):
                writer.add_scalar(f"train/{column}", value, step)
            hparams = {k: settings[k] for k in Method.model_fields if k in settings}
            writer.add_hparams(hparams, numbers, run_name=".")


class WandbTracker:
    """One run a row, grouped by chunk, in the project of WANDB_PROJECT, or ``raylora``."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def log_row(self, row: ResultRow, loss_curve: pd.DataFrame | None) -> None:
        import wandb

        settings, numbers = settings_and_numbers(row)
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "raylora"),
            group=self._plan.chunk,
            name=str(row.values["dataset"]),
            dir=str(self._plan.store.root),
            config=settings,
            reinit="create_new",
            settings=wandb.Settings(silent=True, console="off"),
        )
        by_step: dict[int, dict[str, float]] = {}
        for column, step, value in points_of(loss_curve):
            by_step.setdefault(step, {})[f"train/{column}"] = value
        for step, values in sorted(by_step.items()):
            run.log(values, step=step)
        run.summary.update(numbers)
        run.finish(exit_code=0 if row.ok else 1)


TRACKERS: dict[str, Callable[[Plan], Tracker]] = {
    "mlflow": MlflowTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def points_of(loss_curve: pd.DataFrame | None) -> Iterator[tuple[str, int, float]]:
    """A loss curve's values as (column, step, value)."""
    if loss_curve is None or "step" not in loss_curve:
        return
    for column in loss_curve.columns.drop("step"):
        for step, value in zip(loss_curve["step"], loss_curve[column], strict=True):
            if pd.notna(value):
                yield str(column), int(step), float(value)


class Trackers:
    """All trackers of a run. Rows are queued, and sent by a thread: a slow tracker does not slow the run.

    A tracker that fails is reported once, and gets no more rows.
    """

    def __init__(self, plan: Plan, console: Console) -> None:
        self._plan, self._console = plan, console
        self._trackers: dict[str, Tracker] = {}
        self._experiments = {e.experiment_id: e for e in plan.experiments}
        self._queue: queue.SimpleQueue[ResultRow | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._send, daemon=True)
        if plan.config.trackers:
            self._thread.start()

    def log_row(self, row: ResultRow) -> None:
        """Queue a row for all trackers; returns at once."""
        self._queue.put(row)

    def close(self) -> None:
        """Wait until all queued rows are sent, for ``CLOSING_SECONDS`` at most."""
        self._queue.put(None)  # the end of the queue
        if self._thread.is_alive():
            self._thread.join(timeout=CLOSING_SECONDS)
        if self._thread.is_alive():
            names = ", ".join(self._trackers or self._plan.config.trackers)
            self._console.print(f"Warning: {names} took too long: the last rows may be missing there")

    def _send(self) -> None:
        for wanted in self._plan.config.trackers:
            with self._drop_if_it_fails(wanted):
                self._trackers[wanted] = TRACKERS[wanted](self._plan)
        while (row := self._queue.get()) is not None:
            for name, tracker in tuple(self._trackers.items()):
                with self._drop_if_it_fails(name):
                    tracker.log_row(row, self._loss_curve(row))

    def _loss_curve(self, row: ResultRow) -> pd.DataFrame | None:
        path = self._plan.store.folder(self._experiments[row.values["experiment_id"]]) / "loss_curve.csv"
        return pd.read_csv(path) if row.ok and path.is_file() else None

    @contextlib.contextmanager
    def _drop_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 other people's packages and servers fail in any way
            self._trackers.pop(name, None)
            reason = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))[:200]
            self._console.print(f"Warning: {name} gets no more rows of this run: {reason}", soft_wrap=True)


@contextlib.contextmanager
def tracking(plan: Plan, console: Console) -> Iterator[Trackers]:
    """The trackers of a run, closed at its end, however that comes."""
    trackers = Trackers(plan, console)
    try:
        yield trackers
    finally:
        trackers.close()
