"""A Ray that cannot start is one line; what can be put right is."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest

from raylora.cluster.ray_start import MAX_STARTS, check_machine, keep_token, start, temp_folder
from raylora.errors import UserError


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_folder_whose_name_is_too_long_for_sockets_is_not_taken(monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert temp_folder() == Path("/tmp/ray")
    monkeypatch.setenv(variable, "/scratch/me")
    assert temp_folder() == Path("/scratch/me/ray")
    monkeypatch.setenv(variable, f"/scratch/{'a' * 90}")
    assert temp_folder() == Path("/tmp/ray")


def test_limits_and_full_disks_are_one_line_with_their_fix(monkeypatch, tmp_path):
    folder = tmp_path / "ray"
    check_machine(folder)
    limits = {resource.RLIMIT_NOFILE: (64, 64), resource.RLIMIT_AS: (3 * 2**30, 3 * 2**30)}
    none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits.get(kind, none))
    with pytest.raises(UserError, match="ulimit -n 64: too few open files for Ray: ulimit -n 4096"):
        check_machine(folder)
    del limits[resource.RLIMIT_NOFILE]
    with pytest.raises(UserError, match=r"ulimit -v 3145728: .* ulimit -v unlimited"):
        check_machine(folder)
    limits.clear()
    disk = namedtuple("disk", "f_bavail f_frsize f_files f_favail")
    for free, expected in ((disk(200, 4096, 0, 0), "0 MB are free"), (disk(10**6, 4096, 99, 40), "room for 40 files")):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: free)
        with pytest.raises(UserError, match=f"{folder}: {expected}.*set RAY_TMPDIR"):
            check_machine(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/ray: Ray's temporary files cannot be written there"):
        check_machine(tmp_path / "file" / "ray")


def test_a_home_that_cannot_be_written_leaves_the_token_beside_the_results(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert keep_token(tmp_path / "out") == "ray get-auth-token"
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
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

    assert start(slow, lambda: down.append(1)) == "started"
    assert calls == [{"_temp_dir": "/tmp/ray"}] * MAX_STARTS
    assert len(down) == MAX_STARTS - 1

    def broken(**options):
        raise OSError("no\nsuch thing")

    with pytest.raises(
        UserError, match=r"^Ray does not start on this machine: .*no such thing .*tried for 0 s"
    ) as raised:
        start(broken, lambda: None)
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
