"""raylora: which of these datasets makes my model better, and could I have known before training?

The names below are imported when they are first used, so that ``import raylora`` costs nothing, and ``load_results``
no torch.

Errors: all are a ``RayloraError``, whose ``kind`` is for programs. ``UserError``: something that you can fix, and the
line says where. ``MachineError``: this machine cannot do it. ``StoppedError``: the run ended early; the same call goes
on. A dataset that failed raises nothing in ``run`` and ``process_folder``: its row says why.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers, which see no further than this file
    from raylora.api import FineTuner as FineTuner
    from raylora.api import evaluate_mmlu as evaluate_mmlu
    from raylora.api import evaluate_mmlu_with_model as evaluate_mmlu_with_model
    from raylora.api import process_folder as process_folder
    from raylora.api import run_experiment as run_experiment
    from raylora.cluster.ray_run import load_dataset as load_dataset
    from raylora.errors import ErrorKind as ErrorKind
    from raylora.errors import MachineError as MachineError
    from raylora.errors import RayloraError as RayloraError
    from raylora.errors import StoppedError as StoppedError
    from raylora.errors import UserError as UserError
    from raylora.features.analyzer import DynamicProbeAnalyzer as DynamicProbeAnalyzer
    from raylora.features.analyzer import HyperParams as HyperParams
    from raylora.features.pipeline import FeatureExtractionPipeline as FeatureExtractionPipeline
    from raylora.features.static import StaticFeatureExtractor as StaticFeatureExtractor
    from raylora.report.transfer_tables import load_transfer as load_transfer
    from raylora.rows import load_results as load_results
    from raylora.run.from_python import Run as Run
    from raylora.run.from_python import run as run

__version__ = "0.1.0"
"""The only place that states it: pyproject.toml reads it here, so a checkout that was never installed knows it, too."""

_PUBLIC = {
    "FineTuner": "raylora.api",
    "evaluate_mmlu": "raylora.api",
    "evaluate_mmlu_with_model": "raylora.api",
    "process_folder": "raylora.api",
    "run_experiment": "raylora.api",
    "load_dataset": "raylora.cluster.ray_run",
    "ErrorKind": "raylora.errors",
    "MachineError": "raylora.errors",
    "RayloraError": "raylora.errors",
    "StoppedError": "raylora.errors",
    "UserError": "raylora.errors",
    "DynamicProbeAnalyzer": "raylora.features.analyzer",
    "HyperParams": "raylora.features.analyzer",
    "FeatureExtractionPipeline": "raylora.features.pipeline",
    "StaticFeatureExtractor": "raylora.features.static",
    "load_transfer": "raylora.report.transfer_tables",
    "load_results": "raylora.rows",
    "Run": "raylora.run.from_python",
    "run": "raylora.run",  # the package, which can be called
}
__all__ = [*sorted(_PUBLIC)]


if not TYPE_CHECKING:  # a type checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        if name not in _PUBLIC:  # with its module, so that Python can say what was meant
            raise AttributeError(f"module 'raylora' has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        module = importlib.import_module(_PUBLIC[name])
        return module if name == "run" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", *(name for name in globals() if name.startswith("__"))])
