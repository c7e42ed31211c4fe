"""What a Ray of one's own needs of the machine, looked at before it starts: its own errors come late, or say little.

Does not import ray.
"""

from __future__ import annotations

import logging
import os
import resource
import secrets
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from raylora.cluster.watcher import tell_ray_starts
from raylora.errors import UserError, one_line
from raylora.storage.places import is_remote

log = logging.getLogger("raylora")

LONGEST_TEMP_FOLDER = 40
"""Characters of Ray's folder for temporary files. Linux allows 107 for the name of a socket, and Ray adds
``/session_2026-11-27_01-23-00_123456_1234567/sockets/plasma_store`` to it, which are 64 and more in later versions."""
SHORT_TEMP_FOLDER = Path("/tmp/ray")
"""Ray's own default."""
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
    if len(os.environ.get("TMPDIR", "")) > LONGEST_TEMP_FOLDER:
        os.environ["TMPDIR"] = str(SHORT_TEMP_FOLDER.parent)  # the dashboard's processes have sockets in it, too
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


def temp_folder() -> Path:
    """Where a Ray of one's own keeps logs and sockets: where it would by itself, unless that name is too long."""
    named = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR")
    folder = Path(named).absolute() / "ray" if named else SHORT_TEMP_FOLDER
    return folder if len(str(folder)) <= LONGEST_TEMP_FOLDER else SHORT_TEMP_FOLDER


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
        usual = Path.home() / ".ray"
        if not (usual / "auth_token").is_file():
            _write_into(usual)
        return "ray get-auth-token"
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        pass
    if is_remote(output):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        return "set RAY_AUTH_TOKEN before the run to choose it"
    path = output.absolute() / "ray_auth_token"
    if not path.is_file():
        output.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    return f"in {path}"


def _write_into(folder: Path) -> None:
    """Make the folder and a file in it, which is deleted again. Permissions alone do not tell: of root, of /proc.

    Raises:
        OSError: that cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"x")
