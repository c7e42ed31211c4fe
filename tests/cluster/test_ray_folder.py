"""The folder of a Ray of one's own."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from raylora.cluster import ray_folder as module
from raylora.cluster.ray_folder import place, ray_folder
from raylora.errors import UserError


@pytest.fixture
def somewhere(tmp_path, monkeypatch) -> Path:
    """The folder that Rays' folders are made in, though its name may be too long for sockets."""
    monkeypatch.setattr(module, "LONGEST", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "TMPDIR"])
def test_a_place_whose_name_is_too_long_for_sockets_is_not_taken(monkeypatch, variable):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.delenv("TMPDIR", raising=False)
    assert place() == Path("/tmp")
    monkeypatch.setenv(variable, "/scratch/me")
    assert place() == Path("/scratch/me")
    monkeypatch.setenv(variable, f"/scratch/{'a' * 90}")
    assert place() == Path("/tmp")


def test_it_is_the_user_s_alone_whatever_the_umask_and_gone_in_the_end(somewhere):
    former = os.umask(0)
    try:
        with ray_folder() as folder, ray_folder() as other:
            assert folder.path.parent != other.path.parent, "two runs at once"
            assert stat.S_IMODE(folder.path.parent.stat().st_mode) == 0o700
            (folder.path / "session_1").mkdir()
        assert not [*somewhere.iterdir()]
    finally:
        os.umask(former)
    with pytest.raises(OSError, match="of the body"), ray_folder():
        raise OSError("of the body")
    assert not [*somewhere.iterdir()]


def test_logs_of_a_ray_that_broke_down_stay_a_day(somewhere, monkeypatch):
    with ray_folder() as kept:
        kept.keep = True
        kept.logs.mkdir(parents=True)
        (kept.logs / "raylet.out").write_text("why")
    lines = ("import os", "from raylora.cluster.ray_folder import ray_folder", "with ray_folder() as f:")
    script = "\n".join([*lines, "    print(f.path, flush=True)", "    os._exit(1)"])
    environment = {**os.environ, "RAY_TMPDIR": "/tmp"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True)
    left = Path(killed.stdout.decode().strip()).parent
    assert (left / "raylora.lock").is_file()
    for outer in (kept.path.parent, left):
        os.utime(outer / "raylora.lock", (0, 0))
    with ray_folder():
        assert kept.path.exists(), "its last line is new"
    os.utime(kept.logs / "raylet.out", (0, 0))
    with ray_folder() as running:
        assert not kept.path.exists()
        os.utime(running.path.parent / "raylora.lock", (0, 0))
        with ray_folder():
            assert running.path.exists(), "it is in use"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    with ray_folder():
        assert not left.exists(), "whoever held it was killed"


def test_a_full_disk_is_one_line_with_its_fix(somewhere, monkeypatch, tmp_path):
    disk = namedtuple("disk", "f_bavail f_frsize f_files f_favail")
    for free, expected in ((disk(200, 4096, 0, 0), "0 MB are free"), (disk(10**6, 4096, 99, 40), "room for 40 files")):
        monkeypatch.setattr(os, "statvfs", lambda _, free=free: free)
        with pytest.raises(UserError, match=f"{somewhere}.*: {expected}.*set RAY_TMPDIR"), ray_folder():
            pass
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match="file: Ray's temporary files cannot be written there"), ray_folder():
        pass
