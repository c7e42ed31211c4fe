"""A run's results in the JSON file of the research code, which users' scripts read."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from raylora.records import ResultRow
from raylora.storage.store import Store


def write_legacy_results(store: Store, chunk: str, max_samples: int | None, rows: list[ResultRow]) -> Path:
    """Write ``batch_mmlu_results_<chunk>_<time>.json``; returns where users find it."""
    now = datetime.now(UTC)
    stamp = now.strftime("%Y%m%d_%H%M%S")
    report = {
        "folder_name": chunk,
        "timestamp": stamp,
        "total_files": len(rows),
        "processed_files": sum(row.ok for row in rows),
        "max_samples": max_samples,
        "results": [legacy_result(row) for row in rows],
    }
    name = f"{safe_prefix(chunk)}_{stamp}.json"
    store.write_json(name, report)
    return store.place / name


def safe_prefix(chunk: str) -> str:
    """The beginning of the file's name, up to the time."""
    return "batch_mmlu_results_" + (re.sub(r"[^A-Za-z0-9_-]+", "_", chunk) or "chunk")


def legacy_result(row: ResultRow) -> dict[str, Any]:
    """One row as the nested result of the research code."""
    values = row.values
    prefixes = ("train_", "num_train", "peak_memory", "num_supervised")
    metrics = {name: value for name, value in values.items() if name.startswith(prefixes)}
    metrics["train_runtime"] = values.get("train_seconds")
    return {
        "dataset": values.get("dataset"),
        "status": values.get("status"),
        "error": values.get("error"),
        "training_info": {"training_metrics": metrics},
        "results": {
            "finetuned_model": _scores(values, ""),
            "base_model": _scores(values, "base_"),
        },
    }


def _scores(values: dict[str, Any], prefix: str) -> dict[str, Any]:
    names = ("overall_accuracy", "total_questions", "correct_questions")
    return {name: values.get(name if name == "total_questions" else prefix + name) for name in names}
