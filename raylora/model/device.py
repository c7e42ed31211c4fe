"""What this process computes with."""

from __future__ import annotations

import torch


def device_name() -> str:
    """What this process computes with: the GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def compute_dtype(device: torch.device) -> torch.dtype:
    """float32 on a CPU (bfloat16 is 10 to 30 times slower there), bfloat16 on a GPU, float16 on an old one."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU since its counter was reset, on the CPU by this process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def cuda_devices() -> list[int]:
    return [torch.cuda.current_device()] if torch.cuda.is_available() else []
