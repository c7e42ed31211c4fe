"""Disks that are full or cannot be written to: one line, nothing torn, and the same command goes on with more room."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

from tests.helpers.fault_runs import DATASETS, assert_equal_rows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def small_disk(shared_site) -> Iterator[object]:
    """The results lie on a disk of their own, of about a MiB."""
    shared_site.results.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(shared_site.results)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield shared_site
    subprocess.run(["umount", "-l", str(shared_site.results)], check=True)


def remount(site, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(site.results)], check=True)


def test_a_full_disk_stops_the_run_in_one_line_and_loses_nothing(small_disk, undisturbed):
    shown = small_disk.run(expect=1)
    last = shown.strip().splitlines()[-1]
    assert "No space left on device" in last
    assert "the same command resumes from here" in last
    num_done = small_disk.num_done()
    assert 0 < num_done < len(undisturbed)
    remount(small_disk, "size=300m")
    small_disk.run()
    print(f"{num_done} rows before the disk was full, {len(small_disk.rows())} in the end")
    assert_equal_rows(small_disk.rows(), undisturbed)


def test_a_disk_with_room_for_rows_and_not_for_adapters_gives_no_error_rows(small_disk, undisturbed):
    """Adapters are written by safetensors, which says what is wrong in words of its own."""
    shown = small_disk.run(expect=1, lora_r=400)
    assert "No space left on device" in shown.strip().splitlines()[-1]
    assert small_disk.num_done() == 0
    remount(small_disk, "size=300m")
    small_disk.run()
    assert_equal_rows(small_disk.rows(), undisturbed)


def test_a_disk_that_becomes_read_only_in_mid_run_is_the_last_line(small_disk):
    remount(small_disk, "size=300m")
    process = small_disk.start()
    small_disk.wait_for_rows(1)
    place = str(small_disk.results)  # what has the disk's own files open forbids to remount it: over it, another view
    subprocess.run(["mount", "--bind", place, place], check=True)
    if subprocess.run(["mount", "-o", "remount,bind,ro", place], capture_output=True, check=False).returncode:
        process.terminate()
        process.communicate(timeout=60)
        subprocess.run(["umount", "-l", place], check=True)
        pytest.skip("this machine cannot make a disk in use read-only")
    shown, _ = process.communicate(timeout=120)
    assert process.returncode == 1, shown
    assert "Traceback" not in shown, shown
    last = shown.splitlines()[-1]
    assert "Read-only file system: make room" in last
    assert last.endswith("What is finished is kept: the same command resumes from here.")
    subprocess.run(["umount", "-l", place], check=True)
    small_disk.run()
    assert len(small_disk.rows()) == len(DATASETS)


def test_a_folder_that_is_removed_in_mid_run_costs_no_row(site):
    """Finished experiments have lost their files, and their rows are in the tables all the same."""
    process = site.start()
    site.wait_for_rows(2)
    shutil.rmtree(site.results, ignore_errors=True)
    shown, _ = process.communicate(timeout=200)
    assert "Traceback" not in shown, shown
    if process.returncode:
        assert shown.splitlines()[-1].endswith("the same command resumes from here.")
    site.run()
    assert len(site.rows()) == len(DATASETS)


def test_a_folder_that_cannot_be_written_to_is_one_line(small_disk):
    remount(small_disk, "ro")
    told = small_disk.run(expect=2)
    assert told.count("\n") == 1
    assert "cannot be written to: Read-only file system" in told
