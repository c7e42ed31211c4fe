"""The command on real Ray with logical GPUs: rows, faults, resume. The model is tiny; nothing else is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from raylora.console import make_console
from raylora.run.execute import run_plan
from tests.helpers.chunks import command, planned, run, still, write_dataset
from tests.helpers.objects import BUCKET, RECORDS

BAD_FILES = {
    "bad_bytes.json": b'[{"question": "\xff\xfe", "answer": "a"}]',
    "bad_cut.json": b'[{"question": "Q", "answer": "A"}, {"quest',
    "bad_deep.json": b"[" * 50_000,
    "bad_empty.json": b"",
    "bad_keys.json": b'[{"foo": "bar"}]',
    "bad_list.json": b"[]",
    "bad_number.json": b"42",
    "bad_records.jsonl": b'{"question": "", "answer": "a"}\n{"question": null, "answer": "a"}\n',
    "bad_text.json": b"question,answer\n",
    "bad_turns.json": b'[{"messages": [{"role": "user", "content": "hello?"}]}]',
}
KINDS = {
    "bad_bytes.json": "not_utf8",
    "bad_cut.json": "truncated_file",
    "bad_keys.json": "bad_records",
    "bad_records.jsonl": "bad_records",
    "bad_turns.json": "bad_records",
}
"""The others are ``data``."""


@pytest.mark.slow
@pytest.mark.ci
def test_one_good_file_and_ten_bad_ones_make_eleven_rows(ray_with_gpus, options, tmp_path):
    folder = tmp_path / "data" / "chunk_1"
    write_dataset(folder, "good")
    for name, content in BAD_FILES.items():
        (folder / name).write_bytes(content)
    rows = run(options)
    assert len(rows) == 11
    assert rows["good"]["status"] == "ok"
    assert rows["good"]["error_kind"] is None
    for name in BAD_FILES:
        row = rows[Path(name).stem]
        assert row["status"] == "error"
        assert name in row["error"]
        assert row["error_kind"] == KINDS.get(name, "data")
        assert "\n" not in row["error"]
    results = tmp_path / "results" / "chunk_1"
    for table in (pd.read_csv(results / "results.csv"), pd.read_parquet(results / "results.parquet")):
        assert len(table) == 11
        assert (table["status"] == "ok").sum() == 1
    (legacy,) = results.glob("batch_mmlu_results_chunk_1_*.json")
    report = json.loads(legacy.read_text())
    assert (report["folder_name"], report["total_files"], report["processed_files"]) == ("chunk_1", 11, 1)
    (good,) = [r for r in report["results"] if r["status"] == "ok"]
    assert good["results"]["finetuned_model"]["total_questions"] == 20
    assert good["results"]["base_model"]["overall_accuracy"] == rows["good"]["base_overall_accuracy"]
    assert good["training_info"]["training_metrics"]["train_final_loss"] == rows["good"]["train_final_loss"]
    manifest = json.loads((results / "run.json").read_text())
    assert manifest["versions"]["ray"]
    assert manifest["data_hashes"]["good"] == rows["good"]["data_hash"]
    assert not list(results.rglob(".partial-*"))


@pytest.mark.slow
@pytest.mark.ci
def test_one_worker_and_four_make_the_same_rows_in_any_order(ray_with_gpus, options, tmp_path):
    for i in range(5):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    one = run(options, num_workers=1)
    four = run(options, num_workers=4, output=tmp_path / "other")
    assert len(one) == 5
    assert {k: still(v) for k, v in one.items()} == {k: still(v) for k, v in four.items()}
    assert len({v["train_final_loss"] for v in one.values()}) == 5
    assert len(list((tmp_path / "other").glob("chunk_1/base/*/scores.parquet"))) == 1, "the base is scored once a run"


@pytest.mark.slow
@pytest.mark.ci
def test_done_experiments_are_skipped_and_half_done_ones_resumed(ray_with_gpus, options, tmp_path):
    for i in range(3):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    first = run(options)
    folders = {p.name.rpartition("-")[0]: p for p in (tmp_path / "results/chunk_1/experiments").iterdir()}
    (folders["data_1"] / "result.json").unlink()  # killed before its last write
    (folders["data_2"] / "result.json").unlink()  # killed in its last stage
    (folders["data_2"] / "mmlu.json").unlink()
    adapters = {k: (f / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for k, f in folders.items()}
    second = run(options)
    assert {k: still(v) for k, v in first.items()} == {k: still(v) for k, v in second.items()}
    assert first["data_2"]["train_seconds"] == second["data_2"]["train_seconds"]
    after = {k: (f / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns for k, f in folders.items()}
    assert adapters == after
    write_dataset(tmp_path / "data" / "chunk_1", "data_0", offset=77)
    third = run(options)
    assert third["data_0"]["data_hash"] != first["data_0"]["data_hash"]
    assert third["data_0"]["train_final_loss"] != first["data_0"]["train_final_loss"]
    assert still(third["data_1"]) == still(first["data_1"])


@pytest.mark.slow
@pytest.mark.ci
def test_a_grid_makes_a_row_for_every_combination(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    plan = planned(options, grid={"lora_r": [2, 4], "num_epochs": [1, 2]})
    rows = run_plan(plan, make_console(quiet=True))
    assert {(r.values["lora_r"], r.values["num_epochs"]) for r in rows} == {(2, 1), (2, 2), (4, 1), (4, 2)}
    assert all(r.ok for r in rows)
    assert len({r.values["train_final_loss"] for r in rows}) == 4


@pytest.mark.slow
def test_a_worker_killed_midway_costs_no_row(ray_with_gpus, options, tmp_path):
    for i in range(4):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i, num=24)
    expected = run(options)
    process = subprocess.Popen([*command({**options, "output": tmp_path / "killed"}, "--num-workers", "2")])
    try:
        for victim in wait_for_workers(process.pid, 2):
            victim.send_signal(signal.SIGKILL)
        assert process.wait(timeout=200) == 0
    finally:
        process.kill()
    table = pd.read_parquet(tmp_path / "killed" / "chunk_1" / "results.parquet")
    assert sorted(table["dataset"]) == sorted(expected)
    for row in table.to_dict("records"):
        assert row["train_final_loss"] == pytest.approx(expected[row["dataset"]]["train_final_loss"])
        assert row["overall_accuracy"] == expected[row["dataset"]]["overall_accuracy"]


def wait_for_workers(parent: int, num: int, timeout: float = 90) -> list[psutil.Process]:
    """The processes of the run that are at work on an experiment, as soon as there are ``num``."""
    deadline = time.time() + timeout
    while time.time() < deadline:
        at_work = []
        for process in psutil.Process(parent).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if re.match(r"ray::raylora-\w+-\d+: .* · ", "".join(process.cmdline())):
                    at_work.append(process)
        if len(at_work) >= num:
            return at_work
        time.sleep(0.05)
    raise AssertionError(f"{num} workers were not seen at work")


@pytest.mark.slow
@pytest.mark.ci
def test_an_experiment_that_kills_or_hangs_its_worker_gets_an_error_row(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "slow", num=400)
    write_dataset(tmp_path / "data" / "chunk_1", "quick", num=2)
    rows = run(options, timeout=25.0, num_epochs=100, batch_size=1, stages=("train",))
    assert rows["slow"]["status"] == "error"
    assert "--timeout 25" in rows["slow"]["error"]
    assert rows["slow"]["error_kind"] == "timeout"
    assert rows["slow"]["num_attempts"] == 2
    assert rows["quick"]["status"] == "ok"


@pytest.mark.slow
def test_the_whole_run_killed_midway_goes_on_where_it_was(options, tmp_path):
    for i in range(4):
        write_dataset(tmp_path / "data" / "chunk_1", f"data_{i}", offset=i)
    results = tmp_path / "results" / "chunk_1"
    process = subprocess.Popen(command(options), start_new_session=True)
    deadline = time.time() + 120
    while not list(results.glob("experiments/*/result.json")) and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    done = {p: p.stat().st_mtime_ns for p in results.glob("experiments/*/result.json")}
    assert 1 <= len(done) < 4
    again = subprocess.run(command(options), capture_output=True, text=True, check=False, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    table = pd.read_csv(results / "results.csv")
    assert sorted(table["dataset"]) == [f"data_{i}" for i in range(4)]
    assert (table["status"] == "ok").all()
    assert all(p.stat().st_mtime_ns == t for p, t in done.items()), "finished work was done again"
    assert not list(results.rglob(".partial-*"))
    third = subprocess.run(command(options), capture_output=True, text=True, check=False, timeout=100)
    assert third.returncode == 0
    assert "Ray dashboard" not in third.stdout, "nothing is left to do: Ray need not be started"


@pytest.mark.slow
@pytest.mark.ci
def test_a_failed_experiment_is_tried_again_only_when_asked(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    assert run(options, timeout=0.01)["data"]["status"] == "error"
    assert run(options)["data"]["status"] == "error"
    assert run(options, retry_failed=True)["data"]["status"] == "ok"


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_with_transfer_leaves_its_tables_and_goes_on_where_it_was(ray_with_gpus, options, tmp_path):
    """The datasets of two workers; a rerun after one row was lost makes that row alone, and the same tables."""
    for name in ("a", "b", "c"):
        write_dataset(tmp_path / "data" / "chunk_1", name, offset=ord(name), num=20)
    (tmp_path / "data" / "chunk_1" / "bad.json").write_text("[{")
    options = {**options, "stages": ("train",), "num_workers": 2, "transfer": True, "num_epochs": 1}
    rows = run(options)
    root = tmp_path / "results" / "chunk_1"
    table = pd.read_csv(root / "transfer_table.csv", index_col=["dataset", "experiment_id"])
    assert table.shape == (3, 3)
    assert not table.isna().any(axis=None)
    assert table.loc["a", "a"].item() == pytest.approx(rows["a"]["held_out_loss_change"])
    assert rows["bad"]["status"] == "error"
    assert 'id="transfer"' in (root / "report.html").read_text()
    before = {p: p.stat().st_mtime_ns for p in root.rglob("held_out.parquet")}
    assert len(before) == 3
    for name in ("result.json", "transfer.json", "transfer.parquet"):
        (root / "experiments" / rows["b"]["experiment_id"] / name).unlink()
    again = run(options)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("held_out.parquet")} == before
    assert again["a"] == rows["a"]
    assert again["b"]["held_out_loss"] == pytest.approx(rows["b"]["held_out_loss"], abs=1e-5)
    assert again["b"]["train_seconds"] == rows["b"]["train_seconds"], "not trained again"
    changes = pd.read_csv(root / "transfer_table.csv", index_col=["dataset", "experiment_id"])
    pd.testing.assert_frame_equal(changes, table, atol=1e-5)


@pytest.mark.slow
@pytest.mark.ci
def test_stages_are_reused_by_later_runs_that_want_more(ray_with_gpus, options, tmp_path):
    write_dataset(tmp_path / "data" / "chunk_1", "data")
    early = run(options, stages=("mmlu",))["data"]
    assert "add train to --stages" in early["error"]
    only_train = run(options, stages=("train",))["data"]
    assert only_train["overall_accuracy"] is None
    both = run(options, stages=("train", "mmlu"))["data"]
    assert both["train_seconds"] == only_train["train_seconds"]
    assert both["overall_accuracy"] is not None
    assert both["semantic_diversity"] is None


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize("more", [["--dry-run"], []])
def test_an_output_that_cannot_be_reached_is_one_line(objects, tiny_model_folder, more):
    objects.put("data/chunk_1/a.json", RECORDS)
    words = ["--chunk", "chunk_1", "--data-root", f"s3://{BUCKET}/data", "--output", "s3://no-such-bucket-here/out"]
    words += ["--model", str(tiny_model_folder), "--stages", "train", "--quantization", "none", *more]
    done = subprocess.run([sys.executable, "-m", "raylora.batch", *words], capture_output=True, text=True)
    if more:  # nothing can be there yet, and nothing is written
        assert done.returncode == 0
        assert "1 experiments, 0 done" in done.stdout
    else:
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith("raylora: --output s3://no-such-bucket-here/out")
