"""The report's page and its command, without a browser."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys

import pytest

from raylora.console import make_console
from raylora.report.page import try_write_report
from raylora.storage.store import Store


def test_names_are_escaped(odd_run):
    _, root = odd_run
    page = (root / "report.html").read_text(encoding="utf-8")
    assert page.count("<script") == 2
    assert "<img" not in page
    assert "chunk_<odd>" not in page
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page), "the page asks for something from elsewhere"


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


def test_a_report_that_fails_is_one_line_and_no_more(tmp_path):
    out = io.StringIO()
    (tmp_path / "results.csv").write_text("dataset\nx\n")
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "file").touch()
    try_write_report(Store(tmp_path), make_console(file=out, width=300))
    assert out.getvalue().startswith("Warning: no report.html (")
    assert len(out.getvalue().splitlines()) == 1
    assert not list(tmp_path.glob(".partial-*"))
