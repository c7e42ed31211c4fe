"""The commands of the documentation, really run: as they stand there, on a folder that is laid out as the README says.

The model is the tests' tiny one, and the environment says that runs are short; the commands' own options are untouched,
but for ``STANDS_FOR``.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import pytest

from tests.helpers.chunks import write_dataset
from tests.helpers.docs_changes import apply_diffs, copy_of_the_code, write_question_set
from tests.helpers.docs_commands import ROOT, RUN, blocks
from tests.helpers.local_cluster import TOKEN, local_cluster
from tests.helpers.objects import BUCKET, s3_server

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
DATA = "train_data/merged_datasets"
SHORT = {
    "QUANTIZATION": "none", "MAX_SAMPLES": "40", "NUM_EPOCHS": "2", "BATCH_SIZE": "2", "MAX_LENGTH": "256",
    "GRADIENT_ACCUMULATION": "1", "LEARNING_RATE": "5e-3", "SAMPLE_SIZE": "6", "PROBE_STEPS": "3", "THREADS": "1",
}  # fmt: skip
STANDS_FOR = {
    "meta-llama/Meta-Llama-3-8B-Instruct": "MODEL",
    "--model demo": "--model MODEL",
    "--model M ": "--model MODEL ",
    "--model-path M ": "--model-path MODEL ",
    "--data-folder D ": f"--data-folder {DATA}/chunk_002 ",
    "--output-csv F": "--output-csv features.csv",
    "--single-dataset FILE": f"--single-dataset {DATA}/chunk_002/set_0.json",
    "raylora.experiment FILE": f"raylora.experiment {DATA}/chunk_002/set_0.json",
    "--questions FILE": "--questions mmlu_dataset/test_all_subjects.json",
    "--adapter DIR": "--adapter ADAPTER",
    " OTHER-DIR ": " OTHER-ADAPTER ",
    "tests.helpers.runs FOLDER": "tests.helpers.runs made_up",
    "s3://bucket/": f"s3://{BUCKET}/",
}
"""What a user would put in its place, in this order. MODEL and ADAPTER are only known when the tests run."""


@dataclass
class Site:
    """A user's folder, and the environment that commands are given."""

    folder: Path
    model: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAYLORA_") and k != "MODEL_NAME"},
            **{f"RAYLORA_{name}": value for name, value in SHORT.items()},
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def fill_in(self, text: str) -> list[str]:
        for there, here in STANDS_FOR.items():
            text = text.replace(there, here)
        adapters = sorted(self.folder.glob("results/chunk_001/experiments/*/adapter"))
        names = {"MODEL": self.model, "ADAPTER": adapters and adapters[0], "OTHER-ADAPTER": adapters and adapters[1]}
        return [str(names.get(word) or word) for word in shlex.split(text)]

    def run(self, text: str) -> str:
        """A command as it stands on a page; what it printed."""
        words = self.fill_in(text)
        if words[0] == "export":
            name, _, value = words[1].partition("=")
            self.environment[name] = str(self.model) if value == "MODEL" else value
            return ""
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"
        assert "Traceback" not in done.stderr, f"{text}\n{done.stderr}"
        return done.stdout


def lay_out(folder: Path, num_first: int = 12, num_second: int = 6) -> None:
    """Datasets and questions where the README has them."""
    for chunk, num in (("chunk_001", num_first), ("chunk_002", num_second)):
        for i in range(num):
            write_dataset(folder / DATA / chunk, f"set_{i}", offset=10 * i + len(str(num)), num=6 + i % 4)
    demo = ROOT / "raylora" / "demo"
    (folder / "mmlu_dataset").mkdir()
    shutil.copy(demo / "questions.json", folder / "mmlu_dataset" / "test_all_subjects.json")
    questions = json.loads((demo / "questions.json").read_text())
    first = {q["subject"]: q for q in reversed(questions)}
    shots = [{**q, "question": f"{k}. {q['question']}"} for q in first.values() for k in range(5)]
    (folder / "mmlu_dataset" / "dev_all_subjects.json").write_text(json.dumps(shots))
    shutil.copytree(ROOT / "configs", folder / "configs")
    write_question_set(folder)


@pytest.fixture(scope="module")
def site(tmp_path_factory, tiny_model_folder) -> Site:
    folder = tmp_path_factory.mktemp("user")
    lay_out(folder)
    return Site(folder, tiny_model_folder)


@pytest.fixture(scope="module")
def shown() -> dict[str, str]:
    """What the commands of ``site`` printed, so far."""
    return {}


@pytest.mark.parametrize("text", RUN["the user's own data"])
def test_commands_in_the_order_of_the_pages(site, shown, text):
    shown[text] = site.run(text)


def test_what_these_commands_left(site, shown):
    if len(shown) < len(RUN["the user's own data"]):
        pytest.skip("not all of the commands were run")
    results = site.folder / "results"
    table = pd.read_csv(results / "chunk_001" / "results.csv")
    assert (table["status"] == "ok").all()
    assert len(table) == 12
    assert (table["total_questions"] == 3).all(), "the last command asked the questions of the worked example"
    assert "0 done" in shown["python -m raylora.batch --chunk chunk_001 --dry-run"]
    again = shown["python -m raylora.batch --config configs/llama3-8b-8bit.yaml --chunk chunk_001"]
    assert "worker" not in again, "what was done was done again"
    assert (results / "chunk_001" / "report.html").stat().st_size > 100_000
    assert (results / "predictor" / "predictor.skops").is_file()
    assert len(pd.read_csv(results / "chunk_002" / "ranking.csv")) == 6
    assert len(pd.read_csv(results / "chunk_002" / "results.csv")) == 5
    assert len(pd.read_csv(site.folder / "features.csv")) == 1, "the last one measured a single dataset"


def test_the_readmes_block_of_python_runs_beside_it(site):
    """On the results of the commands before: what is done is not done again."""
    (block,) = blocks("README.md", "python")
    shutil.copy(site.folder / DATA / "chunk_002" / "set_1.json", site.folder / "data.json")
    code = block.replace('model="demo"', f"model={str(site.model)!r}").replace(
        'evaluate_mmlu("demo"', f"evaluate_mmlu({str(site.model)!r}"
    )
    (site.folder / "block.py").write_text(f"{code}\nassert len(results) == len(table) == 12\n")
    site.run("export MODEL_NAME=MODEL")
    site.run("python block.py")


def test_a_run_on_a_cluster(tmp_path, tiny_model_folder, monkeypatch):
    lay_out(tmp_path, num_first=3)
    site = Site(tmp_path, tiny_model_folder)
    # The nodes of the cluster know that runs are to be short, and nothing of where things are.
    for name, value in site.environment.items():
        monkeypatch.setenv(name, value)
    places = {
        "/shared/model": tiny_model_folder,
        "/shared/data": tmp_path / DATA,
        "/shared/mmlu": tmp_path / "mmlu_dataset",
    }
    export, token, submit, join, grid = RUN["on a cluster"]
    with local_cluster() as cluster:
        site.environment = {**os.environ, **cluster.environment}
        site.run(export)
        assert site.run(token).strip().endswith(TOKEN)
        for place, here in {**places, "/shared/": f"{tmp_path}/"}.items():
            submit = submit.replace(place, str(here))
        shown = site.run(submit.replace("http://localhost:8265", cluster.dashboard))
        assert "succeeded" in shown
        site.environment["RAY_ADDRESS"] = cluster.gcs
        site.environment["MODEL_NAME"] = os.path.relpath(tiny_model_folder, tmp_path)  # belongs to the user's folder
        assert "worker" not in site.run(join), "the job's rows are done again"
        site.run(grid)
    table = pd.read_csv(tmp_path / "results" / "chunk_001" / "results.csv")
    assert list(table["status"]) == ["ok"] * 12


def test_a_run_on_an_object_store(tmp_path, tiny_model_folder, monkeypatch):
    lay_out(tmp_path, num_first=3)
    with s3_server() as (_, objects):
        for file in (tmp_path / DATA / "chunk_001").iterdir():
            objects.put(f"data/chunk_001/{file.name}", file.read_bytes())
        questions = tmp_path / "mmlu_dataset" / "test_all_subjects.json"
        objects.put("mmlu/test_all_subjects.json", questions.read_bytes())
        site = Site(tmp_path, tiny_model_folder)
        site.environment |= {"MODEL_NAME": str(tiny_model_folder), "RAYLORA_CACHE": str(tmp_path / "cache")}
        for text in RUN["on an object store"]:
            site.run(text)
        names = objects.names("results/chunk_001/")
    assert {f"results/chunk_001/{name}" for name in ("results.csv", "results.parquet", "report.html")} <= set(names)


def test_a_new_feature_and_a_new_stage(tmp_path, tiny_model_folder):
    lay_out(tmp_path)
    apply_diffs("docs/extending.md", copy_of_the_code(tmp_path / "code"))
    site = Site(tmp_path, tiny_model_folder)
    site.environment["PYTHONPATH"] = str(tmp_path / "code")
    (text,) = RUN["a new stage"]
    site.run(text)
    row = pd.read_csv(tmp_path / "results" / "single" / "results.csv").iloc[0]
    assert row["recall_loss"] < row["train_initial_loss"]
    assert row["recall_seconds"] > 0
    (losses,) = tmp_path.glob("results/single/experiments/*/recall.csv")
    assert len(pd.read_csv(losses)) == row["num_examples"]
    site.run(text.replace("train,recall", "features,train,recall"))
    row = pd.read_csv(tmp_path / "results" / "single" / "results.csv").iloc[0]
    assert row["question_mark_share"] == 1
    assert "question_mark_share" in site.run("python -m raylora.features --describe")


@pytest.mark.parametrize("text", RUN["setting up"])
def test_setting_up(text, tmp_path):
    """In a home and an environment of the test's own; of what is installed, only that it could be."""
    words = text.split()
    if words[0] == "pip":
        try:
            socket.create_connection(("pypi.org", 443), 10).close()
        except OSError:
            pytest.skip("no network")
        words = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", *shlex.split(text)[2:]]
    elif words[0] == ".":
        venv.create(tmp_path / ".venv", symlinks=True)
        words = ["bash", "-c", f"cd {tmp_path}; {text}; command -v python"]
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[0] == "bash":
        assert done.stdout.strip() == str(tmp_path / ".venv" / "bin" / "python")
    if words[0] == "ray":
        assert (tmp_path / ".ray" / "auth_token").read_text().strip() in done.stdout


def test_a_made_up_run(tmp_path, tiny_model_folder):
    site = Site(tmp_path, tiny_model_folder)
    for text in RUN["a made-up run"]:
        site.run(text)
    assert list(tmp_path.glob("made_up/**/report.html"))


def test_what_stands_for_something_is_still_in_a_command():
    shown = " ".join(text for texts in RUN.values() for text in texts) + " "
    assert [there for there in STANDS_FOR if there not in shown] == []
    assert json.loads(blocks("docs/extending.md", "json")[0])
