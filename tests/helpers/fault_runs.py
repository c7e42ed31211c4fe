"""Runs of one chunk of twelve experiments as people start them, and what must hold of each, whatever went wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import psutil

from tests.helpers import ROOT

NUM_DATASETS = 12
DATASETS = [f"data_{i:02d}" for i in range(NUM_DATASETS)]
OPTIONS = {
    "quantization": "none", "mmlu": "demo", "max_samples": 20, "num_epochs": 2, "batch_size": 2, "max_length": 256,
    "gradient_accumulation": 1, "learning_rate": 5e-3, "sample_size": 6, "probe_steps": 3, "threads": 1,
}  # fmt: skip
INJECT = ROOT / "tests" / "faults" / "inject"
MOVING = ("_seconds", "_per_second", "peak_memory_bytes", "num_attempts")
"""What every run has its own of."""


def write_chunk(root: Path, num_records: int = 6) -> Path:
    """``root/chunk_1``: twelve datasets of different sizes."""
    folder = root / "chunk_1"
    folder.mkdir(parents=True)
    for k, name in enumerate(DATASETS):
        records = [
            {"question": f"What is {i} and {k}?", "answer": f"It is {i + k}. That is all."}
            for i in range(num_records + k % 4)
        ]
        (folder / f"{name}.json").write_text(json.dumps(records))
    return root


@dataclass
class Site:
    """Where a test's runs happen: data, results, the faults that strike there, and the Ray that runs them."""

    data: Path
    results: Path
    model: Path
    faults: Path
    environment: dict[str, str]
    address: str | None = None

    @property
    def output(self) -> Path:
        return self.results / "chunk_1"

    def strike(self, *faults: dict[str, Any]) -> None:
        """From now on these faults, and no others."""
        for fired in self.faults.glob("fired-*"):
            fired.unlink()
        (self.faults / "faults.json").write_text(json.dumps(faults))

    def num_fired(self) -> int:
        return len(list(self.faults.glob("fired-*")))

    def command(self, *more: str, **options: Any) -> list[str]:
        words = [sys.executable, "-m", "raylora.batch", "--chunk", "chunk_1", *more]
        given = {**OPTIONS, "data_root": self.data, "output": self.results, "model": self.model, **options}
        if self.address:
            given["address"] = self.address
        else:
            given.setdefault("num_workers", 2)
        for key, value in given.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        return words

    def start(self, *more: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.command(*more, **options), env=self.environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def run(self, *more: str, expect: int = 0, **options: Any) -> str:
        """What a run prints, to its end."""
        process = self.start(*more, **options)
        try:
            shown, _ = process.communicate(timeout=400)
        finally:
            process.kill()
        assert process.returncode == expect, shown
        assert "Traceback" not in shown, shown
        return shown

    def num_done(self) -> int:
        return len(list(self.output.glob("experiments/*/result.json")))

    def wait_for_rows(self, num: int, timeout: float = 120) -> None:
        deadline = time.time() + timeout
        while self.num_done() < num:
            assert time.time() < deadline, "no row came"
            time.sleep(0.02)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The table's rows by dataset: no row lost, none doubled, both tables alike, nothing left lying about."""
        table = pd.read_parquet(self.output / "results.parquet")
        assert sorted(table["dataset"]) == DATASETS
        assert sorted(pd.read_csv(self.output / "results.csv")["dataset"]) == DATASETS
        left = [p for p in self.output.rglob("*") if ".partial-" in p.name or p.suffix in {".journal", ".permit"}]
        assert not left
        assert not (self.output / "run.owner").exists()
        wait_until_gone(self, of_a_run=True)
        return {row["dataset"]: row for row in table.astype(object).where(table.notna(), None).to_dict("records")}


def still(row: dict[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    return {k: v for k, v in row.items() if not k.endswith(MOVING) and k not in set(without)}


def assert_equal_rows(
    rows: dict[str, dict[str, Any]], reference: dict[str, dict[str, Any]], but: Iterable[str] = ()
) -> None:
    """To the last digit: the same seeds, the same batches, the same threads."""
    different = [name for name in DATASETS if name not in set(but) and still(rows[name]) != still(reference[name])]
    assert not different, {
        name: {k: (v, reference[name][k]) for k, v in still(rows[name]).items() if v != reference[name][k]}
        for name in different
    }


def environment(faults: Path, **more: str) -> dict[str, str]:
    """That of processes in which faults may strike."""
    path = os.pathsep.join([str(INJECT), str(ROOT)])
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 32}
    return {**os.environ, "PYTHONPATH": path, "RAYLORA_FAULTS": str(faults), **token, **more}


ACTORS = ("RayWorker", "raylora-", "MapWorker", "Board", "Write")
"""What the titles of a run's processes have in them, where Ray itself goes on without it."""


def processes_of(site: Site, of_a_run: bool) -> list[psutil.Process]:
    """Processes that were started in the site's environment and live on.

    Args:
        of_a_run: those alone that a run has, and not the Ray that was there before it.
    """
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("RAYLORA_FAULTS") == str(site.faults) and process.status() != "zombie":
                title = " ".join(process.cmdline())
                if not of_a_run or (title.startswith("ray::") and any(name in title for name in ACTORS)):
                    found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def wait_until_gone(site: Site, timeout: float = 60, of_a_run: bool = False) -> None:
    deadline = time.time() + timeout
    while left := processes_of(site, of_a_run):
        assert time.time() < deadline, [p.cmdline() for p in left]
        time.sleep(0.2)
