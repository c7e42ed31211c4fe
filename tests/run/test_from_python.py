"""``raylora.run``, and what it returns."""

from __future__ import annotations

import re

import pytest

import raylora
from raylora.errors import UserError
from raylora.run.from_python import Run
from tests.helpers.chunks import write_dataset


def test_a_run_of_another_day_is_read_from_its_folder(forty):
    run = Run(forty)
    assert len(run.table) == 40
    assert run.best["accuracy_change"] == run.table["accuracy_change"].max()
    assert run.report == forty / "report.html"
    assert re.search(r"37 of 40 rows succeeded; \d+ of 37 datasets better, \d+ worse .* the best: \w+ \+", repr(run))
    page = run._repr_html_()
    assert page.count("<tr>") == 11
    assert len(page) < 5000
    with pytest.raises(UserError, match=r"no results\.csv"):
        Run(forty / "experiments")


@pytest.mark.slow
def test_a_folder_is_run_by_its_path(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "mine", "data")
    (tmp_path / "mine" / "<i>bad.json").write_text("{")
    run = raylora.run(tmp_path / "mine", **options)
    assert run.folder == tmp_path / "results" / "mine"
    assert run.best["dataset"] == "data"
    assert "1 of 2 rows succeeded" in repr(run)
    assert "&lt;i&gt;bad failed: " in run._repr_html_()
    single = raylora.run(tmp_path / "mine" / "data.json", **options)
    assert list(single.table["dataset"]) == ["data"]


@pytest.mark.parametrize("name", ["nowhere", "1"])
def test_a_folder_that_is_not_there_is_one_line(options, tmp_path, name):
    write_dataset(tmp_path / "data" / "chunk_x", "data")
    (tmp_path / "1").mkdir()
    folder = name if name == "nowhere" else tmp_path / name
    with pytest.raises(UserError, match=r"not in|another name"):
        raylora.run(folder, **options)
