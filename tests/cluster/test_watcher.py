"""The process beside a run: exit codes, signals, what is written when the run's process is gone."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HEAD = """
import contextlib, os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from raylora.cluster.watcher import keep, ray_is_used, tell_ray_starts, watched
from raylora.errors import StoppedError
from raylora.run.interrupts import exit_on_sigterm

@dataclass
class Remains:
    path: Path
    def write(self):
        self.path.write_text("written")

def run(work):
    try:
        sys.exit(watched(work))
    except StoppedError as error:
        print(error)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)

def work():
    keep(Remains(Path(sys.argv[1])))
"""
IN_ORDER = """
    with contextlib.suppress(SystemExit), exit_on_sigterm(), ray_is_used():
        print("ready", flush=True)
        time.sleep(60)
    return 143
"""
WAIT = '    print("ready", flush=True)\n    time.sleep(60)\n'
RUN = "\nrun(work)\n"


def start(tmp_path: Path, body: str) -> subprocess.Popen[str]:
    code = HEAD + body + RUN
    return subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "left")], text=True, stdout=subprocess.PIPE)


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        ("    print('all'); return 3\n", 3, "all"),
        ("    os.kill(os.getpid(), signal.SIGKILL)\n", 1, "The run's process was killed by SIGKILL"),
        ("    os._exit(7)\n", 1, "The run's process ended with exit code 7"),
        ("    with ray_is_used(): os._exit(1)\n", 1, "Ray broke down: it ended the run's process."),
        ("    tell_ray_starts('/logs'); os._exit(1)\n", 1, "Ray does not start on this machine: it ended this run"),
    ],
)
def test_what_a_run_ends_with_is_passed_on_and_what_it_left_is_written(tmp_path, body, code, says):
    process = start(tmp_path, body)
    shown, _ = process.communicate(timeout=60)
    assert (process.returncode, shown.splitlines()[-1][: len(says)]) == (code, says)
    assert (tmp_path / "left").exists() == (code == 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_has_not_begun_is_ended_at_once_by_a_signal(tmp_path, number, code):
    process = start(tmp_path, WAIT)
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert (tmp_path / "left").exists()


def test_a_run_that_has_begun_ends_itself(tmp_path):
    process = start(tmp_path, IN_ORDER)
    process.stdout.readline()
    time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    process.terminate()
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert not (tmp_path / "left").exists()


def test_a_command_that_is_killed_takes_its_run_along(tmp_path):
    process = start(tmp_path, WAIT)
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=10)  # to the end of the run's output


@pytest.mark.slow
def test_a_signal_while_the_tables_are_written_ends_in_order(tmp_path):
    slowly = "print('writing', flush=True), time.sleep(60)"
    process = start(tmp_path, f"    os._exit(1)\n\nRemains.write = lambda self: ({slowly})\n")
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.1)
    assert process.poll() is None, "a terminal that is gone stops nothing"
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143


@pytest.mark.slow
def test_a_ray_that_was_ended_by_a_signal_leaves_no_files(tmp_path):
    logs = tmp_path / "rl-mine" / "ray" / "session_latest" / "logs"
    logs.mkdir(parents=True)
    (tmp_path / "rl-other").mkdir()
    process = start(tmp_path, f"    tell_ray_starts({str(logs)!r})\n{WAIT}")
    process.stdout.readline()
    process.terminate()
    process.communicate(timeout=30)
    assert not (tmp_path / "rl-mine").exists()
    assert (tmp_path / "rl-other").exists(), "that is another run's"
