"""What a Ray of one's own needs of the machine, looked at before it starts: its own errors come late, or say little.

Does not import ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raylora.cluster.ray_folder import LONGEST, SHORT_PLACE, RayFolder
from raylora.cluster.watcher import tell_ray_starts
from raylora.errors import UserError, one_line
from raylora.storage.places import is_remote

log = logging.getLogger("raylora")

MIN_OPEN_FILES = 128
"""With so many a run of one worker works (Ray 2.60); with ``ulimit -n 64`` it ends with a line of C++."""
MIN_ADDRESS_BYTES = 8 * 2**30
"""On a machine of 24 GB a run works with ``ulimit -v`` of 15 GB, ends with 7.6, and hangs for minutes with 3: Ray's
processes map the object store, 30% of the memory, and much else."""
MAX_STARTS = 3
"""How often a Ray is started whose node is slow to come, as on a busy machine: Ray waits for it for 30 s each time."""


def start(init: Callable[..., Any], shutdown: Callable[[], None], folder: RayFolder) -> Any:
    """Start a Ray of one's own.

    Args:
        init: ``ray.init`` with its options, but for the folder.
        shutdown: takes down what is left of a Ray that did not start.
        folder: for its files; is kept where it does not start.

    Returns:
        What ``init`` returns.

    Raises:
        UserError: it does not start.
    """
    started = time.monotonic()
    check_limits()
    if len(os.environ.get("TMPDIR", "")) > LONGEST:
        os.environ["TMPDIR"] = str(SHORT_PLACE)  # the dashboard's processes have sockets in it, too
    for attempt in range(1, MAX_STARTS + 1):
        tell_ray_starts(str(folder.logs))
        try:
            return init(_temp_dir=str(folder.path))
        except Exception as error:  # of a node that is slow to come Ray raises Exception itself
            shutdown()
            if "timed out" in str(error) and attempt < MAX_STARTS:
                log.warning("Ray was too slow to start, and is started again: %s", one_line(error))
                continue
            seconds = time.monotonic() - started
            folder.keep = True
            cause = f"{one_line(error)} (tried for {seconds:.0f} s; its logs: {folder.logs})"
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


def check_limits() -> None:
    """Check that a Ray can start here.

    Raises:
        UserError: a limit of this shell does not allow it.
    """
    open_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= open_files < MIN_OPEN_FILES:
        raise UserError(f"ulimit -n {open_files}: too few open files for Ray: ulimit -n 4096 in this shell, then again")
    address_bytes, _ = resource.getrlimit(resource.RLIMIT_AS)
    if 0 <= address_bytes < MIN_ADDRESS_BYTES:
        kib = address_bytes // 1024
        raise UserError(f"ulimit -v {kib}: Ray maps more address space than that: ulimit -v unlimited, then again")


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
