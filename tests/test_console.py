"""Whatever names and errors hold, a line on the terminal is one line; and output whose reader goes away."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import pytest
from rich.table import Table

from raylora.console import clock, make_console, print_notes

EVIL = "a\x1b[2J\rb\nworker 1: forged\u202e"


def shown(what) -> str:
    out = io.StringIO()
    make_console(file=out, width=200).print(what)
    return out.getvalue()


def test_a_name_breaks_no_line():
    assert shown(f"worker 0: {EVIL} · train") == "worker 0: a\\x1b[2J\\rb\\nworker 1: forged\\u202e · train\n"
    out = io.StringIO()
    print_notes(make_console(file=out), [EVIL])
    assert len(out.getvalue().splitlines()) == 1


def test_nor_does_a_cell_a_header_or_a_title():
    table = Table(EVIL, title=EVIL, caption=EVIL)
    plain = Table("a", title="b", caption="c")
    table.add_row(EVIL)
    plain.add_row("d")
    text = shown(table)
    assert len(text.splitlines()) == len(shown(plain).splitlines())
    assert not set(text) & {"\x1b", "\r", "\u202e"}


def test_markup_and_secrets():
    assert shown("[x] :smile: https://u:hunter2@host") == "[x] :smile: https://...@host\n"


def test_durations():
    assert [clock(s) for s in (42, 200, 7500)] == ["42 s", "3 min 20 s", "2 h 5 min"]


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
