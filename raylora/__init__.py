"""raylora: which of these datasets makes my model better, and could I have known before training?

The names below are imported when they are first used, so that ``import raylora`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"
"""The only place that states it: pyproject.toml reads it here, so a checkout that was never installed knows it, too."""

_PUBLIC = {
    "FineTuner": "raylora.api",
    "evaluate_mmlu": "raylora.api",
    "evaluate_mmlu_with_model": "raylora.api",
    "process_folder": "raylora.api",
    "run_experiment": "raylora.api",
    "load_dataset": "raylora.cluster.ray_run",
    "load_results": "raylora.rows",
    "load_transfer": "raylora.report.transfer_tables",
    "DynamicProbeAnalyzer": "raylora.features.analyzer",
    "FeatureExtractionPipeline": "raylora.features.pipeline",
    "MachineError": "raylora.errors",
    "HyperParams": "raylora.features.analyzer",
    "StaticFeatureExtractor": "raylora.features.static",
    "UserError": "raylora.errors",
}
__all__ = [*sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'raylora' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
