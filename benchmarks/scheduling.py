"""What scheduling costs, and how near a run comes to the shortest possible one.

    python -m benchmarks.scheduling                # overhead and scaling on a real Ray with logical GPUs
    python -m benchmarks.scheduling --simulate     # 10,000 datasets on 1,000 GPUs with failures, in threads

Stages sleep in place of computing; everything else is raylora's own: Ray, supervisor, pool, executor, store, tables.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import ray

from benchmarks import common
from raylora.cluster.ray_run import run_experiments
from raylora.cluster.retries import RetryingExecutor, WorkerCalls
from raylora.cluster.worker_pool import Capacity, PoolWorker, WorkerPlace, WorkerPool
from raylora.config.run import Config, load_config
from raylora.errors import NodeLostError, WorkerFailedError
from raylora.records import Experiment, ProgressCallback, ProgressStage, ResultRow
from raylora.rows import ROW_COLUMNS, make_row
from raylora.storage.run_tables import RunTables
from raylora.storage.store import Store

STAGES = (ProgressStage.FEATURES, ProgressStage.TRAIN, ProgressStage.MMLU)
GPUS_A_NODE = 8


def make_experiments(num: int, seconds: float, seed: int = 0) -> list[Experiment]:
    """Of log-normal lengths, as dataset sizes are, longest first; ``seconds`` is their mean."""
    rng = random.Random(seed)
    lengths = sorted((rng.lognormvariate(0, 0.8) for _ in range(num)), reverse=True)
    mean = sum(lengths) / num
    return [
        Experiment(
            f"data_{i:05d}",
            f"data_{i:05d}",
            "",
            {"seconds": seconds * n / mean},
            str(i),
            {key: {} for key in STAGES},
            "",
        )
        for i, n in enumerate(lengths)
    ]


class SleepingRunner:
    """Runs an experiment by sleeping through its stages."""

    def __init__(self, config: Config, store: Store) -> None:
        self.config, self.store = config, store

    def run(self, experiment: Experiment, progress: ProgressCallback) -> ResultRow:
        if num := experiment.settings.get("together"):
            self._wait_for_others(experiment, num)
        for stage in STAGES:
            progress(stage, 0, 1)
            time.sleep(experiment.settings["seconds"] / len(STAGES))
        row = make_row(self.config, experiment, "ok")
        self.store.write_row(experiment, row)
        return row

    def _wait_for_others(self, experiment: Experiment, num: int) -> None:
        """Until so many workers are at such an experiment."""
        folder = self.store.root / "warm"
        folder.mkdir(exist_ok=True)
        (folder / experiment.experiment_id).touch()
        while sum(1 for _ in folder.iterdir()) < num:
            time.sleep(0.01)

    def help(self, experiment: Experiment, name: str, progress: ProgressCallback) -> int:
        return 0


def shortest(experiments: list[Experiment], num_workers: int) -> float:
    """No schedule ends sooner: all workers busy all the time, or the longest one alone."""
    seconds = [float(e.settings["seconds"]) for e in experiments]
    return max(sum(seconds) / num_workers, max(seconds))


def run_on_ray(num_workers: int, experiments: list[Experiment]) -> dict[str, float]:
    """Seconds from the first moment at which all workers are warm to the last row."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(model="demo", num_workers=num_workers, adapters_a_pass=1, output=Path(folder))
        store = Store(Path(folder))
        store.open(fresh=True)
        # One for each worker, which ends when all have one: from then on all are warm.
        warm = [
            Experiment(
                **{**vars(e), "experiment_id": f"warm_{e.dataset}", "settings": {**e.settings, "together": num_workers}}
            )
            for e in make_experiments(num_workers, 0.0)
        ]
        tables = RunTables(store, ROW_COLUMNS)
        with tables.permitted():
            rows = run_experiments(config, store, [*warm, *experiments], make_runner=SleepingRunner, tables=tables)
        ended = time.time()
        started = max((store.folder(e) / "result.json").stat().st_mtime for e in warm)
        return {"seconds": ended - started, "rows": len(rows) - len(warm)}


def measure_on_ray(options: argparse.Namespace) -> None:
    ray.init(num_gpus=16, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    rows = []
    for num_workers in (1, 2, 4, 8, 16):
        nothing = make_experiments(options.num, 0.0)
        overhead = run_on_ray(num_workers, nothing)["seconds"] / options.num * num_workers
        experiments = make_experiments(6 * num_workers, 3.0)
        taken = run_on_ray(num_workers, experiments)["seconds"]
        bound = shortest(experiments, num_workers)
        rows.append(
            {
                "workers": num_workers,
                "overhead, ms an experiment and worker": 1000 * overhead,
                "experiments": len(experiments),
                "seconds": taken,
                "shortest possible": bound,
                "over it": f"{taken / bound - 1:.1%}",
            }
        )
        print(rows[-1], flush=True)
    ray.shutdown()
    common.report("scheduling on Ray with logical GPUs, stages that sleep", rows, options.json, {})


class Failing:
    """Workers of a cluster in which things go wrong, as threads that sleep."""

    def __init__(self, num_gpus: int, store: Store, config: Config, worker_dies: float, node_dies: float) -> None:
        self.bench = SleepingRunner(config, store)
        self.num_gpus, self.worker_dies, self.node_dies = num_gpus, worker_dies, node_dies
        self.lock = threading.Lock()
        self.random = random.Random(0)
        self.free = [
            WorkerPlace(f"node-{i // GPUS_A_NODE}", str(i % GPUS_A_NODE), f"{i // GPUS_A_NODE}")
            for i in range(num_gpus)
        ]
        self.num_deaths = self.num_lost = 0
        self.seconds_lost = 0.0

    def start(self) -> PoolWorker:
        with self.lock:
            place = self.free.pop(0)
        time.sleep(0.02)  # at the scale of the simulation, the minute in which a model is loaded
        return PoolWorker(None, place)

    def stop(self, member: PoolWorker) -> None:
        with self.lock:
            self.free.append(member.place)

    def survey(self) -> Capacity:
        return Capacity(self.num_gpus, frozenset(str(i) for i in range(self.num_gpus // GPUS_A_NODE + 1)))

    def run(self, member: PoolWorker, experiment: Experiment) -> dict[str, Any]:
        with self.lock:
            fate, when = self.random.random(), self.random.random()
        if fate < self.worker_dies + self.node_dies:
            time.sleep(when * experiment.settings["seconds"])
            with self.lock:
                self.seconds_lost += when * experiment.settings["seconds"]
                self.num_deaths += fate < self.worker_dies
                self.num_lost += fate >= self.worker_dies
            if fate < self.worker_dies:
                raise WorkerFailedError("its worker process died")
            raise NodeLostError("its node is gone")
        return self.bench.run(experiment, lambda *_: None).values


def simulate(options: argparse.Namespace) -> None:
    """Half a second stands for half an hour."""
    rows = []
    for num, num_gpus in ((1_000, 100), (10_000, 1_000)):
        experiments = make_experiments(num, 0.5 * options.scale)
        with tempfile.TemporaryDirectory() as folder:
            config, store = load_config(model="demo"), Store(Path(folder))
            site = Failing(num_gpus, store, config, worker_dies=0.01, node_dies=0.002)
            pool = WorkerPool(site.start, site.stop, site.survey)
            calls = WorkerCalls(site.run, lambda *_: 0, lambda *_: 0, set)
            executor = RetryingExecutor(config, store, pool, calls, on_gpus=False)
            process = psutil.Process()
            memory, cpu = process.memory_info().rss, sum(process.cpu_times()[:2])
            started = time.perf_counter()
            with ThreadPoolExecutor(1024) as threads:
                done = [v for v in threads.map(executor.run, experiments, range(num)) if v]
            seconds = time.perf_counter() - started
            executor.close()
            bound = shortest(experiments, num_gpus)
            rows.append(
                {
                    "datasets": num,
                    "GPUs": num_gpus,
                    "rows": len({v["experiment_id"] for v in done}),
                    "error rows": sum(v["status"] == "error" for v in done),
                    "workers died": site.num_deaths,
                    "nodes lost": site.num_lost,
                    "seconds": seconds,
                    "shortest possible": bound,
                    "lost to failures": site.seconds_lost / num_gpus,
                    "CPU ms a dataset": 1000 * (sum(process.cpu_times()[:2]) - cpu) / num,
                    "MB more": (process.memory_info().rss - memory) / 1e6,
                }
            )
        print(rows[-1], flush=True)
    common.report("the same pool and executor, workers that are threads", rows, options.json, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulate", action="store_true")
    parser.add_argument("--num", type=int, default=200, help="experiments that take no time, for the overhead")
    parser.add_argument("--scale", type=float, default=4.0, help="of the simulation's clock")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    (simulate if options.simulate else measure_on_ray)(options)


if __name__ == "__main__":
    main()
