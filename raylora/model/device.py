"""The GPU or CPU that this process computes on: its name, the dtype of its products, its memory."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


def device_name() -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU (most compute bfloat16 10 to 30 times slower), bfloat16 on a GPU, float16 on an old one."""
    if device.type != "cuda":
        return torch.float32
    # torch can emulate bfloat16 on GPUs without it: float16, which they have in hardware, is better there.
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory in bytes: on a GPU since torch's peak counter was reset, on a CPU since the process began."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def keep_to_share(gpus_per_worker: float) -> None:
    """Keep this process to its share of a GPU's memory, beyond which torch says that memory is out.

    Without that, workers that share a GPU would each take what is free when they look, and fail one another.
    """
    if gpus_per_worker < 1:
        torch.cuda.set_per_process_memory_fraction(gpus_per_worker)


def free_bytes_of(gpus_per_worker: float) -> int:
    """Bytes that are free on a worker's GPUs together; of a shared one no more than its share."""
    if gpus_per_worker >= 1:
        return sum(torch.cuda.mem_get_info(number)[0] for number in range(int(gpus_per_worker)))
    free, total = torch.cuda.mem_get_info()
    return min(free, int(gpus_per_worker * total))


def cuda_devices() -> list[int]:
    """The GPU in use, as ``torch.random.fork_rng`` takes it; empty without one."""
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []


@contextlib.contextmanager
def waiting_is_refused() -> Iterator[None]:
    """Inside, torch raises a RuntimeError where the CPU would wait for the GPU, which no capture can have."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():  # torch says that this does not see every operation that waits
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
