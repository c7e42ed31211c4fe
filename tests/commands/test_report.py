"""``python -m raylora.report``."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest


def run_command(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "raylora.report", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_the_command_writes_the_page_anew(forty, tmp_path):
    root = shutil.copytree(forty, tmp_path / "chunk_042")
    (root / "report.html").unlink()
    result = run_command(str(root), "--price", "2.5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(root / "report.html")
    assert '"price":2.5' in (root / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["nowhere"], "nowhere: no results.csv in it"), ([".", "--price", "-1"], "--price: input should be greater")],
)
def test_wrong_use_of_the_command_is_one_line(arguments, expected):
    result = run_command(*arguments)
    assert result.returncode == 2
    assert expected in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
