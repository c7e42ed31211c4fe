"""Runs that are not as they should be, with their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.report.page import write_report
from tests.helpers.odd import ODD_RUNS
from tests.helpers.runs import letter_scores, write_run


@pytest.fixture(scope="session", params=ODD_RUNS)
def odd_run(request, tmp_path_factory) -> tuple[str, Path]:
    names, options, spoil = ODD_RUNS[request.param]
    root = tmp_path_factory.mktemp("odd") / "chunk_<odd>"
    write_run(root, names, **options)
    spoil(root)
    write_report(root)
    return request.param, root


@pytest.fixture(scope="session")
def letters_run(tmp_path_factory) -> Path:
    """A base that always answers A; one adapter that always answers D, and one that knows most answers."""
    root = tmp_path_factory.mktemp("letters") / "chunk_letters"
    write_run(root, ["only_letters", "knowledge"], scores=letter_scores())
    write_report(root)
    return root
