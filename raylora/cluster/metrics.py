"""How a run is watched: metrics for Prometheus, and the titles of its processes. Does not import Ray.

``ray_run`` passes in Ray's instruments, the classes ``Counter`` and ``Gauge`` of ``ray.util.metrics``. Ray exposes the
numbers at the Prometheus endpoint of each node, some seconds late and with ``ray_`` before their names. No metric has
the dataset as a label: Prometheus keeps a series for each value of a label, and a run may have thousands of datasets.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from raylora.work_counts import work_counts

STATES = ("waiting", "running", "ok", "error")
ALMOST_ZERO = sys.float_info.min
"""What counters begin at, as Ray refuses a zero. They must begin before the first event: Prometheus counts from the
first number that it sees, and would never show the first retry of a counter that appears with a 1."""
SHOW_SECONDS = 2.0
"""Between two reports of how many experiments are in which state."""
MAX_NAME = 48
"""Characters of a dataset's name in a process title, whose room is that of the process's command line."""


@dataclass(frozen=True)
class Metric:
    """One of a run's metrics. Its name ends in its unit, a counter's in ``_total`` behind it."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    labels: tuple[str, ...]
    definition: str

    @property
    def exposed_name(self) -> str:
        """Its name in Prometheus."""
        return f"ray_{self.name}"

    def make(self, instruments: Any) -> Any:
        """Ray's counter or gauge of this metric; ``instruments`` is ``ray.util.metrics``."""
        kind = instruments.Counter if self.kind == "counter" else instruments.Gauge
        return kind(self.name, self.definition, self.labels)


_WORK_LABELS = ("worker", "stage")
EXPERIMENTS = Metric(
    "raylora_experiments", "gauge", "experiments", ("state",), f"{', '.join(STATES)}; without what was done before"
)
QUESTIONS = Metric(
    "raylora_questions_total", "counter", "questions", _WORK_LABELS, "MMLU's, answered; its rate: questions/s"
)
TOKENS = Metric(
    "raylora_supervised_tokens_total", "counter", "tokens", _WORK_LABELS, "learnt from; its rate: supervised tokens/s"
)
SECONDS = Metric(
    "raylora_stage_seconds_total", "counter", "seconds", _WORK_LABELS, "of workers; its rate: workers at a stage"
)
BACKOFFS = Metric(
    "raylora_oom_backoffs_total", "counter", "back-offs", _WORK_LABELS, "times that smaller batches had to be tried"
)
GPU_MEMORY = Metric("raylora_gpu_memory_bytes", "gauge", "bytes", ("worker",), "what PyTorch holds of the GPU")
RETRIES = Metric("raylora_retries_total", "counter", "tries", (), "experiments tried again: their worker failed")
METRICS = (EXPERIMENTS, QUESTIONS, TOKENS, SECONDS, BACKOFFS, GPU_MEMORY, RETRIES)


class WorkerMeter:
    """Counts a worker process's work by stage: questions, tokens, seconds, back-offs; and its GPU memory.

    Args:
        worker: the process's name, a label of every number.
        instruments: ``ray.util.metrics``.
    """

    def __init__(self, worker: str, instruments: Any) -> None:
        self._worker = worker
        self._counters = [(m.make(instruments), field) for m, field in _COUNTED.items()]
        self._gpu_memory = GPU_MEMORY.make(instruments)
        self._pending: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COUNTED.values(), 0.0))
        self._stages: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Start counting: work and time before this call belong to no stage."""
        self._since, self._before = time.perf_counter(), replace(work_counts)

    def worked(self, stage: str) -> None:
        """Count the work since the last call, or since ``begin``, for this stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            for counter, _ in self._counters:
                counter.inc(ALMOST_ZERO, self._labels(stage))
        now, done = time.perf_counter(), work_counts - self._before
        for name, value in {**vars(done), "seconds": now - self._since}.items():
            self._pending[stage][name] += value
        self._since, self._before = now, replace(work_counts)

    def show(self) -> None:
        """Report to Ray what was counted since the last call."""
        for stage, counts in self._pending.items():
            for counter, name in self._counters:
                if counts[name] > 0:  # Ray refuses a zero
                    counter.inc(counts[name], self._labels(stage))
        self._pending.clear()
        if (num_bytes := _gpu_bytes_held()) is not None:
            self._gpu_memory.set(num_bytes, {"worker": self._worker})

    def _labels(self, stage: str) -> dict[str, str]:
        return {"worker": self._worker, "stage": stage}


_COUNTED = {QUESTIONS: "questions", TOKENS: "supervised_tokens", BACKOFFS: "oom_backoffs", SECONDS: "seconds"}
"""The field of ``work_counts`` (or ``seconds``) behind each metric."""


def _gpu_bytes_held() -> int | None:
    """What PyTorch has reserved of the GPU; None where this process uses none."""
    import torch  # here, as the supervisor, which imports this module too, starts without it (1.2 s in place of 4 to 5)

    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else None


class RunMeter:
    """Counts a run's experiments by state, and its retries, and reports them every few seconds: Ray drops what is not
    repeated.

    Args:
        instruments: ``ray.util.metrics``.
        num_running: returns the number of experiments that workers run now.
    """

    def __init__(self, instruments: Any, num_experiments: int, num_running: Callable[[], int]) -> None:
        self._experiments, self._retries = EXPERIMENTS.make(instruments), RETRIES.make(instruments)
        self._num_experiments, self._num_running = num_experiments, num_running
        self._finished: list[str] = []  # states of rows; appending needs no lock
        self._retries.inc(ALMOST_ZERO)
        threading.Thread(target=self._show, daemon=True).start()

    def retried(self) -> None:
        """Count one experiment that is tried again."""
        self._retries.inc()

    def finished(self, state: str) -> None:
        """A row is there: ``ok`` or ``error``."""
        self._finished.append(state)

    def _show(self) -> None:
        while True:
            counts = {**dict.fromkeys(STATES, 0), **Counter(self._finished)}
            counts["running"] = self._num_running()
            counts["waiting"] = max(0, self._num_experiments - sum(counts.values()))
            for state, num in counts.items():
                self._experiments.set(num, {"state": state})
            time.sleep(SHOW_SECONDS)


def title(worker: str, dataset: str, stage: str, done: int, total: int) -> str:
    """A process title, such as ``raylora-gpu-3: dolly_07 · mmlu 62%``: one line, whatever the dataset is called."""
    share = f" {100 * done // total}%" if total else ""
    return f"{worker}: {_short(dataset)} · {stage}{share}"


def _short(name: str) -> str:
    printable = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return printable if len(printable) <= MAX_NAME else f"{printable[: MAX_NAME - 1]}…"
