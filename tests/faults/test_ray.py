"""Ray's processes are killed, the terminal goes away, SIGTERM comes early: the last line says so, no row is lost."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import time

import pandas as pd
import psutil
import pytest

from tests.helpers.fault_runs import NUM_DATASETS, assert_equal_rows, wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
SECONDS = 30
"""After a fault, a run has ended by then."""


def part_of(process: subprocess.Popen, title: str, timeout: float = 60) -> psutil.Process:
    """A process of a run's own Ray, as soon as there is one."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        for part in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if next(iter(part.cmdline()), "").strip().rpartition("/")[2] == title:
                    return part
        time.sleep(0.05)
    raise AssertionError(f"no {title} came")


def check_what_is_left(site, process: subprocess.Popen, code: int) -> str:
    """The last line of a run that was ended, with the tables of all that was finished, and no process."""
    shown, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == code, shown
    assert "Traceback" not in shown, shown
    wait_until_gone(site, timeout=10)
    num_done = site.num_done()
    if num_done:
        assert len(pd.read_csv(site.output / "results.csv")) == num_done
        assert len(pd.read_parquet(site.output / "results.parquet")) == num_done
    last = shown.splitlines()[-1]
    assert last.endswith("What is finished is kept: the same command resumes from here.")
    return last


@pytest.mark.parametrize("title", ["raylet", "gcs_server", "ray::DashboardAgent"])
def test_a_process_of_ray_that_is_killed_ends_the_run_with_a_line_and_all_rows(site, undisturbed, title):
    process = site.start()
    site.wait_for_rows(2)
    part_of(process, title).kill()
    last = check_what_is_left(site, process, 1)
    assert last.startswith("Ray broke down: its ")
    num_done = site.num_done()
    assert 2 <= num_done < NUM_DATASETS
    site.run()
    print(f"{num_done} rows, then: {last}")
    assert_equal_rows(site.rows(), undisturbed)


def test_a_run_whose_own_process_is_killed_has_its_rows_too(site):
    process = site.start()
    site.wait_for_rows(2)
    psutil.Process(process.pid).children()[0].kill()
    assert check_what_is_left(site, process, 1).startswith("The run's process was killed by SIGKILL")


def test_a_hangup_of_the_command_and_its_group_ends_nothing(site):
    process = site.start()
    site.wait_for_rows(1)
    for part in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            part.send_signal(signal.SIGHUP)
    os.killpg(process.pid, signal.SIGHUP)
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    assert len(site.rows()) == NUM_DATASETS


def test_a_terminal_that_is_closed_ends_nothing(site):
    pid, terminal = pty.fork()
    if not pid:
        os.execvpe(site.command()[0], site.command(), site.environment)
    shown = b""
    while b"[1/" not in shown:
        shown += os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert b"\x1b[" in shown, "at a terminal there is a live table"
    assert len(site.rows()) == NUM_DATASETS


def test_a_pipe_that_nobody_reads_any_more_ends_nothing(site):
    process = site.start()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=200) == 0
    assert len(site.rows()) == NUM_DATASETS


@pytest.mark.parametrize("title", ["", "gcs_server", "raylet"])
def test_sigterm_while_ray_starts_or_before_is_one_line_at_once(site, title):
    process = site.start()
    if title:
        part_of(process, title)
    else:
        time.sleep(1.5)  # torch is being imported
    process.terminate()
    started = time.monotonic()
    last = check_what_is_left(site, process, 143)
    assert last.startswith("Stopped by SIGTERM.")
    assert time.monotonic() - started < 10
