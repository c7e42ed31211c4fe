"""Output whose reader goes away."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

CODE = """
import signal, sys, time
from raylora.console import make_console, outlasting_terminal
before = signal.getsignal(signal.SIGHUP)
with outlasting_terminal():
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    for stream in (sys.stdout, sys.stderr):
        print("first", file=stream, flush=True)
    sys.stdin.read()
    console = make_console()
    for _ in range(3):
        console.print("lost " * 5000)
        print("lost", file=sys.stderr)
assert signal.getsignal(signal.SIGHUP) == before
sys.exit(3)
"""


@pytest.mark.parametrize("ignored", [False, True])
def test_a_program_goes_on_when_its_pipes_are_closed(ignored):
    def ignore() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)  # as nohup does

    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, "-c", CODE], stdin=pipe, stdout=pipe, stderr=pipe, text=True, preexec_fn=ignore
    )
    assert process.stdout.readline() == process.stderr.readline() == "first\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(timeout=30) == 3


def test_a_log_on_a_full_disk_ends_nothing():
    with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
        process = subprocess.run([sys.executable, "-c", CODE], stdin=subprocess.DEVNULL, stdout=full, check=False)
    assert process.returncode == 3
