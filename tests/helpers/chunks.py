"""Small chunks of datasets, the options that run them in seconds, and runs of them in this process or as a command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from raylora.config.run import load_config
from raylora.console import make_console
from raylora.planning.plan import Plan, find_files, make_plan
from raylora.run.execute import run_plan

NUM_RECORDS = 8
OPTIONS = {
    "quantization": "none", "mmlu": "demo", "max_samples": 20, "num_epochs": 2, "batch_size": 2, "max_length": 256,
    "gradient_accumulation": 1, "learning_rate": 5e-3, "sample_size": 6, "probe_steps": 3, "threads": 1,
}  # fmt: skip
MOVING = ("_seconds", "_per_second", "peak_memory_bytes", "num_attempts")


def write_dataset(folder: Path, name: str, offset: int = 0, num: int = NUM_RECORDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {"question": f"What is {i} and {offset}?", "answer": f"It is {i + offset}. That is all."} for i in range(num)
    ]
    path = folder / f"{name}.json"
    path.write_text(json.dumps(records))
    return path


def planned(options, **more) -> Plan:
    """What a run of ``chunk_1`` would do."""
    config = load_config(**{**options, "chunk": "chunk_1", **more})
    chunk, files = find_files(config)
    return make_plan(config, files, chunk)


def run(options, **more):
    """The rows of a run in this process's Ray, by dataset."""
    rows = run_plan(planned(options, **more), make_console(quiet=True))
    assert len({row.values["experiment_id"] for row in rows}) == len(rows)
    return {row.values["dataset"]: row.values for row in rows}


def still(row):
    """A row without what every run has its own of."""
    return {k: v for k, v in row.items() if not k.endswith(MOVING)}


def command(options, *more: str) -> list[str]:
    words = [sys.executable, "-m", "raylora.batch", "--chunk", "chunk_1", *more]
    for key, value in options.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    return words
