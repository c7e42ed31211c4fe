"""The command itself is killed, interrupted or started twice: the same command goes on, nothing is lost or mixed."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.helpers.fault_runs import DATASETS, NUM_DATASETS, assert_equal_rows, processes_of, wait_until_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
NUM_KILLS = 20


def kill_at_random_moments(site, num_kills: int, seed: int) -> list[int]:
    """Start the run and kill it, again and again; how many rows there were after each time.

    Every third time while it is only starting, else a moment after another row came, in the middle of the next ones.
    """
    rng = random.Random(seed)
    counts = []
    for k in range(num_kills):
        process = site.start()
        if k % 3 and site.num_done() < NUM_DATASETS - 1:
            site.wait_for_rows(site.num_done() + 1)
            time.sleep(rng.uniform(0, 0.5))
        else:
            time.sleep(rng.uniform(0.5, 6))
        process.kill()
        process.communicate()
        counts.append(site.num_done())
    return counts


def check_that_it_goes_on(site, undisturbed, counts: list[int]) -> None:
    done = {p: p.stat().st_mtime_ns for p in site.output.glob("experiments/*/result.json")}
    site.run()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items()), "finished work was done again"
    assert_equal_rows(site.rows(), undisturbed)
    print(f"killed {len(counts)} times; rows after each: {counts}")
    assert counts == sorted(counts), "a row was lost"


def test_a_driver_killed_three_times_goes_on(shared_site, undisturbed):
    check_that_it_goes_on(shared_site, undisturbed, kill_at_random_moments(shared_site, 3, seed=1))


def test_a_driver_killed_at_twenty_random_moments_goes_on(shared_site, undisturbed):
    check_that_it_goes_on(shared_site, undisturbed, kill_at_random_moments(shared_site, NUM_KILLS, seed=2))


def test_a_driver_killed_with_a_ray_of_its_own_leaves_no_process(site, undisturbed):
    counts = kill_at_random_moments(site, 1, seed=3)
    wait_until_gone(site)
    check_that_it_goes_on(site, undisturbed, counts)
    wait_until_gone(site)


def test_ctrl_c_finishes_what_is_at_work_and_begins_nothing_new(shared_site, undisturbed):
    process = shared_site.start()
    shared_site.wait_for_rows(2)
    assert processes_of(shared_site, of_a_run=True), "they are not known by their titles: none will be missed"
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "Ctrl-C again stops now" in shown
    assert "the same command resumes from here" in shown
    assert "Traceback" not in shown
    num_done = shared_site.num_done()
    assert 2 <= num_done < NUM_DATASETS
    import pandas as pd

    assert len(pd.read_parquet(shared_site.output / "results.parquet")) == num_done
    check_that_it_goes_on(shared_site, undisturbed, [num_done])


def test_ctrl_c_at_a_terminal_reaches_every_process_and_ends_as_well(site, undisturbed):
    """A terminal sends it to all processes of its group: the command, and the Ray that it started."""
    process = site.start()
    site.wait_for_rows(2)
    os.killpg(process.pid, signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 130, shown
    assert "Traceback" not in shown
    wait_until_gone(site)
    check_that_it_goes_on(site, undisturbed, [site.num_done()])


def test_sigterm_leaves_tables_and_no_process(site, undisturbed):
    """As SLURM, Kubernetes and a shutdown send it. Ray's own handler would abort."""
    process = site.start()
    site.wait_for_rows(1)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode == 143, shown
    assert (site.output / "results.csv").is_file()
    wait_until_gone(site)
    check_that_it_goes_on(site, undisturbed, [site.num_done()])


def test_ctrl_c_twice_stops_now(shared_site, undisturbed):
    shared_site.strike({"stage": "train", "what": "hang", "datasets": DATASETS[:6], "times": 99})
    process = shared_site.start()
    shared_site.wait_for_rows(1)
    time.sleep(5)  # by now both workers hang
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "what hangs was not waited for"
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=15)
    assert process.returncode == 130, shown
    assert "the same command resumes from here" in shown
    assert "Traceback" not in shown
    shared_site.strike()
    check_that_it_goes_on(shared_site, undisturbed, [shared_site.num_done()])


def test_a_second_run_on_the_same_output_is_told_and_mixes_nothing(shared_site):
    long = {"num_epochs": 60}
    process = shared_site.start(**long)
    shared_site.wait_for_rows(1)
    told = shared_site.run(expect=2, **long)
    assert told.count("\n") == 1
    assert "another run is writing here (process " in told
    assert str(process.pid) in told
    shown, _ = process.communicate(timeout=200)
    assert process.returncode == 0, shown
    assert all(row["num_train_steps"] > 60 for row in shared_site.rows().values())


def test_a_run_whose_predecessor_was_killed_is_not_told_so(shared_site):
    process = shared_site.start()
    shared_site.wait_for_rows(1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (shared_site.output / "run.owner").exists()
    shared_site.run()
    shared_site.rows()
