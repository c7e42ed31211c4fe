"""A Ray that cannot start is one line; what can be put right is."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
import pytest

from raylora.cluster.ray_folder import RayFolder
from raylora.cluster.ray_start import MAX_STARTS, check_limits, keep_token, start
from raylora.errors import UserError


def test_limits_are_one_line_with_their_fix(monkeypatch):
    check_limits()
    limits = {resource.RLIMIT_NOFILE: (64, 64), resource.RLIMIT_AS: (3 * 2**30, 3 * 2**30)}
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, none))
    with pytest.raises(UserError, match="ulimit -n 64: too few open files for Ray: ulimit -n 4096"):
        check_limits()
    del limits[resource.RLIMIT_NOFILE]
    with pytest.raises(UserError, match=r"ulimit -v 3145728: .* ulimit -v unlimited"):
        check_limits()


def test_a_home_that_cannot_be_written_leaves_the_token_beside_the_results(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    former = os.umask(0)
    try:
        assert keep_token(tmp_path / "out") == "ray get-auth-token"
    finally:
        os.umask(former)
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    usual = tmp_path / "home" / ".ray" / "auth_token"
    assert (len(usual.read_text()), stat.S_IMODE(usual.stat().st_mode)) == (64, 0o600)
    usual.chmod(0o644)  # as Ray makes it
    keep_token(tmp_path / "out")
    assert stat.S_IMODE(usual.stat().st_mode) == 0o600
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    path = tmp_path / "out" / "ray_auth_token"
    assert keep_token(tmp_path / "out") == f"in {path}"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    token = path.read_text()
    assert len(token) == 64
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert keep_token(tmp_path / "out") == f"in {path}"
    assert path.read_text() == token, "another run's Ray may be using it"
    path.chmod(0o644)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    keep_token(tmp_path / "out")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == str(path)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")


def test_a_slow_node_is_waited_for_and_what_ray_raises_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    calls, down = [], []

    def slow(**options):
        calls.append(options)
        if len(calls) < MAX_STARTS:
            raise Exception("The current node timed out during startup.\nThis could happen")
        return "started"

    folder = RayFolder(Path("/tmp/rl-1/ray"))
    assert start(slow, lambda: down.append(1), folder) == "started"
    assert calls == [{"_temp_dir": "/tmp/rl-1/ray"}] * MAX_STARTS
    assert not folder.keep
    assert len(down) == MAX_STARTS - 1

    def broken(**options):
        raise OSError("no\nsuch thing")

    with pytest.raises(
        UserError, match=r"^Ray does not start on this machine: .*no such thing .*tried for 0 s"
    ) as raised:
        start(broken, lambda: None, folder)
    assert folder.keep, "its logs say why"
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_run_goes_on_with_a_long_folder_and_no_home(tiny_model_folder, tmp_path):
    """Real: TMPDIR as a batch system sets it, and a home folder that is a file."""
    from tests.helpers.chunks import OPTIONS, command, write_dataset

    write_dataset(tmp_path / "data" / "chunk_1", "a")
    long = tmp_path / ("a" * 90)
    long.mkdir()
    (tmp_path / "home").write_text("")
    options = {**OPTIONS, "model": tiny_model_folder, "data_root": tmp_path / "data", "output": tmp_path / "out"}
    environment = {**os.environ, "TMPDIR": str(long), "HOME": str(tmp_path / "home")}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_TMPDIR"):
        environment.pop(name, None)
    words = command(options, "--stages", "features")
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"(token: in {tmp_path / 'out' / 'ray_auth_token'})" in " ".join(done.stdout.split())


@pytest.mark.slow
def test_a_ray_of_its_own_listens_on_loopback_alone_and_leaves_nothing(tiny_model_folder, tmp_path):
    """Real: with a umask of 0, every socket of every process of the run, and every file that is there afterwards."""
    from tests.helpers.chunks import OPTIONS, command, write_dataset

    for name in ("a", "b", "c", "d"):
        write_dataset(tmp_path / "data" / "chunk_1", name)
    place = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    options = {**OPTIONS, "model": tiny_model_folder, "data_root": tmp_path / "data", "output": tmp_path / "out"}
    environment = {**os.environ, "RAY_TMPDIR": str(place), "HOME": str(tmp_path / "home")}
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        environment.pop(name, None)
    run = subprocess.Popen(
        command(options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, umask=0
    )
    seen, modes = set(), set()
    try:
        while run.poll() is None:
            seen |= listening(run.pid)
            for path in (*place.iterdir(), *(tmp_path / "home" / ".ray").glob("*")):
                with contextlib.suppress(FileNotFoundError):
                    modes.add((path.name[:3], stat.S_IMODE(path.lstat().st_mode)))
            time.sleep(0.2)
    finally:
        run.kill()
        shown = run.communicate()[0]
    try:
        assert run.returncode == 0, shown
        assert len({port for _, port in seen}) > 8, "they were not looked at"
        assert {address for address, _ in seen} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
        assert modes == {("rl-", 0o700), ("aut", 0o600)}
        assert not [*place.iterdir()], "files of Ray are left"
    finally:
        shutil.rmtree(place)


def listening(pid: int) -> set[tuple[str, int]]:
    """Addresses and ports at which a process, or one that it started, listens."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                sockets = process.net_connections(kind="inet")
                found |= {(s.laddr.ip, s.laddr.port) for s in sockets if s.status == psutil.CONN_LISTEN}
    return found
