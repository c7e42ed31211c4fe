"""``run.json``: what was run, with which settings and versions, on which data and machine."""

from __future__ import annotations

import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from raylora import __version__
from raylora.planning.plan import Plan
from raylora.texts import shown_values

PACKAGES = ("raylora", "ray", "torch", "transformers", "peft", "bitsandbytes", "accelerate", "numpy", "scikit-learn")


def manifest_of(plan: Plan) -> dict[str, Any]:
    """The content of ``run.json``, without secrets."""
    manifest = {
        "chunk": plan.chunk,
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "configuration": plan.config.model_dump(mode="json"),
        "hashes": plan.hashes,
        "base_key": plan.experiments[0].base_key if plan.experiments else "",
        "data_hashes": {e.dataset: e.data_hash for e in plan.experiments},
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "machine": _describe_machine(),
    }
    shown: dict[str, Any] = shown_values(manifest)
    return shown


def version_of(package: str) -> str | None:
    """Of an installed package; None where it is not there."""
    if package == "raylora":  # what is imported, which need not be what is installed
        return __version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _describe_machine() -> dict[str, Any]:
    import psutil
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "cores": psutil.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
    }
