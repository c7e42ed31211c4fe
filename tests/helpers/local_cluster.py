"""A real Ray cluster of two nodes on this machine, with token authentication, that disturbs no other Ray here."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers import ROOT

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = "token-of-the-tests-0123456789abcdef"


@dataclass(frozen=True)
class LocalCluster:
    """Its addresses, and the environment of who may use it."""

    gcs: str
    dashboard: str
    client: str
    environment: dict[str, str]

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        """``ray job submit``, to its end."""
        words = [*RAY, "job", "submit", "--address", self.dashboard, "--", *command]
        return subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=400, cwd=ROOT)

    def status(self, path: str, token: str | None) -> int:
        """The answer of the dashboard, with a token or without."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.dashboard + path, headers=headers)) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextmanager
def local_cluster(num_gpus: int = 1) -> Iterator[LocalCluster]:
    """A head and another node, each with so many logical GPUs."""
    with contextlib.ExitStack() as stack:
        for attempt in range(3):
            try:
                cluster = stack.enter_context(_cluster(num_gpus))
                break
            except RuntimeError:  # somebody else was faster to take a port that was free a moment ago
                if attempt == 2:
                    raise
        yield cluster


@contextmanager
def _cluster(num_gpus: int) -> Iterator[LocalCluster]:
    # Short, as sockets of Ray lie in it; and not where others' ray.init() looks for a cluster to join.
    folder = Path(tempfile.mkdtemp(prefix="rl", dir="/tmp"))
    token = folder / "token"
    token.write_text(TOKEN)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    gcs, dashboard, client, agent, other_agent = free_ports(5)
    cluster = LocalCluster(
        f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}", f"ray://127.0.0.1:{client}", environment
    )
    common = [
        "--node-ip-address=127.0.0.1", f"--num-gpus={num_gpus}", "--num-cpus=1", "--block",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    head = [
        *RAY, "start", "--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}", *common,
    ]  # fmt: skip
    other = [*RAY, "start", f"--address={cluster.gcs}", f"--dashboard-agent-listen-port={other_agent}", *common]
    log = (folder / "ray-start.log").open("w")
    started = []
    try:
        for words, num_nodes in ((head, 1), (other, 2)):
            started.append(subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True))
            _wait_for(cluster, num_nodes, folder)
        yield cluster
    finally:
        _stop(started, folder)
        log.close()
        shutil.rmtree(folder, ignore_errors=True)


def _wait_for(cluster: LocalCluster, num_nodes: int, folder: Path) -> None:
    words = [*RAY, "list", "nodes", "--address", cluster.dashboard, "--format", "json"]
    for _ in range(30):
        time.sleep(1)
        done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.count('"ALIVE"') == num_nodes:
            return
    raise RuntimeError(f"no cluster of {num_nodes}: {(folder / 'ray-start.log').read_text()[-2000:]}")


def _stop(started: list[subprocess.Popen[bytes]], folder: Path) -> None:
    """All that was started, by what it was told where to work: Ray's processes leave their parents' groups."""
    for process in started:
        process.send_signal(signal.SIGTERM)
    for process in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    left = works_in(folder)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, 10)


def works_in(folder: Path) -> list[psutil.Process]:
    """The processes of the cluster that keeps its files there."""
    return [p for p in psutil.process_iter() if p.status() != psutil.STATUS_ZOMBIE and _works_in(p, folder)]


def _works_in(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.environ().get("RAY_TMPDIR") == str(folder)
    except psutil.Error:
        return False
