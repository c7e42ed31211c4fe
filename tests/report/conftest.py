"""Runs whose pages are looked at: a large one, and odd ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from raylora.mmlu.questions import SUBJECT_GROUPS
from raylora.report.page import write_report
from tests.helpers.odd import ODD_RUNS
from tests.helpers.runs import dataset_names, write_run


@pytest.fixture(scope="session")
def forty(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "chunk_042"
    write_run(root, dataset_names(40), sizes=dict.fromkeys(SUBJECT_GROUPS, 30), num_failed=3)
    write_report(root)
    return root


@pytest.fixture(scope="session", params=ODD_RUNS)
def odd_run(request, tmp_path_factory) -> tuple[str, Path]:
    names, options, spoil = ODD_RUNS[request.param]
    root = tmp_path_factory.mktemp("odd") / "chunk_<odd>"
    write_run(root, names, **options)
    spoil(root)
    write_report(root)
    return request.param, root
