"""Datasets that go away while a run goes on."""

from __future__ import annotations

import shutil

import pandas as pd
import pytest

from tests.helpers.fault_runs import DATASETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def start_and_wait_for_ray(site, tmp_path):
    """A run on data of its own, from when it has been planned."""
    site.data = shutil.copytree(site.data, tmp_path / "own")
    process = site.start("--stages", "features")
    for line in process.stdout:
        if "Ray dashboard" in line:
            return process
    raise AssertionError("Ray did not start")


def test_datasets_that_are_removed_are_error_rows_of_their_own(site, tmp_path):
    process = start_and_wait_for_ray(site, tmp_path)
    gone = DATASETS[3::4]  # the largest, which are the first
    for name in gone:
        (site.data / "chunk_1" / f"{name}.json").unlink()
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 1, shown
    table = pd.read_csv(site.output / "results.csv").set_index("dataset")
    assert sorted(table.index) == DATASETS
    failed = table[table["status"] == "error"]
    assert sorted(failed.index) == gone
    assert {*failed["error_kind"]} == {"dataset_gone"}


def test_a_folder_that_is_gone_ends_the_run_in_a_line(site, tmp_path):
    process = start_and_wait_for_ray(site, tmp_path)
    shutil.rmtree(site.data / "chunk_1")
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 1, shown
    assert shown.splitlines()[-1].endswith("What is finished is kept: the same command resumes from here.")
