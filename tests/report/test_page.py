"""The report's page, without a browser."""

from __future__ import annotations

import io
import re

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


def test_a_report_that_fails_is_one_line_and_no_more(tmp_path):
    out = io.StringIO()
    (tmp_path / "results.csv").write_text("dataset\nx\n")
    (tmp_path / "report.html").mkdir()
    (tmp_path / "report.html" / "file").touch()
    try_write_report(Store(tmp_path), make_console(file=out, width=300))
    assert out.getvalue().startswith("Warning: no report.html (")
    assert len(out.getvalue().splitlines()) == 1
    assert not list(tmp_path.glob(".partial-*"))
