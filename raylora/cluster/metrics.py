"""What a run shows of itself: metrics for Prometheus, and the titles of its processes. Knows nothing of Ray.

The scheduler hands in Ray's instruments: the classes ``Counter`` and ``Gauge`` of ``ray.util.metrics``. Ray carries the
numbers to the Prometheus endpoint of their node, some seconds late and with ``ray_`` before their names. No label has a
value for each dataset: what Prometheus keeps must not grow with what is run.
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
SHOW_SECONDS = 2.0
"""How often it is said how many experiments are in which state."""
BARELY = sys.float_info.min
"""What counters begin at, as Ray refuses a zero. Prometheus takes the first number that it finds for where a counter
began: one that appeared with its first retry would never show that retry."""
MAX_NAME = 48
"""Characters of a dataset's name in a title: the room for titles is that of the process's command line."""


@dataclass(frozen=True)
class Metric:
    """A number that runs show. Its name ends in its unit; a counter's ends in ``_total`` besides."""

    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    labels: tuple[str, ...]
    definition: str

    @property
    def exposed_name(self) -> str:
        """What Prometheus calls it."""
        return f"ray_{self.name}"

    def make(self, instruments: Any) -> Any:
        """Something of Ray's to count with, or to set."""
        kind = instruments.Counter if self.kind == "counter" else instruments.Gauge
        return kind(self.name, self.definition, self.labels)


_OF_WORK = ("worker", "stage")
EXPERIMENTS = Metric(
    "raylora_experiments", "gauge", "experiments", ("state",), f"{', '.join(STATES)}; without what was done before"
)
QUESTIONS = Metric(
    "raylora_questions_total", "counter", "questions", _OF_WORK, "MMLU's, answered; its rate: questions/s"
)
TOKENS = Metric(
    "raylora_supervised_tokens_total", "counter", "tokens", _OF_WORK, "learnt from; its rate: supervised tokens/s"
)
SECONDS = Metric(
    "raylora_stage_seconds_total", "counter", "seconds", _OF_WORK, "of workers; its rate: workers at a stage"
)
BACKOFFS = Metric(
    "raylora_oom_backoffs_total", "counter", "back-offs", _OF_WORK, "times that smaller batches had to be tried"
)
GPU_MEMORY = Metric("raylora_gpu_memory_bytes", "gauge", "bytes", ("worker",), "what PyTorch holds of the GPU")
RETRIES = Metric("raylora_retries_total", "counter", "tries", (), "experiments begun anew: their worker failed")
METRICS = (EXPERIMENTS, QUESTIONS, TOKENS, SECONDS, BACKOFFS, GPU_MEMORY, RETRIES)


class WorkerMeter:
    """Counts what this process does, by stage.

    Args:
        worker: its name, a label of every number.
    """

    def __init__(self, worker: str, instruments: Any) -> None:
        self._worker = worker
        self._counters = [(m.make(instruments), field) for m, field in _COUNTED.items()]
        self._gpu_memory = GPU_MEMORY.make(instruments)
        self._waiting: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(_COUNTED.values(), 0.0))
        self._stages: set[str] = set()
        self.begin()

    def begin(self) -> None:
        """Work begins: what was before belongs to no stage."""
        self._since, self._before = time.perf_counter(), replace(work_counts)

    def worked(self, stage: str) -> None:
        """What was done since the last call, or the beginning, was for this stage."""
        if stage not in self._stages:
            self._stages.add(stage)
            for counter, _ in self._counters:
                counter.inc(BARELY, self._labels(stage))
        now, done = time.perf_counter(), work_counts - self._before
        for name, value in {**vars(done), "seconds": now - self._since}.items():
            self._waiting[stage][name] += value
        self._since, self._before = now, replace(work_counts)

    def show(self) -> None:
        """Hand to Ray what was counted since the last time."""
        for stage, counts in self._waiting.items():
            for counter, name in self._counters:
                if counts[name] > 0:  # Ray refuses a zero
                    counter.inc(counts[name], self._labels(stage))
        self._waiting.clear()
        if (held := _gpu_memory_held()) is not None:
            self._gpu_memory.set(held, {"worker": self._worker})

    def _labels(self, stage: str) -> dict[str, str]:
        return {"worker": self._worker, "stage": stage}


_COUNTED = {QUESTIONS: "questions", TOKENS: "supervised_tokens", BACKOFFS: "oom_backoffs", SECONDS: "seconds"}
"""What a worker counts, by its name here."""


def _gpu_memory_held() -> int | None:
    import torch  # the supervisor, which counts no work, does without it

    return torch.cuda.memory_reserved() if torch.cuda.is_initialized() else None


class RunMeter:
    """Counts what becomes of a run's experiments, and shows it every few seconds: Ray forgets what is not said again.

    Args:
        num_running: tells how many experiments workers run now.
    """

    def __init__(self, instruments: Any, num_experiments: int, num_running: Callable[[], int]) -> None:
        self._experiments, self._retries = EXPERIMENTS.make(instruments), RETRIES.make(instruments)
        self._num_experiments, self._num_running = num_experiments, num_running
        self._finished: list[str] = []  # states of rows; appending needs no lock
        self._retries.inc(BARELY)
        threading.Thread(target=self._show, daemon=True).start()

    def retried(self) -> None:
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
    """``raylora-gpu-3: dolly_07 · mmlu 62%``: one line, whatever the dataset is called."""
    share = f" {100 * done // total}%" if total else ""
    return f"{worker}: {_short(dataset)} · {stage}{share}"


def _short(name: str) -> str:
    printable = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    return printable if len(printable) <= MAX_NAME else f"{printable[: MAX_NAME - 1]}…"
