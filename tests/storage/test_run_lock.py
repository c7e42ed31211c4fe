"""One run at a time writes to an output on an object store."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading

import pytest

from raylora.errors import UserError
from raylora.storage import run_lock
from raylora.storage.objects import Remote
from raylora.storage.run_lock import RunLock


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run_lock, "RENEW_SECONDS", 0.2)
    monkeypatch.setattr(run_lock, "KEEP_SECONDS", 2.0)


def test_a_second_run_is_told_who_has_it_and_the_next_gets_it(remote, quick):
    told = pytest.raises(UserError, match=r"another run is writing here \(process \d+ on ")
    with RunLock(remote).held(), told, RunLock(remote).held():
        pass
    with RunLock(remote).held():
        assert remote.list("run.lock") == ["run.lock/00000001", "run.lock/00000002"]
    assert remote.list("run.lock") == ["run.lock/00000002"]


def test_a_dead_run_of_this_machine_is_known_at_once(remote, monkeypatch):
    script = (
        "import os; from raylora.storage.objects import Remote; from raylora.storage.run_lock import RunLock\n"
        f"with RunLock(Remote({remote.place!r})).held(): os._exit(1)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 1
    monkeypatch.setattr(run_lock, "KEEP_SECONDS", 1e9)
    with RunLock(remote).held():
        assert "run.lock/00000002" in remote.list("run.lock")


def leave_lock_of_another_machine(remote: Remote) -> None:
    """As a run leaves it that died there."""
    state = {"owner": "process 1 on elsewhere", "process": ["another machine", 1], "renewals": 3, "released": False}
    assert remote.create("run.lock/00000001", json.dumps(state).encode())


def test_a_dead_run_of_another_machine_is_waited_for(remote, quick):
    leave_lock_of_another_machine(remote)
    with RunLock(remote).held():
        assert "run.lock/00000002" in remote.list("run.lock")


@pytest.mark.slow
def test_who_slept_too_long_finds_that_it_was_taken_over(remote, quick):
    """SIGSTOP, as a laptop's lid or a virtual machine's host does it."""
    script = (
        "import time\n"
        "from raylora.storage import run_lock\n"
        "from raylora.storage.objects import Remote\n"
        f"run_lock.RENEW_SECONDS, run_lock.KEEP_SECONDS = {run_lock.RENEW_SECONDS}, {run_lock.KEEP_SECONDS}\n"
        f"lock = run_lock.RunLock(Remote({remote.place!r}))\n"
        "with lock.held():\n"
        "    print('held', flush=True)\n"
        "    while True:\n"
        "        lock.check()\n"
        "        time.sleep(0.05)\n"
    )
    sleeper = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert sleeper.stdout.readline() == "held\n"
        sleeper.send_signal(signal.SIGSTOP)
        with RunLock(remote).held():
            assert sleeper.poll() is None, "it does not know yet"
            sleeper.send_signal(signal.SIGCONT)
            _, said = sleeper.communicate(timeout=60)
            assert "LockLostError" in said
            assert "another run took it over" in said
            assert b'"released": false' in (remote.read("run.lock/00000001") or b""), "it touches nothing any more"
    finally:
        sleeper.kill()
        sleeper.wait()


@pytest.mark.slow
def test_of_many_who_wait_for_a_dead_run_one_gets_it(remote, quick):
    leave_lock_of_another_machine(remote)
    held, told = [], []
    all_done = threading.Barrier(4)

    def run() -> None:
        try:
            with RunLock(Remote(remote.place)).held():
                held.append(1)
                all_done.wait(60)
        except UserError:
            told.append(1)
            all_done.wait(60)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(held), len(told)) == (1, 3)
