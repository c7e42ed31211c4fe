"""A Ray of two logical GPUs that outlives its drivers, and the rows of a run that nothing disturbed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.helpers.fault_runs import Site, environment, write_chunk


@pytest.fixture(scope="session")
def chunk(tmp_path_factory) -> Path:
    return write_chunk(tmp_path_factory.mktemp("faults") / "data")


@pytest.fixture
def site(tmp_path, chunk, tiny_model_folder) -> Site:
    """Runs here start a Ray of their own."""
    faults = tmp_path / "faults"
    faults.mkdir()
    return Site(chunk, tmp_path / "results", tiny_model_folder, faults, environment(faults))


@pytest.fixture(scope="session")
def ray_with_faults(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """The address of a Ray that goes on when its drivers are killed, and the folder of the faults that strike in it."""
    faults = tmp_path_factory.mktemp("ray") / "faults"
    faults.mkdir()
    port = 20000 + os.getpid() % 20000
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", f"--port={port}", "--num-gpus=2", "--include-dashboard=false", "--block"]
    process = subprocess.Popen(
        [*command, f"--temp-dir={tmp_path_factory.mktemp('r')}"], env=environment(faults), stdout=subprocess.DEVNULL
    )
    try:
        yield f"127.0.0.1:{port}", faults
    finally:
        for part in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        process.wait(timeout=60)


@pytest.fixture
def shared_site(tmp_path, chunk, tiny_model_folder, ray_with_faults) -> Site:
    """Runs here use the Ray that is there already."""
    address, faults = ray_with_faults
    site = Site(chunk, tmp_path / "results", tiny_model_folder, faults, environment(faults), address)
    site.strike()
    return site


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, chunk, tiny_model_folder, ray_with_faults) -> dict[str, dict[str, Any]]:
    address, faults = ray_with_faults
    results = tmp_path_factory.mktemp("undisturbed")
    site = Site(chunk, results, tiny_model_folder, faults, environment(faults), address)
    site.strike()
    site.run()
    rows = site.rows()
    assert all(row["status"] == "ok" for row in rows.values())
    return rows
