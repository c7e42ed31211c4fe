"""A real run as others see it: Prometheus, Grafana's folder, Ray's dashboard in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from raylora.cluster.metrics import METRICS, STATES
from raylora.config.run import load_config
from raylora.experiment.runner import ExperimentRunner
from raylora.planning.plan import find_files, make_plan
from tests.helpers import ROOT
from tests.helpers.chromium import CHROMIUM, FLAGS
from tests.helpers.chunks import OPTIONS, write_dataset
from tests.helpers.docs_commands import RUN
from tests.helpers.grafana import DASHBOARD, DOCS, expressions
from tests.helpers.local_cluster import RAY, free_ports

SCREENSHOT = os.environ.get("RAYLORA_SCREENSHOT")
"""Where the screenshot for the docs is written, if anywhere."""
NUM_QUESTIONS = 60


class Scanty(ExperimentRunner):
    """A runner whose memory holds no more than two questions at once."""

    def run(self, experiment: Any, progress: Any = None) -> Any:
        def refuse(module: Any, args: Any, kwargs: Any) -> None:
            if not module.training and len(kwargs.get("input_ids", ())) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")

        hook = self.bench.loaded.model.register_forward_pre_hook(refuse, with_kwargs=True)
        try:
            return super().run(experiment, progress)
        finally:
            hook.remove()


@dataclass
class Watched:
    """A run that goes on: its dashboard, and where Prometheus would look."""

    dashboard: str
    token: str
    targets: list[str]
    num_experiments: int
    started: float

    def scrape(self) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
        """raylora's numbers by name and own labels, added up over whatever else Ray tells apart."""
        from prometheus_client.parser import text_string_to_metric_families

        own = {name for m in METRICS for name in m.labels}
        found: dict[str, dict[tuple[tuple[str, str], ...], float]] = defaultdict(lambda: defaultdict(float))
        for target in self.targets:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                text = answer.read().decode()
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name.startswith("ray_raylora_"):
                        labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k in own))
                        found[sample.name][labels] += sample.value
        return found

    def wait_for(self, seen: Callable[[dict], bool], seconds: float = 120) -> dict:
        deadline = time.monotonic() + seconds
        while not seen(found := self.scrape()):
            assert time.monotonic() < deadline, {k: dict(v) for k, v in found.items()}
            time.sleep(1)
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory, tiny_model_folder) -> Iterator[Watched]:
    import ray

    from raylora.cluster.ray_run import RunHandle, run_experiments

    root = tmp_path_factory.mktemp("watched")
    for i in range(40):
        write_dataset(root / "data" / "chunk_1", f"dolly_{i:02d}", offset=i, num=24)
    paths = {"model": str(tiny_model_folder), "data_root": root / "data", "output": root / "results"}
    config = load_config(
        **{**OPTIONS, **paths, "num_epochs": 40, "mmlu": "demo", "max_samples": NUM_QUESTIONS}, chunk="chunk_1"
    )
    chunk, files = find_files(config)
    plan = make_plan(config, files, chunk)
    (port,) = free_ports(1)
    ray.init(
        address="local", num_gpus=2, num_cpus=1, include_dashboard=True, dashboard_port=port, log_to_driver=False,
        logging_level="ERROR", _system_config={"metrics_report_interval_ms": 1000},
    )  # fmt: skip
    runs: list[RunHandle] = []

    def work() -> None:
        run_experiments(plan.config, plan.store, plan.experiments, runs.append, Scanty)

    thread = threading.Thread(target=work, daemon=True)
    try:
        token = subprocess.run([*RAY, "get-auth-token"], capture_output=True, text=True, check=True).stdout.strip()
        targets = [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes()]
        thread.start()
        wait_until(lambda: runs)
        yield Watched(f"http://127.0.0.1:{port}", token, targets, len(plan.experiments), time.monotonic())
        assert thread.is_alive(), "the run was over before it was looked at"
        runs[0].begin_no_more()
        thread.join(60)
    finally:
        ray.shutdown()


def workers() -> list[tuple[psutil.Process, str]]:
    """The processes of workers that are at something, and their titles."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            line = "".join(process.cmdline())
        except psutil.Error:
            continue
        if line.startswith("ray::raylora-") and "%" in line:
            found.append((process, line.removeprefix("ray::")))
    return found


def wait_until(holds: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return answer


def somebody_at_work() -> tuple[psutil.Process, str]:
    return wait_until(workers)[0]


@pytest.mark.slow
def test_prometheus_finds_the_numbers_of_a_run(watched: Watched):
    works = [
        f"ray_raylora_{name}_total" for name in ("questions", "supervised_tokens", "stage_seconds", "oom_backoffs")
    ]
    found = watched.wait_for(
        lambda found: all(sum(found[name].values()) > 0.5 for name in works) and found["ray_raylora_experiments"]
    )
    states = {dict(labels)["state"]: value for labels, value in found["ray_raylora_experiments"].items()}
    assert set(states) == set(STATES)
    assert sum(states.values()) == watched.num_experiments
    assert 1 <= states["running"] <= 2
    assert states["error"] == 0
    for metric in METRICS:
        for labels in found.get(metric.exposed_name, {}):
            assert {name for name, _ in labels} == set(metric.labels)
    seconds = time.monotonic() - watched.started
    by_worker: dict[str, float] = defaultdict(float)
    stages = set()
    for labels, value in found["ray_raylora_stage_seconds_total"].items():
        assert re.fullmatch(r"raylora-gpu-\d", dict(labels)["worker"])
        by_worker[dict(labels)["worker"]] += value
        stages.add(dict(labels)["stage"])
    assert all(0 < value < seconds for value in by_worker.values())
    assert stages <= {"load", "features", "probe", "train", "base mmlu", "mmlu", "helping mmlu"}
    questions = {dict(labels)["stage"] for labels, value in found["ray_raylora_questions_total"].items() if value > 0.5}
    assert questions <= {"base mmlu", "mmlu", "helping mmlu"}
    num_asked = sum(found["ray_raylora_questions_total"].values())
    assert 0 < num_asked <= NUM_QUESTIONS * (watched.num_experiments + 1)
    counted = found["ray_raylora_supervised_tokens_total"].items()
    tokens = {dict(labels)["stage"] for labels, value in counted if value > 0.5}
    assert tokens <= {"probe", "train"}
    assert not found["ray_raylora_gpu_memory_bytes"] or torch.cuda.is_available(), "no GPU, no number"
    assert [*found["ray_raylora_retries_total"].values()] == pytest.approx([0]), "there, before there is any"


@pytest.mark.slow
def test_a_worker_that_dies_is_a_retry_and_its_successor_has_a_name_of_its_own(watched: Watched):
    process, line = somebody_at_work()
    assert re.fullmatch(r"raylora-gpu-\d: dolly_\d\d · [a-z ]+ \d+%", line)
    process.send_signal(signal.SIGKILL)
    dead = line.partition(":")[0]
    before = set(names(watched.scrape()))
    found = watched.wait_for(lambda found: retries(found) > 0.5 and set(names(found)) - before - {dead})
    assert retries(found) == 1


def retries(found: dict) -> float:
    return sum(found["ray_raylora_retries_total"].values())


def command_of_the_docs(program: str, session: Path) -> list[str]:
    """The one of a program, for this session in the place of the latest one."""
    (text,) = [line for line in DOCS.read_text().splitlines() if line.startswith(f"    {program} ")]
    assert text.strip() in RUN["a run to watch"]
    return text.replace("/tmp/ray/session_latest", str(session)).split()


@pytest.fixture
def session(watched: Watched) -> Path:
    """The folder of Ray's session."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


@pytest.fixture
def prometheus(session: Path, tmp_path) -> Iterator[str]:
    """The address of a real Prometheus that reads the file which Ray wrote for it."""
    words = command_of_the_docs("prometheus", session)
    if shutil.which(words[0]) is None:
        pytest.skip("no prometheus: apt-get install prometheus")
    (port,) = free_ports(1)
    own = ["--storage.tsdb.path", tmp_path, "--web.listen-address", f"127.0.0.1:{port}"]
    server = subprocess.Popen([*words, *own], stderr=subprocess.DEVNULL)
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(30)


@pytest.mark.slow
def test_grafana_finds_the_dashboard_where_the_docs_put_it(session: Path):
    """Ray's own provisioning file names the folder; Grafana itself is in no package index."""
    folder = session / "metrics" / "grafana"
    subprocess.run(command_of_the_docs("cp", session), cwd=ROOT, check=True)
    assert (folder / "dashboards" / DASHBOARD.name).read_bytes() == DASHBOARD.read_bytes()
    (provider,) = folder.glob("provisioning/dashboards/*.yml")
    (provided,) = yaml.safe_load(provider.read_text())["providers"]
    assert Path(provided["options"]["path"]).resolve() == (folder / "dashboards").resolve()


@pytest.mark.slow
def test_a_real_prometheus_answers_every_panel(watched: Watched, prometheus: str):
    """Retries too, of which there is one: a counter that appears with its first number would show no increase."""

    def ask(expression: str) -> list[float]:
        query = urllib.parse.urlencode({"query": re.sub(r"\$__\w+", "5m", expression)})
        try:
            with urllib.request.urlopen(f"{prometheus}/api/v1/query?{query}", timeout=30) as answer:
                return [float(sample["value"][1]) for sample in json.load(answer)["data"]["result"]]
        except urllib.error.URLError:
            return []  # it is still starting

    wait_until(lambda: ask("ray_raylora_retries_total"))
    somebody_at_work()[0].kill()
    for expression in expressions(json.loads(DASHBOARD.read_text())):
        if "gpu_memory" not in expression or torch.cuda.is_available():
            wait_until(lambda asked=expression: any(value > 0 for value in ask(asked)))


def names(found: dict) -> Iterator[str]:
    return (dict(labels)["worker"] for labels in found["ray_raylora_stage_seconds_total"])


@pytest.fixture(scope="module")
def page(watched: Watched):
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        page = chromium.new_page(viewport={"width": 1600, "height": 800})
        page.goto(watched.dashboard)
        page.locator("input[type=password]").fill(watched.token)
        page.get_by_role("button", name=re.compile("submit", re.I)).click()
        yield page
        chromium.close()


@pytest.mark.slow
def test_the_dashboard_shows_workers_by_name(watched: Watched, page):
    page.goto(f"{watched.dashboard}/#/actors")
    name = page.get_by_text(re.compile(r"^raylora-gpu-\d$"))
    name.first.wait_for(timeout=90_000)
    page.get_by_text(re.compile(r"^GPU \d of ")).first.wait_for(timeout=90_000)  # known when the actor has begun


@pytest.mark.slow
def test_the_dashboard_shows_what_they_do_now(watched: Watched, page):
    page.goto(f"{watched.dashboard}/#/cluster")  # a single node is unfolded already
    shown = page.get_by_text(re.compile(r"raylora-gpu-\d: dolly_\d\d · [a-z ]+ \d+%"))
    shown.first.wait_for(timeout=90_000)
    if SCREENSHOT:
        page.set_viewport_size({"width": 1500, "height": 640})
        shown.nth(1).wait_for(timeout=90_000)  # both workers; Ray lists them last
        shown.nth(1).scroll_into_view_if_needed()
        page.screenshot(path=SCREENSHOT)
