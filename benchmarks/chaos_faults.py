"""The faults that ``chaos.py`` strikes with: each a name, where it can happen, and what the command may end with."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from benchmarks.chaos_places import Cluster, ObjectStore, Place, SmallDisk, set_clock

DISK, STORE, CLUSTER = "disk", "store", "cluster"
EVERYWHERE = (DISK, STORE, CLUSTER)


class MissedError(Exception):
    """What the fault was to strike is not there at this moment."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault.

    Attributes:
        strike: does it; returns what was struck, for the record. Raises ``MissedError``.
        exits: codes that the command may end with because of it, besides 0.
        is_between: it strikes files after a command ended, not a command.
        is_last: the command is to end by it, so that it is the last one of an attempt.
    """

    name: str
    places: tuple[str, ...]
    strike: Callable[[Place, subprocess.Popen[str], random.Random], str]
    exits: tuple[int, ...] = ()
    is_between: bool = False
    is_last: bool = False


def signal_to_command(number: signal.Signals) -> Callable[..., str]:
    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        if process.poll() is not None:
            raise MissedError
        process.send_signal(number)
        return f"command {process.pid}"

    return strike


def kill_part(*titles: str) -> Callable[..., str]:
    """SIGKILL for one of the run's processes whose title holds one of ``titles``."""

    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        part = one_of(place, titles, rng)
        title = part.name()
        part.kill()
        return title

    return strike


def stop_part(*titles: str) -> Callable[..., str]:
    """SIGSTOP for some seconds, as a machine that swaps."""

    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        part = one_of(place, titles, rng) if titles else psutil.Process(process.pid)
        seconds = rng.uniform(0.5, 5)
        part.suspend()
        threading.Timer(seconds, resume, [part]).start()
        return f"{part.pid} for {seconds:.1f} s"

    return strike


def resume(part: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        part.resume()


def one_of(place: Place, titles: tuple[str, ...], rng: random.Random) -> psutil.Process:
    found = place.workers(titles)
    if not found:
        raise MissedError
    return rng.choice(found)


def kill_of_ray(title: str) -> Callable[..., str]:
    """SIGKILL for a part of the command's own Ray."""

    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        for part in place.processes():
            try:
                if title in " ".join(part.cmdline()[:4]):
                    part.kill()
                    return title
            except psutil.Error:
                continue
        raise MissedError

    return strike


def jump_clock(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
    """What raylora's own code is told of the time; Ray's C++ processes see the true one."""
    seconds = rng.choice([-86400, -3600, -30, 30, 3600, 86400])
    set_clock(place.site.faults, seconds)
    return f"{seconds:+d} s"


def fill_disk(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
    if not isinstance(place, SmallDisk):
        raise MissedError
    num_free = rng.choice([0, 4096, 65536])
    place.fill(num_free)
    return f"{num_free} bytes left"


def make_read_only(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
    if not isinstance(place, SmallDisk):
        raise MissedError
    place.make_read_only()
    return "read-only"


def break_store(fault: str) -> Callable[..., str]:
    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        assert isinstance(place, ObjectStore)
        times = 1 if fault in {"404", "412"} else rng.randint(1, 3)
        place.proxy.inject(fault, times)
        return f"{times} requests"

    return strike


def lose_node(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
    assert isinstance(place, Cluster)
    num = place.lose_node()
    threading.Timer(rng.uniform(0, 4), place.add_node).start()
    return f"{num} processes"


def damage(how: Callable[[bytes, random.Random], bytes]) -> Callable[..., str]:
    """Change one file that a finished stage left."""

    def strike(place: Place, process: subprocess.Popen[str], rng: random.Random) -> str:
        names = place.products()
        if not names:
            raise MissedError
        name = rng.choice(names)
        data = place.read(name)
        if not data:
            raise MissedError
        place.write(name, how(data, rng))
        return name

    return strike


def cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))]


def flip_bit(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def zero_block(data: bytes, rng: random.Random) -> bytes:
    """A block that never reached the disk before the power was cut."""
    at = rng.randrange(len(data))
    size = min(len(data) - at, 512)
    return data[:at] + bytes(size) + data[at + size :]


RAY_WORKER, SINK, BOARD, SUPERVISOR = ("RayWorker", "raylora-"), ("Write",), ("StatusBoard", "-board"), ("MapWorker",)
"""Parts of the titles of a run's processes; a worker at work shows its dataset and stage behind its name."""
FAULTS = (
    Fault("worker killed", EVERYWHERE, kill_part(*RAY_WORKER), (1,)),
    Fault("worker stopped for seconds", EVERYWHERE, stop_part(*RAY_WORKER)),
    Fault("process of the tables killed", EVERYWHERE, kill_part(*SINK)),
    Fault("status board killed", EVERYWHERE, kill_part(*BOARD)),
    Fault("supervisor killed", EVERYWHERE, kill_part(*SUPERVISOR)),
    Fault("command stopped for seconds", EVERYWHERE, stop_part()),
    Fault("command: SIGKILL", EVERYWHERE, signal_to_command(signal.SIGKILL), (-9, 137), is_last=True),
    Fault("command: SIGTERM", EVERYWHERE, signal_to_command(signal.SIGTERM), (143,), is_last=True),
    Fault("command: SIGHUP", EVERYWHERE, signal_to_command(signal.SIGHUP), (-1, 129, 143)),
    Fault("command: SIGINT", EVERYWHERE, signal_to_command(signal.SIGINT), (130,), is_last=True),
    Fault("raylet killed", (DISK,), kill_of_ray("raylet/raylet"), (1,), is_last=True),
    Fault("gcs_server killed", (DISK,), kill_of_ray("gcs_server"), (1,), is_last=True),
    Fault("dashboard's agent killed", (DISK,), kill_of_ray("agent"), (1,), is_last=True),
    Fault("disk full", (DISK,), fill_disk, (1, 2), is_last=True),
    Fault("disk read-only", (DISK,), make_read_only, (1, 2), is_last=True),
    Fault("file cut short", (DISK, STORE), damage(cut), is_between=True),
    Fault("one bit flipped", (DISK, STORE), damage(flip_bit), is_between=True),
    Fault("block of zeros", (DISK, STORE), damage(zero_block), is_between=True),
    Fault("clock jumps", (DISK, STORE), jump_clock),
    Fault("store answers 500", (STORE,), break_store("500"), (1, 2)),
    Fault("store answers 503", (STORE,), break_store("503"), (1, 2)),
    Fault("store answers 404", (STORE,), break_store("404"), (1, 2)),
    Fault("store answers 412", (STORE,), break_store("412"), (1, 2)),
    Fault("store is slow", (STORE,), break_store("slow")),
    Fault("store's answer is lost", (STORE,), break_store("cut"), (1, 2)),
    Fault("node lost", (CLUSTER,), lose_node, (1,)),
)


def faults_at(place: str, *, is_between: bool) -> list[Fault]:
    return [f for f in FAULTS if place in f.places and f.is_between == is_between]
