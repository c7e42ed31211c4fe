"""The crew and the foreman alone: who is tried again, where, and when nothing can be done."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator

import pytest

from raylora.cluster import worker_pool
from raylora.cluster.failures import store_failure
from raylora.cluster.retries import RetryingExecutor, WorkerCalls
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPlace, WorkerPool
from raylora.config import load_config
from raylora.errors import CannotGoOnError, ErrorKind, MachineError, MachineFailedError, WorkerFailedError
from raylora.experiment.story import run_experiment
from raylora.experiment.workbench import Workbench
from raylora.planning.plan import make_plan
from raylora.records import Experiment
from raylora.storage.store import Store
from tests.helpers.chunks import OPTIONS, write_dataset

PLACES = [WorkerPlace("host", "0", "node"), WorkerPlace("host", "1", "node")]


def make_experiment(name: str) -> Experiment:
    origins = {stage: {"data": name} for stage in ("features", "train", "mmlu")}
    settings = {"batch_size": 1, "gradient_accumulation": 1, "num_epochs": 1}
    return Experiment(name, name, f"/{name}.json", settings, name, origins, "base", name, 4, 100)


def make_crew(told: list[str], start=None, num_workers: int = 2) -> WorkerPool:
    places = itertools.cycle(PLACES)
    start = start or (lambda: PoolWorker(object(), next(places)))
    return WorkerPool(start, lambda _: None, lambda: Capacity(num_workers, frozenset({"node"})), told.append)


@contextlib.contextmanager
def foreman_of(tmp_path, run, crew, told) -> Iterator[RetryingExecutor]:
    calls = WorkerCalls(run, lambda *_: 0, lambda *_: 0, set)
    config = load_config(model="demo", mmlu="demo", adapters_a_pass=1)
    foreman = RetryingExecutor(config, Store(tmp_path), crew, calls, on_gpus=True, on_retry=told.append)
    try:
        yield foreman
    finally:
        foreman.close()


def failing(error: Exception, seen: list[WorkerPlace] | None = None):
    """A worker's way of running experiments: it fails, wherever it is."""

    def run(member, experiment):
        if seen is not None:
            seen.append(member.place)
        raise error

    return run


def test_workers_that_never_start_end_the_run_with_the_cause(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "CAPACITY_SECONDS", 0.02)
    told: list[str] = []

    def start():
        raise ImportError("No module named 'torch'")

    with foreman_of(tmp_path, lambda *_: {}, make_crew(told, start), told) as foreman:
        started = time.monotonic()
        with pytest.raises(CannotGoOnError, match=r"no worker starts, \d+ did not: No module named 'torch'"):
            foreman.run(make_experiment("one"), 0)
        assert time.monotonic() - started < 30
    assert told == ["a worker did not start, and another one is tried: No module named 'torch'"]


def test_a_worker_that_starts_at_the_second_try_is_enough(tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "CAPACITY_SECONDS", 0.02)
    told, tries = [], itertools.count()

    def start():
        if next(tries) < 3:
            raise RuntimeError("not yet")
        return PoolWorker(object(), PLACES[0])

    with foreman_of(tmp_path, lambda *_: {"status": "ok"}, make_crew(told, start, 1), told) as foreman:
        assert foreman.run(make_experiment("one"), 0) == {"status": "ok"}
    assert len(told) == 1


def test_what_machines_are_to_blame_for_is_tried_elsewhere_and_again_by_the_next_run(tmp_path):
    told: list[str] = []
    seen: list[WorkerPlace] = []
    one, error = (
        make_experiment("one"),
        MachineFailedError("--model /models/llama: no such folder", kind=ErrorKind.MODEL),
    )
    with foreman_of(tmp_path, failing(error, seen), make_crew(told), told) as foreman:
        values = foreman.run(one, 0)
    assert values["status"] == "error"
    assert "no such folder; tried 2 times" in values["error"]
    assert values["error_kind"] == "model"
    assert set(seen) == set(PLACES), "it was not tried on the other GPU"
    assert Store(tmp_path).read_row(one) is None


def test_what_no_machine_can_do_for_anyone_ends_the_run(tmp_path):
    told: list[str] = []
    error = MachineFailedError("--model x: cannot be loaded: damaged")
    with foreman_of(tmp_path, failing(error), make_crew(told), told) as foreman:
        for name in ("one", "two"):
            assert foreman.run(make_experiment(name), 0)["status"] == "error"
        with pytest.raises(CannotGoOnError, match="cannot be loaded: damaged"):
            foreman.run(make_experiment("three"), 0)


def test_what_the_experiment_is_to_blame_for_is_done_with(tmp_path):
    told: list[str] = []
    one, error = make_experiment("one"), WorkerFailedError("its worker process died", kind=ErrorKind.WORKER_DIED)
    with foreman_of(tmp_path, failing(error), make_crew(told), told) as foreman:
        assert foreman.run(one, 0)["status"] == "error"
    values = Store(tmp_path).read_row(one).values
    assert (values["num_attempts"], values["error_kind"]) == (2, "worker_died")


def test_a_full_disk_is_known_by_whoever_says_it(tmp_path):
    from safetensors import SafetensorError

    store = Store(tmp_path)
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device: make room" in str(store_failure(full, store))
    wrapped = RuntimeError("could not be saved")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert store_failure(wrapped, store)
    assert store_failure(RuntimeError("something else (os error 2)"), store) is None
    elsewhere = MachineError("/tmp/spool: No space left on device")
    elsewhere.__cause__ = OSError(28, "No space left on device")
    assert store_failure(elsewhere, store) is None, "the cache's disk is not that of the results"


def test_a_dataset_that_is_gone_or_changed_since_the_plan_gives_no_row(tmp_path, tiny_model_folder, loaded):
    write_dataset(tmp_path / "data", "a")
    file = tmp_path / "data" / "a.json"
    config = load_config(model=str(tiny_model_folder), output=tmp_path / "out", **OPTIONS)
    plan = make_plan(config, [file], "single")
    (experiment,) = plan.experiments
    bench = Workbench(config, plan.store, loaded)
    was = file.read_text()
    for now, why in ((was.replace("What", "Why"), "not what it was when the run began"), (None, "No such file")):
        file.unlink()
        if now is not None:
            file.write_text(now)
        with pytest.raises(MachineError, match=why):
            run_experiment(bench, experiment)
        assert plan.store.read_row(experiment) is None


def test_a_product_that_was_taken_away_is_made_again(tmp_path):
    store, one = Store(tmp_path), make_experiment("one")
    folder = store.folder(one)
    (folder / "adapter").mkdir(parents=True)
    files = [folder / "adapter" / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    for file in (*files, folder / "loss_curve.csv"):
        file.write_text("what a training makes")
    store.write_stage(one, "train", {"train_loss": 1.0})
    assert store.read_stage(one, "train") == {"train_loss": 1.0}
    assert store.why_not_done(one, "train") == ""
    files[0].write_text("")
    files[1].unlink()
    assert store.read_stage(one, "train") is None
    assert store.why_not_done(one, "train") == "adapter/adapter_config.json, adapter/adapter_model.safetensors missing"


def test_a_grid_that_says_a_value_twice_runs_it_once(tmp_path, tiny_model_folder):
    write_dataset(tmp_path / "data", "a")
    config = load_config(model=str(tiny_model_folder), grid={"lora_r": [8, 8, 4]}, output=tmp_path / "out", **OPTIONS)
    plan = make_plan(config, [tmp_path / "data" / "a.json"], "single")
    assert sorted(e.settings["lora_r"] for e in plan.experiments) == [4, 8]
