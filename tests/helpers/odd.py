"""Runs that are not as they should be, and names that are not to be trusted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd

NASTY = [
    "</script><script>document.title='owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "a & b \"quoted\" 'single' {{ 7*7 }}",
    "Ünïcode 数据集 \u202e \u2028",
]


def break_nothing(root: Path) -> None:
    pass


def remove_everything_but_the_table(root: Path) -> None:
    for name in ("experiments", "base"):
        shutil.rmtree(root / name)
    (root / "run.json").unlink()
    (root / "results.parquet").unlink()


def break_every_file(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file() and path.name not in {"results.csv", "report.html"}:
            path.write_bytes(b"\x00\xffgarbage")


def empty_the_table(root: Path) -> None:
    table = pd.read_parquet(root / "results.parquet").iloc[:0]
    table.to_parquet(root / "results.parquet")


def strip_the_table(root: Path) -> None:
    (root / "results.parquet").unlink()
    (root / "results.csv").write_text("name,score\nx,1\ny,\n")


ODD_RUNS = {
    "no good row": (["a", "b", "c"], {"num_failed": 3}, break_nothing),
    "no mmlu": (["a", "b", "c", "d", "e"], {"stages": ("features", "train")}, break_nothing),
    "features only": (["a", "b", "c", "d", "e"], {"stages": ("features",)}, break_nothing),
    "grid": (["a", "b"], {"grid": {"lora_r": [8, 16], "learning_rate": [1e-4, 2e-4]}}, break_nothing),
    "one dataset": (["a"], {}, break_nothing),
    "few questions": (["a", "b", "c", "d"], {"sizes": {"anatomy": 1, "virology": 1}}, break_nothing),
    "nasty names": (NASTY, {}, break_nothing),
    "nasty failures": (NASTY, {"num_failed": 4}, break_nothing),
    "table alone": (["a", "b", "c", "d", "e"], {}, remove_everything_but_the_table),
    "broken files": (["a", "b", "c", "d", "e"], {}, break_every_file),
    "no row": (["a"], {}, empty_the_table),
    "another table": (["a"], {}, strip_the_table),
}
