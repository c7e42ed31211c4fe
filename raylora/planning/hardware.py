"""What a worker computes with: memory, and the rate of matrix products, measured where the run is on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from raylora.config import Config
from raylora.model.device import compute_dtype


@dataclass(frozen=True)
class Hardware:
    """What a worker computes with."""

    device: str
    dtype_bytes: int
    memory_bytes: int
    """Of the device, for one worker."""
    rate: float | None
    """Floating-point operations a second of large matrix products, for one worker; None where it is not known."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


ELSEWHERE = Hardware("cuda", 2, 2**63, None)
"""A GPU of a cluster: its memory is looked at by the worker that has it."""


def hardware_of(config: Config) -> Hardware:
    """What a worker of the run will have. A cluster's machines are not known here, nor how fast they are."""
    import psutil

    if config.address or _in_a_cluster():
        return ELSEWHERE
    if torch.cuda.device_count():
        return _local_gpu()
    workers, cores = config.num_workers or 1, os.cpu_count() or 1
    threads = min(config.threads or max(1, cores // workers), cores / workers)
    rate = matrix_rate(torch.device("cpu"), torch.float32, 1024) * threads / torch.get_num_threads()
    return Hardware("cpu", torch.float32.itemsize, psutil.virtual_memory().total // workers, rate)


def _in_a_cluster() -> bool:
    """Whether this process has joined a Ray of its own accord. ``scheduler.py`` alone imports it."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _local_gpu() -> Hardware:
    """In a process of its own, as the first use of a GPU takes memory on it until the process ends."""
    code = f"from {__name__} import measure_gpu; print(measure_gpu())"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        dtype_bytes, memory, rate = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ELSEWHERE
    return Hardware("cuda", dtype_bytes, memory, rate)


def measure_gpu() -> str:
    """Of the GPUs here: bytes of a number, the memory of the smallest, the rate of the first, as a JSON list."""
    device = torch.device("cuda")
    dtype = compute_dtype(device)
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return json.dumps([dtype.itemsize, memory, matrix_rate(device, dtype, 4096)])


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Floating-point operations a second of a product of two n x n matrices: the best of five."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return 2 * n**3 / min(once() for _ in range(5))
