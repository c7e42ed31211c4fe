"""``--address``: runs on a cluster that is there already. Real Ray, two nodes, token authentication."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil
import pytest

from tests.helpers.chunks import OPTIONS, command, write_dataset
from tests.helpers.local_cluster import ROOT, TOKEN, LocalCluster, local_cluster, works_in

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cluster():
    with local_cluster() as cluster:
        yield cluster
    assert not works_in(Path(cluster.environment["RAY_TMPDIR"])), "no process is left behind"


@pytest.fixture
def options(tmp_path, tiny_model_folder):
    for i in range(3):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    return {**OPTIONS, "model": str(tiny_model_folder), "data_root": tmp_path / "data", "output": tmp_path / "results"}


def test_a_submitted_job_runs_on_both_nodes(cluster: LocalCluster, options, tmp_path):
    num_datasets = 8
    options["num_epochs"] = 60  # so that the first worker is at it when the second one has started
    for i in range(3, num_datasets):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    done = cluster.submit(*command(options, "--address", "auto"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "succeeded" in done.stdout
    table = pd.read_csv(tmp_path / "results" / "chunk_1" / "results.csv")
    assert list(table["status"]) == ["ok"] * num_datasets
    assert {"worker 0", "worker 1"} <= {line.partition(":")[0] for line in done.stdout.splitlines()}
    again = cluster.submit(*command(options, "--address", "auto"))
    assert again.returncode == 0, again.stdout + again.stderr
    assert "worker" not in again.stdout, "all rows are there"


def test_a_job_whose_rows_failed_is_a_failed_job(cluster: LocalCluster, options, tmp_path):
    (tmp_path / "data" / "chunk_1" / "bad.json").write_text("[{")
    done = cluster.submit(*command(options, "--address", "auto", "--stages", "train"))
    assert done.returncode != 0
    assert "bad.json: line 1" in done.stdout


def test_the_dashboard_wants_the_token(cluster: LocalCluster):
    assert cluster.status("/api/jobs/", None) == 401
    assert cluster.status("/api/jobs/", "another-token-0123456789abcdef-xyz") in {401, 403}
    assert cluster.status("/api/jobs/", TOKEN) == 200


def test_a_client_connection_is_refused_with_what_to_do(cluster: LocalCluster, options):
    words = command(options, "--address", cluster.client)
    done = subprocess.run(words, env=cluster.environment, capture_output=True, text=True, cwd=ROOT, timeout=200)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "ray job submit" in done.stderr


SRUN = """#!/bin/bash
while [[ "$1" == --nodes* || "$1" == --ntasks* || "$1" == --nodelist* || "$1" == --overlap ]]; do shift; done
exec "$@"
"""


def test_the_script_of_slurm_starts_a_cluster_runs_on_it_and_takes_it_away(options, tmp_path):
    """On one node, with programs in the place of SLURM's own that do what these do there."""
    folder = Path(tempfile.mkdtemp(prefix="sl", dir="/tmp"))
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": "#!/bin/bash\necho one\n"}.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder),
        "RAY_TMPDIR": str(folder), "PYTHONPATH": str(ROOT), "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "one", "SLURM_GPUS_ON_NODE": "1",
    }  # fmt: skip
    words = command(options)
    try:
        done = subprocess.run(
            ["bash", ROOT / "cluster" / "slurm.sh", *words[words.index("raylora.batch") + 1 :]],
            env=environment, cwd=folder, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        table = pd.read_csv(tmp_path / "results" / "chunk_1" / "results.csv")
        assert list(table["status"]) == ["ok"] * 3
        psutil.wait_procs(works_in(folder), 20)
        assert not works_in(folder), "no process is left behind"
    finally:
        for process in works_in(folder):
            process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_asking_for_gpus_says_what_is_there(cluster: LocalCluster):
    words = [sys.executable, "cluster/request_gpus.py", "2"]
    environment = {**cluster.environment, "RAY_ADDRESS": cluster.gcs}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert "2 GPUs are wanted, 2 are there" in done.stdout, done.stderr
