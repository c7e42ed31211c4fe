"""What a Ray of one's own needs of the machine, looked at before it starts: its own errors come late, or say little.

Does not import ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylora.cluster.watcher import tell_ray_starts
from raylora.errors import UserError, one_line
from raylora.storage.places import is_remote

log = logging.getLogger("raylora")

LONGEST_TEMP_FOLDER = 40
"""Characters of Ray's folder for temporary files. Linux allows 107 for the name of a socket, and Ray adds
``/session_2026-11-27_01-23-00_123456_1234567/sockets/plasma_store`` to it, which are 64 and more in later versions."""
SHORT_PLACE = Path("/tmp")
"""Where Ray's folder lies if no variable names another place, or the name there would be too long."""
KEEP_LOGS_SECONDS = 86400
"""Logs of a Ray that broke down stay so long after their last line; those of one that ended in order are deleted."""
MIN_OPEN_FILES = 128
"""With so many a run of one worker works (Ray 2.60); with ``ulimit -n 64`` it ends with a line of C++."""
MIN_ADDRESS_BYTES = 8 * 2**30
"""On a machine of 24 GB a run works with ``ulimit -v`` of 15 GB, ends with 7.6, and hangs for minutes with 3: Ray's
processes map the object store, 30% of the memory, and much else."""
MIN_FREE_BYTES, MIN_FREE_FILES = 64 * 2**20, 200
"""In the folder for temporary files: logs and sockets of a run take some 10 MB and 80 files."""
MIN_MEBIBYTES = MIN_FREE_BYTES // 2**20


MAX_STARTS = 3
"""How often a Ray is started whose node is slow to come, as on a busy machine: Ray waits for it for 30 s each time."""


def start(init: Callable[..., Any], shutdown: Callable[[], None]) -> Any:
    """Start a Ray of one's own.

    Args:
        init: ``ray.init`` with its options, but for the folder.
        shutdown: takes down what is left of a Ray that did not start.

    Returns:
        What ``init`` returns.

    Raises:
        UserError: it does not start.
    """
    folder, started = temp_folder(), time.monotonic()
    check_machine(folder)
    _delete_old_sessions(folder)
    if len(os.environ.get("TMPDIR", "")) > LONGEST_TEMP_FOLDER:
        os.environ["TMPDIR"] = str(SHORT_PLACE)  # the dashboard's processes have sockets in it, too
    for attempt in range(1, MAX_STARTS + 1):
        tell_ray_starts(f"{folder}/session_latest/logs")
        try:
            return init(_temp_dir=str(folder))
        except Exception as error:  # of a node that is slow to come Ray raises Exception itself
            shutdown()
            if "timed out" in str(error) and attempt < MAX_STARTS:
                log.warning("Ray was too slow to start, and is started again: %s", one_line(error))
                continue
            seconds = time.monotonic() - started
            logs = f"{folder}/session_latest/logs"
            cause = f"{one_line(error)} (tried for {seconds:.0f} s; its logs: {logs})"
            raise UserError(f"Ray does not start on this machine: {cause}") from error


@contextlib.contextmanager
def on_loopback(ray_constants: Any) -> Iterator[None]:
    """A Ray that is started inside has the address 127.0.0.1, and all of its processes listen there alone.

    By itself it takes the address of the machine, and listens on all; ``_node_ip_address="127.0.0.1"`` it replaces with
    that as well. What makes the difference is Ray's own switch for systems whose firewalls would ask for each port.

    Args:
        ray_constants: the module ``ray._private.ray_constants``.
    """
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(name), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # of the processes that Ray starts, and of this one
    try:
        yield
    finally:  # this process may join a cluster later on
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[name]
        else:
            os.environ[name] = before[0]


def temp_folder() -> Path:
    """Where a Ray of one's own keeps logs and sockets: a folder of this user, whose name is short enough for sockets.

    Ray's own, ``/tmp/ray``, is everybody's: who made it first may read and replace what others' Rays keep there. Ray
    gives all rights to all users in its folder; so it has one around it that is the user's alone.
    """
    name = f"raylora-{os.getuid()}/ray"
    folder = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or SHORT_PLACE).absolute() / name
    return folder if len(str(folder)) <= LONGEST_TEMP_FOLDER else SHORT_PLACE / name


def delete_sessions_of(process: int) -> None:
    """Delete the files of a Ray that a process started which was ended, as its name ends with the process id."""
    for session in temp_folder().glob(f"session_*_{process}"):
        delete_session(session)


def delete_session(session: Path) -> None:
    """Delete the files of a Ray that has ended, the links to them, and the folder if nothing else is in it."""
    shutil.rmtree(session, ignore_errors=True)
    with contextlib.suppress(OSError):
        for link in session.parent.iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink()
        if not any(session.parent.glob("session_*")):
            shutil.rmtree(session.parent, ignore_errors=True)
            session.parent.parent.rmdir()


def _delete_old_sessions(folder: Path) -> None:
    for session in folder.glob("session_*"):
        with contextlib.suppress(OSError):
            logs = session / "logs"
            last_line = max((p.stat().st_mtime for p in [session, *logs.glob("*")]), default=0.0)
            is_old = not session.is_symlink() and time.time() - last_line > KEEP_LOGS_SECONDS
            if is_old and not _is_used(session):
                delete_session(session)


def _is_used(session: Path) -> bool:
    """Whether a Ray listens on a socket of the session: one that runs for days may log nothing for one."""
    for path in (session / "sockets").glob("raylet*"):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            return True
    return False


def check_machine(folder: Path) -> None:
    """Check that a Ray can start here.

    Args:
        folder: from ``temp_folder``.

    Raises:
        UserError: a limit or the folder for temporary files does not allow it.
    """
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= open_files < MIN_OPEN_FILES:
        raise UserError(f"ulimit -n {open_files}: too few open files for Ray: ulimit -n 4096 in this shell, then again")
    address_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= address_bytes < MIN_ADDRESS_BYTES:
        kib = address_bytes // 1024
        raise UserError(f"ulimit -v {kib}: Ray maps more address space than that: ulimit -v unlimited, then again")
    _check_folder(folder)


def _check_folder(folder: Path) -> None:
    fix = "set RAY_TMPDIR to a folder with a short name on another disk"
    try:
        mine = folder.parent
        mine.mkdir(parents=True, exist_ok=True, mode=0o700)
        state = mine.lstat()
        if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid():
            raise UserError(f"{mine}: Ray's temporary files would lie in what is somebody else's: {fix}")
        mine.chmod(0o700)
        _write_into(folder)
        free = os.statvfs(folder)
    except OSError as error:
        raise UserError(f"{folder}: Ray's temporary files cannot be written there ({error.strerror}): {fix}") from None
    if free.f_bavail * free.f_frsize < MIN_FREE_BYTES:
        text = f"{free.f_bavail * free.f_frsize // 2**20} MB are free for Ray's temporary files, and it needs"
        raise UserError(f"{folder}: {text} {MIN_MEBIBYTES}: make room, or {fix}")
    if free.f_files and free.f_favail < MIN_FREE_FILES:  # some file systems count no files
        text = f"room for {free.f_favail} files more, and Ray needs {MIN_FREE_FILES}"
        raise UserError(f"{folder}: {text}: make room, or {fix}")


def keep_token(output: Path) -> str:
    """See to it that Ray finds its token where the home folder, its usual place, cannot be written.

    Args:
        output: the run's folder for results; its token file can be read by its owner alone.

    Returns:
        How the user gets the token.
    """
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) or os.environ.get("RAY_AUTH_MODE") == "disabled":
        return "ray get-auth-token"
    try:
        _keep_private(Path.home() / ".ray" / "auth_token")
        return "ray get-auth-token"
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    if is_remote(output):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return "set RAY_AUTH_TOKEN before the run to choose it"
    path = output.absolute() / "ray_auth_token"
    _keep_private(path)
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    return f"in {path}"


def _keep_private(path: Path) -> None:
    """Write a token file, or keep the one that is there; its owner alone may read it."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_token(path)
    elif path.stat().st_mode & 0o077:  # Ray makes it readable for everybody, if the umask allows it
        path.chmod(0o600)


def _write_token(path: Path) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


def _write_into(folder: Path) -> None:
    """Make the folder and a file in it, which is deleted again. Permissions alone do not tell: of root, of /proc.

    Raises:
        OSError: that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
