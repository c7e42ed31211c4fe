"""Where the runs of ``chaos.py`` happen: a disk with a Ray of their own, an object store, a cluster of nodes."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.helpers.fault_runs import Site, environment, processes_of
from tests.helpers.local_cluster import free_ports
from tests.helpers.objects import BUCKET, Objects, s3_server
from tests.helpers.store_proxy import StoreProxy

TABLES = ("results.csv", "results.parquet")
LEFT = (".partial-", ".journal", ".permit")
"""Parts of names that nothing has in a folder whose run has ended."""


class Place:
    """An output that the command writes to, and what else the place has.

    Attributes:
        site: the command, its options and environment.
        ray_processes: whether Ray is the command's own, to be killed in part.
    """

    name = "disk"
    has_own_ray = True

    def __init__(self, root: Path, data: Path, model: Path, **more: str) -> None:
        self.root = root
        faults = root / "faults"
        faults.mkdir(parents=True)
        (faults / "faults.json").write_text("[]")
        cache = {"RAYLORA_CACHE": str(root / "cache"), "OMP_NUM_THREADS": "1"}
        self.site = Site(data, root / "results", model, faults, environment(faults, **cache, **more))
        self.site.results.mkdir(exist_ok=True)

    @property
    def output(self) -> Path:
        return self.site.output

    def start(self, *more: str) -> subprocess.Popen[str]:
        return self.site.start(*more)

    def read(self, name: str) -> bytes | None:
        """A file of the output; None where there is none."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return (self.output / name).read_bytes()
        return None

    def num_done(self) -> int:
        return self.site.num_done()

    def products(self) -> list[str]:
        """Names of what finished stages left, to be damaged; sorted."""
        found = [*self.output.glob("experiments/*/**/*"), *self.output.glob("base/*/*")]
        return sorted(p.relative_to(self.output).as_posix() for p in found if p.is_file() and p.suffix != ".txt")

    def write(self, name: str, data: bytes) -> None:
        (self.output / name).write_bytes(data)

    def left_behind(self) -> list[str]:
        """What a run that ended in order must not leave."""
        names = [p.relative_to(self.output).as_posix() for p in self.output.rglob("*")]
        return sorted(n for n in names if any(part in n for part in LEFT) or n == "run.owner")

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.site, of_a_run=False)

    def workers(self, titles: tuple[str, ...]) -> list[psutil.Process]:
        """Processes of the run whose titles hold one of these, by their age."""
        found = []
        for process in processes_of(self.site, of_a_run=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                shown = " ".join(process.cmdline())
                is_other = "Board" in shown or "-board" in shown
                if any(title in shown for title in titles) and is_other == ("StatusBoard" in titles):
                    found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def quiet(self) -> None:
        """Ends every fault that lasts."""
        set_clock(self.site.faults, 0)

    def close(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        shutil.rmtree(self.root, ignore_errors=True)


class SmallDisk(Place):
    """The results lie on a file system of their own, which can be full, or read-only. Only root can mount one."""

    def __init__(self, root: Path, data: Path, model: Path) -> None:
        super().__init__(root, data, model)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(self.site.results)], check=True)
        self._is_read_only = False

    @staticmethod
    def is_possible() -> bool:
        if os.geteuid() != 0:
            return False
        with tempfile.TemporaryDirectory() as folder:
            mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False)
            if mounted.returncode == 0:
                subprocess.run(["umount", "-l", folder], check=True)
        return mounted.returncode == 0

    def fill(self, num_free: int) -> None:
        """Leave ``num_free`` bytes."""
        state = os.statvfs(self.site.results)
        size = state.f_bavail * state.f_frsize - num_free
        with (self.site.results / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size, 1))

    def make_read_only(self) -> None:
        # A mount of its own over the first one: what is open for writing would keep that from becoming read-only.
        place = str(self.site.results)
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", place], check=True)
        self._is_read_only = True

    def quiet(self) -> None:
        super().quiet()
        if self._is_read_only:
            subprocess.run(["umount", "-l", str(self.site.results)], check=True)
            self._is_read_only = False
        (self.site.results / "filler").unlink(missing_ok=True)

    def close(self) -> None:
        self.quiet()
        subprocess.run(["umount", "-l", str(self.site.results)], check=False)
        super().close()


class ObjectStore(Place):
    """A real S3 server behind a proxy that injects faults."""

    name = "store"

    def __init__(self, root: Path, data: Path, model: Path, proxy: StoreProxy, objects: Objects) -> None:
        super().__init__(root, data, model, AWS_ENDPOINT_URL=proxy.url)
        self.proxy, self._objects = proxy, objects
        self._prefix = f"{root.name}/chunk_1"

    def start(self, *more: str) -> subprocess.Popen[str]:
        return self.site.start(*more, output=f"s3://{BUCKET}/{self.root.name}")

    def read(self, name: str) -> bytes | None:
        from botocore.exceptions import ClientError

        with contextlib.suppress(ClientError):
            return self._objects.get(f"{self._prefix}/{name}")
        return None

    def _names(self) -> list[str]:
        return [name.removeprefix(f"{self._prefix}/") for name in self._objects.names(self._prefix)]

    def num_done(self) -> int:
        return sum(name.startswith("experiments/") and name.endswith("/result.json") for name in self._names())

    def products(self) -> list[str]:
        return sorted(n for n in self._names() if n.startswith(("experiments/", "base/")) and not n.endswith(".txt"))

    def write(self, name: str, data: bytes) -> None:
        self._objects.put(f"{self._prefix}/{name}", data)

    def left_behind(self) -> list[str]:
        return [n for n in self._names() if any(part in n for part in LEFT)]

    def quiet(self) -> None:
        super().quiet()
        self.proxy.clear()

    def close(self) -> None:
        self._objects.remove(self.root.name)
        super().close()


class Cluster(Place):
    """A head and a node with a GPU each, which go on when a command ends; the node can be lost and come back."""

    name = "cluster"
    has_own_ray = False

    def __init__(self, root: Path, data: Path, model: Path) -> None:
        super().__init__(root, data, model)
        self._port, self._agent, self._other_agent = free_ports(3)
        self._temp = tempfile.mkdtemp(prefix="rl", dir="/tmp")
        self.site.address = f"127.0.0.1:{self._port}"
        agent = f"--dashboard-agent-listen-port={self._agent}"
        head = ["--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._temp}", agent]
        self._head = self._ray(*head)
        self._node: subprocess.Popen[bytes] | None = None
        self.add_node()

    def _ray(self, *words: str) -> subprocess.Popen[bytes]:
        ray = str(Path(sys.executable).with_name("ray"))
        common = ["--num-gpus=1", "--num-cpus=1", "--block", "--min-worker-port=0", "--max-worker-port=0"]
        log = (self.root / "ray.log").open("ab")
        return subprocess.Popen(
            [ray, "start", *words, "--node-ip-address=127.0.0.1", *common], env=self.site.environment, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip

    def add_node(self) -> None:
        """Start the node where there is none. Returns before it is there; the cluster takes it in when it is."""
        if self._node is None:
            if self._head.poll() is None:
                wait_for_port(self._port)
            agent = f"--dashboard-agent-listen-port={self._other_agent}"
            self._node = self._ray(f"--address={self.site.address}", agent)

    def lose_node(self) -> int:
        """SIGKILL for all of the node's processes. Returns their number."""
        assert self._node
        node, self._node = self._node, None
        return kill_tree(node)

    def processes(self) -> list[psutil.Process]:
        return processes_of(self.site, of_a_run=True)

    def quiet(self) -> None:
        super().quiet()
        self.add_node()

    def close(self) -> None:
        for process in (self._node, self._head):
            if process:
                kill_tree(process)
        shutil.rmtree(self._temp, ignore_errors=True)
        super().close()


def set_clock(faults: Path, seconds: int) -> None:
    """What raylora's processes are told of the time from now on is so far from the true one."""
    (faults / "clock").write_text(str(seconds))


def wait_for_port(port: int, timeout: float = 60) -> None:
    import socket

    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


def kill_tree(process: subprocess.Popen[bytes]) -> int:
    """SIGKILL for a process and all below it. Returns their number."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for part in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.wait()
        return len(family)
    return 0


class Places:
    """Makes the places of rounds; the S3 server and its proxy serve all of them."""

    def __init__(self, folder: Path, data: Path, model: Path) -> None:
        self._folder, self._data, self._model = folder, data, model
        self._stack = contextlib.ExitStack()
        self._store: tuple[StoreProxy, Objects] | None = None
        self._can_mount = SmallDisk.is_possible()

    def __enter__(self) -> Places:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def make(self, name: str) -> Iterator[Place]:
        root = Path(tempfile.mkdtemp(prefix="round-", dir=self._folder))
        place = self._make(name, root)
        try:
            yield place
        finally:
            place.close()

    def _make(self, name: str, root: Path) -> Place:
        where: tuple[Any, ...] = (root, self._data, self._model)
        if name == "store":
            if self._store is None:
                url, objects = self._stack.enter_context(s3_server())
                self._store = self._stack.enter_context(StoreProxy(url)), objects
            return ObjectStore(*where, *self._store)
        if name == "cluster":
            return Cluster(*where)
        return SmallDisk(*where) if self._can_mount else Place(*where)


def parse_table(name: str, data: bytes) -> Any:
    """A table of the output as it was read.

    Raises:
        Exception: as pandas has it, where the file is torn.
    """
    import pandas as pd

    return pd.read_parquet(io.BytesIO(data)) if name.endswith(".parquet") else pd.read_csv(io.BytesIO(data))
