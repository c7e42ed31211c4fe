"""What a worker computes with: its memory, and the rate of its matrix products, measured if it is on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass

import torch

from raylora.config import Config
from raylora.errors import UserError
from raylora.model.device import compute_dtype
from raylora.model.fp8 import CAPABILITY, no_fp8


@dataclass(frozen=True)
class Hardware:
    """What a worker computes with."""

    device: str
    dtype_bytes: int
    """Of a number in matrix products."""
    memory_bytes: int
    """Of the device; on a CPU each worker's share of it."""
    rate: float | None
    """Floating-point operations a second of large matrix products, of one worker; None where it is not known."""

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


ELSEWHERE = Hardware("cuda", 2, 2**63, None)
"""A GPU that cannot be measured from here, mostly a cluster's: no limit of memory, as the worker that has it checks."""


def hardware_of(config: Config) -> Hardware:
    """What a worker of the run will compute with. A cluster's machines cannot be measured from here: ``ELSEWHERE``."""
    import psutil

    if config.address or _in_a_cluster():
        return ELSEWHERE
    if torch.cuda.device_count():
        return _local_gpu()
    workers, cores = config.num_workers or 1, os.cpu_count() or 1
    threads = min(config.threads or max(1, cores // workers), cores / workers)
    rate = matrix_rate(torch.device("cpu"), torch.float32, 1024) * threads / torch.get_num_threads()
    return Hardware("cpu", torch.float32.itemsize, psutil.virtual_memory().total // workers, rate)


def check_fp8_here(config: Config) -> None:
    """Check that this machine multiplies fp8, where a run asks for that. A cluster's machines check it as they load.

    Raises:
        UserError: it does not.
    """
    if config.quantization != "fp8" or config.address or _in_a_cluster():
        return
    if not torch.cuda.device_count():
        raise UserError(no_fp8("a CPU"))
    code = "import torch; print(*torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
    try:  # in a process of its own, as in ``_local_gpu``
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        major, minor, name = process.stdout.strip().split(maxsplit=2)
    except (OSError, ValueError, subprocess.SubprocessError):
        return  # loading the model says what is wrong
    if (int(major), int(minor)) < CAPABILITY:
        raise UserError(no_fp8(name))


def _in_a_cluster() -> bool:
    """Whether the caller has initialized Ray. Not by an import: ``cluster/ray_run.py`` alone imports Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def _local_gpu() -> Hardware:
    """Measured in a process of its own: from its first use of a GPU on, a process takes memory there until it ends."""
    code = f"from {__name__} import measure_gpu; print(measure_gpu())"
    try:
        process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
        dtype_bytes, memory, rate = json.loads(process.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ELSEWHERE
    return Hardware("cuda", dtype_bytes, memory, rate)


def measure_gpu() -> str:
    """This machine's GPUs as a JSON list: bytes of a number, bytes of memory of the smallest, ``rate`` of the first."""
    device = torch.device("cuda")
    dtype = compute_dtype(device)
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return json.dumps([dtype.itemsize, memory, matrix_rate(device, dtype, 4096)])


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int) -> float:
    """Floating-point operations a second of a product of two n x n matrices, the best of five."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def seconds_of_product() -> float:
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return 2 * n**3 / min(seconds_of_product() for _ in range(5))
