"""Whole runs with data, questions and results on a real S3 server: real Ray, real processes, a tiny model."""

from __future__ import annotations

import io
import json
import signal
import time

import pandas as pd
import pytest

from raylora.commands.run_command import call_command
from raylora.errors import UserError
from raylora.mmlu.question_set import DEMO_QUESTIONS
from raylora.rows import load_results
from raylora.storage.places import location
from tests.helpers.chunks import command, planned, run, still
from tests.helpers.objects import BUCKET, SECRET
from tests.helpers.s3_runs import OUT, behind_proxy, on_machine, only_process, options_on_s3, put_chunk, wait_for

pytestmark = pytest.mark.slow
NUM_DATASETS = 3


@pytest.fixture(scope="module")
def ray_on_s3(s3_objects):
    """After the server, so that its workers know it."""
    import ray

    ray.init(num_gpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def options(tiny_model_folder):
    return options_on_s3(tiny_model_folder)


def test_a_run_on_s3_leaves_what_one_on_a_disk_leaves_and_a_rerun_does_nothing(
    ray_on_s3, objects, options, tmp_path, capsys
):
    put_chunk(objects, tmp_path / "data", NUM_DATASETS)
    rows = run(options, transfer=True)
    at_home = {"data_root": tmp_path / "data", "mmlu": str(DEMO_QUESTIONS), "output": tmp_path / "here"}
    local = run({**options, **at_home}, transfer=True)
    assert len(rows) == NUM_DATASETS
    assert {k: still(v) for k, v in rows.items()} == {k: still(v) for k, v in local.items()}
    here = {p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    there = {name.removeprefix("out/") for name in objects.names("out/")}
    stamped = {n for n in here | there if "batch_mmlu_results" in n}
    needs_files = {n for n in here if n.endswith((".lock", "questions.parquet"))}
    machinery = {n for n in there if "/run.lock/" in n or n.endswith("/edition")}
    assert here - stamped - needs_files == there - stamped - machinery
    assert len(stamped) == 2
    table = load_results(f"s3://{BUCKET}/{OUT}")
    assert sorted(table["dataset"]) == sorted(rows)
    assert list(pd.read_csv(location(f"s3://{BUCKET}/{OUT}/results.csv").open("rb"))["status"]) == ["ok"] * 3
    before = {n: d for n, d in objects.everything().items() if "/experiments/" in n or "/base/" in n}
    results = [json.loads(line) for line in objects.get(f"{OUT}/results.jsonl").splitlines()]
    assert [line["raylora"].get("dataset") for line in results] == [None, *sorted(rows)]
    found = [line["results"]["demo" if "demo" in line["results"] else "questions"]["acc,none"] for line in results[1:]]
    assert found == [rows[name]["overall_accuracy"] for name in sorted(rows)]
    cells = objects.get(f"{OUT}/transfer.csv")
    assert len(pd.read_csv(io.BytesIO(cells))) == NUM_DATASETS**2
    assert run(options, transfer=True) == rows
    assert {n: d for n, d in objects.everything().items() if n in before} == before
    assert objects.get(f"{OUT}/transfer.csv") == cells
    call_command("batch", [*command(options, "--transfer")[3:], "--dry-run"])
    assert "3 experiments, 3 done" in capsys.readouterr().out


@pytest.mark.ci
def test_no_secret_is_in_anything_that_is_kept(ray_on_s3, objects, options, tmp_path):
    put_chunk(objects, tmp_path / "data", 1)
    run(options, limit=1)
    kept = objects.everything()
    assert not [name for name, data in kept.items() if SECRET.encode() in data]
    manifest = json.loads(kept[f"{OUT}/run.json"])
    assert manifest["configuration"]["output"] == f"s3://{BUCKET}/out"


def test_a_killed_run_is_gone_on_with_and_a_second_one_is_told(objects, options, tmp_path):
    num_datasets = 24  # so many that the first run is not done before it is killed
    put_chunk(objects, tmp_path / "data", num_datasets)
    words = command(options, "--num-workers", "1")
    first = only_process(words, tmp_path / "first")
    wait_for(lambda: objects.names(f"{OUT}/run.lock"))
    told = pytest.raises(UserError, match="another run is writing here")
    with on_machine(tmp_path / "second"), told, planned(options).store.held(False):
        pass
    wait_for(lambda: [n for n in objects.names(OUT) if n.endswith("result.json")])
    first.send_signal(signal.SIGKILL)
    first.wait()
    rows_before = {n: objects.get(n) for n in objects.names(OUT) if n.endswith("result.json")}
    assert 1 <= len(rows_before) < num_datasets
    second = only_process(words, tmp_path / "second", text=True)
    output, _ = second.communicate(timeout=300)
    assert second.returncode == 0, output
    assert len(load_results(f"s3://{BUCKET}/{OUT}")) == num_datasets
    assert {n: objects.get(n) for n in rows_before} == rows_before, "what was finished is not done again"
    assert f"s3://{BUCKET}/{OUT}" in output


def test_a_store_that_goes_down_ends_the_run_within_a_minute(objects, options, tmp_path):
    num_datasets = 12
    put_chunk(objects, tmp_path / "data", num_datasets)
    words = command(options, "--num-workers", "1")
    with behind_proxy() as proxy:
        process = only_process(words, tmp_path / "m", text=True)
        wait_for(lambda: [n for n in objects.names(OUT) if n.endswith("result.json")])
        proxy.inject("500", times=10**6)
        began = time.monotonic()
        shown, _ = process.communicate(timeout=200)
        took = time.monotonic() - began
        assert process.returncode == 1, shown
        assert "Traceback" not in shown
        assert shown.strip().splitlines()[-1].endswith("What is finished is kept: the same command resumes from here.")
        assert took < 70, shown
        proxy.clear()
        shown, _ = only_process(words, tmp_path / "m", text=True).communicate(timeout=300)
    assert len(load_results(f"s3://{BUCKET}/{OUT}")) == num_datasets, shown
