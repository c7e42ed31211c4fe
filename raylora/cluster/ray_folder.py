"""The folder of a Ray of one's own, for its logs and sockets: this user's alone, and gone with that Ray.

Ray's own, ``/tmp/ray``, is everybody's: who made it first may read and replace what others' Rays keep there. Ray gives
all rights to all users in its folder; so there is one around it, with a name that nobody can guess and take before.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from raylora.errors import UserError

LONGEST = 40
"""Characters of the folder's name. Linux allows 107 for that of a socket, and Ray adds
``/session_2026-11-27_01-23-00_123456_1234567/sockets/plasma_store`` to it, which are 64 and more in later versions."""
SHORT_PLACE = Path("/tmp")
"""Where the folder lies if no variable names another place, or the name there would be too long."""
KEEP_SECONDS = 86400
"""The folder of a Ray that did not end in order, with its logs, stays so long after their last line."""
MIN_FREE_BYTES, MIN_FREE_FILES = 64 * 2**20, 200
"""Logs and sockets of a run take some 10 MB and 80 files."""
PREFIX, LOCK, INNER = "rl-", "raylora.lock", "ray"
FIX = "set RAY_TMPDIR to a folder with a short name on another disk"


@dataclass
class RayFolder:
    """``path`` is for Ray; with ``keep`` it stays, for somebody to read what is in it."""

    path: Path
    keep: bool = False

    @property
    def logs(self) -> Path:
        return self.path / "session_latest" / "logs"


def place() -> Path:
    """Where the folder will lie: ``RAY_TMPDIR``, ``TMPDIR`` or ``/tmp``."""
    named = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT_PLACE).absolute()
    return named if len(f"{named}/{PREFIX}12345678/{INNER}") <= LONGEST else SHORT_PLACE


@contextlib.contextmanager
def ray_folder() -> Iterator[RayFolder]:
    """A new folder, deleted in the end.

    Raises:
        UserError: it cannot be made, or has too little room for a Ray.
    """
    where = place()
    with contextlib.ExitStack() as stack:
        try:
            where.mkdir(parents=True, exist_ok=True)
            _delete_old(where)
            outer = Path(tempfile.mkdtemp(prefix=PREFIX, dir=where))  # with rights for its owner alone
            folder = RayFolder(outer / INNER)
            stack.callback(_delete_unless_kept, folder)
            stack.enter_context(FileLock(outer / LOCK))  # says that it is in use, for as long as this process lives
            folder.path.mkdir()
            _check_room(folder.path)
        except OSError as error:
            text = f"{where}: Ray's temporary files cannot be written there ({error.strerror}): {FIX}"
            raise UserError(text) from None
        yield folder


def _delete_unless_kept(folder: RayFolder) -> None:
    if not folder.keep:
        delete_folder(str(folder.logs))


def delete_folder(logs: str) -> None:
    """Delete the folder of a Ray that has ended.

    Args:
        logs: ``RayFolder.logs``; empty: no Ray was started.
    """
    if logs:
        shutil.rmtree(Path(logs).parents[2], ignore_errors=True)


def _check_room(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
    free = os.statvfs(folder)
    num_bytes = free.f_bavail * free.f_frsize
    if num_bytes < MIN_FREE_BYTES:
        text = f"{num_bytes // 2**20} MB are free for Ray's temporary files, and it needs {MIN_FREE_BYTES // 2**20}"
        raise UserError(f"{folder}: {text}: make room, or {FIX}")
    if free.f_files and free.f_favail < MIN_FREE_FILES:  # some file systems count no files
        text = f"room for {free.f_favail} files more, and Ray needs {MIN_FREE_FILES}"
        raise UserError(f"{folder}: {text}: make room, or {FIX}")


def _delete_old(where: Path) -> None:
    """Delete this user's folders that no process uses, and nothing was written to for ``KEEP_SECONDS``."""
    for outer in where.glob(f"{PREFIX}*"):
        lock = outer / LOCK
        with contextlib.suppress(OSError, Timeout):
            if outer.is_symlink() or outer.stat().st_uid != os.getuid() or not lock.is_file():
                continue
            last = max(p.stat().st_mtime for p in [lock, *outer.glob(f"{INNER}/session_*/logs/*")])
            if time.time() - last > KEEP_SECONDS:
                with FileLock(lock, timeout=0):
                    shutil.rmtree(outer, ignore_errors=True)
