"""What a worker computes with: its memory, and the rate of its matrix products, measured if it is on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Literal

import torch

from raylora.config.run import Config
from raylora.errors import UserError
from raylora.model.device import compute_dtype
from raylora.model.fp8 import CAPABILITY, no_fp8

Kernels = Literal["torch", "triton", "liger"]
"""What a GPU's passes are made of: torch's operations; attention of variable length and Triton's dropout, captured as
CUDA graphs; or these and liger's norms, rotary embeddings and SwiGLU."""


@dataclass(frozen=True)
class Hardware:
    """What a worker computes with."""

    device: str
    dtype_bytes: int
    """Of a number in matrix products."""
    memory_bytes: int
    """Of the worker's GPU, or of all its GPUs; of a shared GPU or a CPU each worker's share."""
    rate: float | None
    """Floating-point operations a second of large matrix products, of one worker; None where it is not known."""
    bandwidth: float | None = None
    """Bytes a second that a GPU reads or writes of its memory; None where it is not known, and on a CPU."""
    kernels: Kernels = "torch"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


ELSEWHERE = Hardware("cuda", 2, 2**63, None)
"""A GPU that cannot be measured from here, mostly a cluster's: no limit of memory, as the worker that has it checks."""


def hardware_of(config: Config) -> Hardware:
    """What a worker of the run will compute with. A cluster's machines cannot be measured from here: ``ELSEWHERE``.

    Raises:
        UserError: a worker is to have more GPUs than this machine has.
    """
    import psutil

    if config.address or _in_a_cluster():
        return ELSEWHERE
    if num_gpus := torch.cuda.device_count():
        config.check_gpus(num_gpus, "this machine")
        return lent(_local_gpu(), config.gpus_per_worker)
    workers, cores = config.num_workers or 1, os.cpu_count() or 1
    threads = min(config.threads or max(1, cores // workers), cores / workers)
    rate = matrix_rate(torch.device("cpu"), torch.float32, 1024) * threads / torch.get_num_threads()
    return Hardware("cpu", torch.float32.itemsize, psutil.virtual_memory().total // workers, rate)


def lent(gpu: Hardware, gpus_per_worker: float) -> Hardware:
    """What a worker has of such GPUs: a share of one, or the memory of several, of which one computes at a time."""
    if gpus_per_worker == 1 or gpu == ELSEWHERE:
        return gpu
    memory, share = int(gpu.memory_bytes * gpus_per_worker), min(1.0, gpus_per_worker)
    return replace(
        gpu,
        memory_bytes=memory,
        rate=gpu.rate and gpu.rate * share,
        bandwidth=gpu.bandwidth and gpu.bandwidth * share,
        kernels="torch" if gpus_per_worker > 1 else gpu.kernels,  # what lies on several GPUs is not captured
    )


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
        dtype_bytes, memory, rate, bandwidth, kernels = json.loads(process.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return ELSEWHERE
    return Hardware("cuda", dtype_bytes, memory, rate, bandwidth, kernels)


def measure_gpu() -> str:
    """This machine's GPUs as a JSON list: the fields of ``Hardware`` after ``device``.

    Memory is that of the smallest GPU, all else that of the first.
    """
    device = torch.device("cuda")
    dtype = compute_dtype(device)
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    # Several of 8192 at a time, 1.4 ms each on an H200: single ones of 4096 gave some 610 of its 785 TFLOP/s, as the
    # launch and the wait for the end are a fifth of 0.2 ms.
    rate = matrix_rate(device, dtype, 8192, num_products=3)
    bandwidth = copy_bandwidth(device, 2**29)
    return json.dumps([dtype.itemsize, memory, rate, bandwidth, kernels_for(torch.cuda.get_device_capability(), dtype)])


def kernels_for(capability: tuple[int, int], dtype: torch.dtype) -> Kernels:
    """What passes are made of on a GPU of this compute capability, with the packages that are installed.

    Attention of variable length is flash attention's: half precision, from Ampere (8.0) on.
    """
    if capability < (8, 0) or dtype.itemsize != 2 or not find_spec("triton"):
        return "torch"
    return "liger" if find_spec("liger_kernel") else "triton"


def matrix_rate(device: torch.device, dtype: torch.dtype, n: int, num_products: int = 1) -> float:
    """Floating-point operations a second of products of two n x n matrices, ``num_products`` at a time, the best of
    five."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(num_products):
            a @ b

    return num_products * 2 * n**3 / _best_seconds(products, device)


def copy_bandwidth(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that a copy of ``num_bytes`` within the device's memory reads and writes, the best of five."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / _best_seconds(lambda: target.copy_(source), device)


def _best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of ``run``, the best of five."""

    def seconds() -> float:
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    return min(seconds() for _ in range(5))


def gigabytes(num_bytes: float) -> str:
    """Bytes as text, in GB of 10^9 bytes."""
    return f"{num_bytes / 1e9:.1f} GB"
