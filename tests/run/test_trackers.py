"""Trackers are told of every finished row, and none of them is worth one."""

from __future__ import annotations

import importlib.util
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from raylora.config.run import load_config
from raylora.console import make_console
from raylora.errors import UserError
from raylora.planning import plan
from raylora.planning.plan import check_trackers
from raylora.records import ResultRow
from raylora.rows import ROW_COLUMNS
from raylora.run import trackers
from raylora.run.trackers import points_of, settings_and_numbers, tracking
from raylora.storage.store import Store
from tests.helpers.chunks import OPTIONS, command, write_dataset


def make_row(name: str = "dolly", **values) -> ResultRow:
    good = {"dataset": name, "experiment_id": f"{name}-1", "status": "ok", "error": "", "overall_accuracy": 0.5}
    more = {"lora_r": 8, "learning_rate": 2e-4, "lr_scheduler": "cosine", "train_loss": float("nan"), "model": "demo"}
    return ResultRow(dict.fromkeys(ROW_COLUMNS) | good | more | values)


def make_plan(folder: Path, chosen: str, rows: list[ResultRow]):
    """A plan as far as trackers look at it, with the loss curve of each row in its store."""
    plan = SimpleNamespace(
        chunk="chunk_001",
        config=load_config(trackers=chosen),
        store=Store(folder),
        experiments=[SimpleNamespace(experiment_id=row.values["experiment_id"]) for row in rows],
    )
    for e in plan.experiments:
        plan.store.folder(e).mkdir(parents=True)
        curve = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2.0, 1.5], "note": [None, 1.0, None]})
        curve.to_csv(plan.store.folder(e) / "loss_curve.csv", index=False)
    return plan


def track(plan, rows) -> str:
    """Log rows as a run does; what was printed."""
    out = io.StringIO()
    with tracking(plan, make_console(file=out, width=200)) as found:
        for row in rows:
            found.log_row(row)
    return out.getvalue()


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"no {package}: pip install 'raylora[{package}]'")


def test_a_row_is_cut_into_what_was_chosen_and_what_was_measured():
    chosen, measured = settings_and_numbers(make_row(accuracy_change=-0.1, num_attempts=1))
    assert chosen == {
        "dataset": "dolly", "experiment_id": "dolly-1", "status": "ok", "lora_r": 8, "learning_rate": 2e-4,
        "lr_scheduler": "cosine", "model": "demo",
    }  # fmt: skip
    assert measured == {"overall_accuracy": 0.5, "accuracy_change": -0.1, "num_attempts": 1.0}
    curve = pd.DataFrame({"step": [1, 2], "loss": [3.0, None]})
    assert list(points_of(curve)) == [("loss", 1, 3.0)]
    assert list(points_of(None)) == []


def test_a_missing_package_is_one_line_before_anything_starts(monkeypatch):
    monkeypatch.setitem(plan.NEEDS, "wandb", ("no_such_package",))
    with pytest.raises(UserError, match=r"--trackers wandb: the package no_such_package is missing: pip install"):
        check_trackers(load_config(trackers="wandb"))
    check_trackers(load_config())


def test_an_unknown_tracker_is_one_line():
    with pytest.raises(UserError, match="--trackers"):
        load_config(["--trackers", "clipboard"])


def test_a_tracker_that_fails_costs_a_line_and_no_other_tracker_a_row(tmp_path, monkeypatch):
    told = []

    class Broken:
        def __init__(self, plan):
            pass

        def log_row(self, row, loss_curve):
            told.append("broken")
            raise ConnectionError("no\nserver")

    class Working:
        def __init__(self, plan):
            pass

        def log_row(self, row, loss_curve):
            told.append((row.values["dataset"], len(loss_curve)))

    monkeypatch.setattr(trackers, "TRACKERS", {"mlflow": Broken, "wandb": Working})
    rows = [make_row("a"), make_row("b")]
    out = track(make_plan(tmp_path, "mlflow,wandb", rows), rows)
    assert told == ["broken", ("a", 3), ("b", 3)]
    assert out.strip() == "Warning: mlflow gets no more rows of this run: ConnectionError: no server"


def test_a_tracker_that_hangs_does_not_hold_a_run_up(tmp_path, monkeypatch):
    class Hanging:
        def __init__(self, plan):
            time.sleep(1000)

    monkeypatch.setattr(trackers, "TRACKERS", {"mlflow": Hanging})
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 0.1)
    rows = [make_row()]
    assert "mlflow took too long" in track(make_plan(tmp_path, "mlflow", rows), rows)


def test_tensorboard_files_hold_rows_and_curves(tmp_path):
    needs("tensorboard")
    rows = [make_row("a"), make_row("b", overall_accuracy=0.25)]
    assert track(make_plan(tmp_path, "tensorboard", rows), rows) == ""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path / "tensorboard" / "b-1")).Reload()
    assert [e.value for e in found.Scalars("train/loss")] == [3.0, 2.0, 1.5]
    assert [e.value for e in found.Scalars("overall_accuracy")] == [0.25]


@pytest.mark.slow
def test_wandb_writes_a_run_a_row_without_a_server(tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    rows = [make_row("a"), make_row("b", status="error", error="line 1")]
    assert track(make_plan(tmp_path, "wandb", rows), rows) == ""
    assert len(list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))) == 2


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_tells_its_trackers(tiny_model_folder, tmp_path):
    """The command itself, with two trackers, of which neither needs a server."""
    needs("tensorboard")
    needs("wandb")
    for name in ("one", "two"):
        write_dataset(tmp_path / "data" / "chunk_1", name)
    options = {**OPTIONS, "model": tiny_model_folder, "data_root": tmp_path / "data", "output": tmp_path / "out"}
    words = command(options, "--trackers", "tensorboard,wandb")
    environment = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = tmp_path / "out" / "chunk_1"
    (folder,) = results.glob("tensorboard/one-*")
    table = pd.read_csv(results / "results.csv").set_index("dataset")
    found = EventAccumulator(str(folder)).Reload()
    assert found.Scalars("overall_accuracy")[0].value == pytest.approx(table.loc["one", "overall_accuracy"])
    assert len(found.Scalars("train/loss")) == table.loc["one", "num_train_steps"]
    assert len(list(results.glob("wandb/offline-run-*/*.wandb"))) == 2


@pytest.fixture
def mlflow_server(tmp_path):
    """A real server on this machine. ``RAYLORA_MLFLOW`` names its command where it has an environment of its own."""
    needs("mlflow")
    command = os.environ.get("RAYLORA_MLFLOW") or shutil.which("mlflow", path=str(Path(sys.executable).parent))
    server = ("flask", "sqlalchemy")  # what its client alone does without
    if command is None or (not os.environ.get("RAYLORA_MLFLOW") and not all(map(importlib.util.find_spec, server))):
        pytest.skip("no MLflow server: make test-mlflow, or set RAYLORA_MLFLOW to the command of one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    store = ["--backend-store-uri", f"sqlite:///{tmp_path}/mlflow.db", "--artifacts-destination", str(tmp_path)]
    log = (tmp_path / "server.log").open("w")
    server = subprocess.Popen([command, *arguments, *store], stdout=log, stderr=log, cwd=tmp_path)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(1)
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


@pytest.mark.slow
@pytest.mark.ci
def test_mlflow_server_gets_rows_with_metrics_settings_and_curves(mlflow_server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    rows = [make_row("a"), make_row("b", status="error", error="line 1", overall_accuracy=None)]
    assert track(make_plan(tmp_path / "run", "mlflow", rows), rows) == ""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(mlflow_server)
    experiment = client.get_experiment_by_name("raylora/chunk_001")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"a", "b"}
    assert runs["a"].data.metrics["overall_accuracy"] == 0.5
    assert runs["a"].data.params["lora_r"] == "8"
    assert [p.value for p in client.get_metric_history(runs["a"].info.run_id, "train/loss")] == [3.0, 2.0, 1.5]
    assert (runs["a"].info.status, runs["b"].info.status) == ("FINISHED", "FAILED")
    assert runs["b"].data.params["error"] == "line 1"
