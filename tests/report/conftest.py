"""Runs that are not as they should be, with their pages."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.report.page import write_report
from tests.helpers.odd import ODD_RUNS
from tests.helpers.runs import write_run


@pytest.fixture(scope="session", params=ODD_RUNS)
def odd_run(request, tmp_path_factory) -> tuple[str, Path]:
    names, options, spoil = ODD_RUNS[request.param]
    root = tmp_path_factory.mktemp("odd") / "chunk_<odd>"
    write_run(root, names, **options)
    spoil(root)
    write_report(root)
    return request.param, root
